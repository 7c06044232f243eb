"""Building blocks of the transformers: attention, embeddings, blocks, and the check of their inputs."""
