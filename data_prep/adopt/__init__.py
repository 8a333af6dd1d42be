"""Existing Megatron shards become a prep output: listed where they lie, never copied, with checksums, checks and a blend."""
