"""Scaling experiments: ladders of runs, tables of their results, and scaling laws with plots."""
