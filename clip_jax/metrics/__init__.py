"""Metrics of a run: timing, and reports to files, TensorBoard, wandb and the terminal."""
