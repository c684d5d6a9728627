"""Checkpoints: saving and restoring a run, which are deleted, and which process owns a run."""
