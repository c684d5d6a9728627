"""Pure functions of numbers: FLOPs, fits, plots."""
