"""Contrastive losses over the global batch: pure functions of features."""
