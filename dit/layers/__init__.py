"""What transformer networks are built of: attention, embeddings, blocks, and the check of their inputs."""
