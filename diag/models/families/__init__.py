"""The model families, one file each: what their names mean, and how they are loaded."""
