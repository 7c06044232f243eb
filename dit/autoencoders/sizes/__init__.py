"""Sizes of networks, computed from their configs without torch."""
