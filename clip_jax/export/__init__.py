"""Models that run without this package: StableHLO for JAX, ONNX for everything else."""
