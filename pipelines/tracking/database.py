"""A tracking store that is a database file: its folder, and whether it exists."""

from pathlib import Path

SQLITE = "sqlite:///"
"""Beginning of the tracking URI of a database file."""


def is_absent(uri: str) -> bool:
    """Return whether a store is a database file that does not exist yet; connecting to it would create it."""
    return uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file()


def database_folder(uri: str) -> Path | None:
    """Return the absolute folder of a database file; None for a store of another kind."""
    return Path(uri.removeprefix(SQLITE)).absolute().parent if uri.startswith(SQLITE) else None
