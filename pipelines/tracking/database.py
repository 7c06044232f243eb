"""A tracking store that is a database file: where it is, and whether it exists."""

from pathlib import Path

SQLITE = "sqlite:///"
"""Beginning of the tracking URI of a database file."""


def database_path(uri: str) -> Path | None:
    """Return the absolute path of a database file; None for a store of another kind."""
    path = uri.removeprefix(SQLITE)
    return Path(path).absolute() if uri.startswith(SQLITE) and path else None


def database_folder(uri: str) -> Path | None:
    """Return the absolute folder of a database file; None for a store of another kind."""
    database = database_path(uri)
    return database.parent if database else None


def absolute_uri(uri: str) -> str:
    """Return a tracking URI that means the same in every working directory."""
    database = database_path(uri)
    return f"{SQLITE}{database}" if database else uri


def is_absent(uri: str) -> bool:
    """Return whether a store is a database file that does not exist yet; connecting to it would create it."""
    database = database_path(uri)
    return database is not None and not database.is_file()
