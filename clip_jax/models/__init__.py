"""The models as pure functions of nested dicts of parameters; only this package uses Flax."""
