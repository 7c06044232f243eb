"""Training of the recipe's own autoencoder."""
