"""The report of a pipeline: one HTML page drawn from what its stages left on disk. No torch, no network; nothing is computed anew."""
