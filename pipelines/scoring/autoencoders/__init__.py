"""The evaluation of an autoencoder by itself."""
