"""Training with changed attention: grids of small models from one plan, and CLIP by open_clip's own loop."""
