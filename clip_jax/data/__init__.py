"""The input pipeline: from image-text pairs on disk to batches on the mesh."""
