"""Every architecture that can be built small, and a judge of what attnbias says of it."""
