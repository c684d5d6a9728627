"""The order of samples: shuffle blocks, mixtures, batches, and reading ahead in that order."""
