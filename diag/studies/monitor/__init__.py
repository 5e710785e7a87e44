"""The diagnostics of a model while it trains."""
