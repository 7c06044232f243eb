"""Weights and pipelines in the formats of other projects, read and written."""
