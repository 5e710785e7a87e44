"""What people look at: figures, report, sentences, terminal. Tables in; knows no model, loads no torch."""
