"""What is measured of attention calls and of the residual stream, and the catalogue of all of it."""
