"""Checkpoints: folders of them, opened by any of their names, imported and exported."""
