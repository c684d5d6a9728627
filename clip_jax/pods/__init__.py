"""What a run takes on a pod that you don't have: its step compiled, memory and moves counted."""
