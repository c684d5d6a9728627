"""Scaling experiments: a ladder of runs, their table, the laws fitted to it, the pictures."""
