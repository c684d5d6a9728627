"""HTTP server with JSON: embeddings, labels and search of one model, for many clients."""
