"""Weights in and out of PyTorch's formats."""
