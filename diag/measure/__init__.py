"""Runs a model over inputs: attention calls become one number per input, layer, head and metric."""
