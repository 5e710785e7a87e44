"""How a model is watched and changed while it runs: attention calls, blocks, the stream between them."""
