"""From embeddings to a training set: what is computed of them."""
