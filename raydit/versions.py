"""The versions of packages that are installed here."""

from importlib import metadata

from raydit import __version__


def installed_version(name: str) -> str | None:
    """Return the version of a distribution without importing it; None if it is not installed.

    raydit itself always has one: a job may run its files from a package, where no metadata of it is installed.
    """
    if name == "raydit":
        return __version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
