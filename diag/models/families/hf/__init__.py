"""Hugging Face models: files, towers, heads."""
