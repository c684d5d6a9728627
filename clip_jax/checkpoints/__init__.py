"""Checkpoints: save, restore and delete them, resume runs, and lock run directories."""
