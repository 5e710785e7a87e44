"""Kernels that compute the same numbers faster; each is tested against a dense float64 reference."""
