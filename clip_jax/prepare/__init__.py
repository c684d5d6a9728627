"""Prepare pairs for training: filter them, drop duplicates, and write shards that read fast."""
