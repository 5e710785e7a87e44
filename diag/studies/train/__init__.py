"""Training: so far, the small models that travel inside the package."""
