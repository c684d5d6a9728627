"""The order of samples: shuffle blocks, mixtures, and what reads ahead in that order."""
