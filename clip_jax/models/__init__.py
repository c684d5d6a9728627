"""The towers as pure functions of nested dicts; the only place that knows Flax."""
