"""Pairs made ready for training: filtered, without duplicates, in shards that are read fast."""
