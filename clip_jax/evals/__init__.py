"""Evaluators of the metrics that CLIP papers report, computed on the training mesh."""
