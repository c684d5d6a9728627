"""Use a trained model: load, evaluate, predict, embed, search."""
