"""A plan carried out: folder, shards, processes, ledger, tables. `diag.probe` does it in memory."""
