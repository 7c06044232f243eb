"""Checkpoints: found by any of their names, opened, imported and exported."""
