"""Samples of a checkpoint: their noise, the model that guides, precision, and where images are saved."""
