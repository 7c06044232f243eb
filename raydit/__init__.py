"""What all four packages share: raydit's version, and the errors that a user can cause."""

__version__ = "0.1.0"
"""Version of raydit. The code itself holds it, because a cluster may run raydit's files without installing them."""
