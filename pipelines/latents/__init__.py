"""Latent data sets: their Parquet format, and how they are written, read and verified."""
