"""What CLIP papers report, computed on the training mesh."""
