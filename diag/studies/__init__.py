"""Whole questions on top of runs: compare, attend, intervene, train, a writeup, a monitor in training."""
