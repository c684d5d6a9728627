"""Whole steps on several meshes, of every family, and runs from start to end in one process."""
