"""One attention call, what its queries see, and its statistics in memory linear in the number of tokens."""
