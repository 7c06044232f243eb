"""Autoencoders: what their classes compute, their size, their scale, and what they are trained on."""
