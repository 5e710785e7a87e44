"""Faulty files and words, drawn from seeds, put to the command line: `tests/fuzz.py` runs them in bulk.

`stock` makes good files of every kind, `documents`, `tables`, `files` and `formats` spoil them, `kinds` says
which verbs read what, and `tries` runs one in a process of its own and judges how it ended.
"""
