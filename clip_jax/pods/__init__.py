"""Plan a run for a pod that is not at hand: compile its step, count memory and data movement."""
