"""One file a format: random access, a length, a key for each sample."""
