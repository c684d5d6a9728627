"""Use a finished model: load, evaluate, predict, embed, search."""
