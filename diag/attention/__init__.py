"""One attention call and its statistics; no token × token matrix is made here."""
