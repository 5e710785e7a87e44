"""What people look at: figures, report, sentences, terminal. Tables in; loads no model and no torch."""
