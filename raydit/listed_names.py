"""Names of files that another file or a folder lists.

A manifest, an index or a checkpoint's COMPLETE may come from somebody else, and what it lists is opened: each name must
stay in the folder of that file.
"""

import os
from collections.abc import Iterable

from raydit.errors import InvalidInput

MAX_LENGTH = 1024


def require_inside(name: object, where: object) -> str:
    """Return a listed name, relative and with forward slashes, if it stays inside the folder of the file that lists it.

    where: path of that file. Raises InvalidInput for an absolute path, a URI, "..", and anything that is not a name.
    """
    if isinstance(name, str) and len(name) <= MAX_LENGTH and name.isprintable():
        parts = name.replace("\\", "/").split("/")
        if not {"", ".", ".."} & set(parts):
            return name
    raise InvalidInput(
        f"{where}: found {str(name)[:200]!r} among the files that it lists",
        "names of files in its own folder",
        "do not use it: copy it again from where you trust it",
    )


def require_all_inside(names: Iterable[object], where: object) -> list[str]:
    """Return listed names that all stay inside the folder; see `require_inside`."""
    return [require_inside(name, where) for name in names]


def require_utf8(names: Iterable[str], folder: str, field: str) -> None:
    """Raise InvalidInput if the name of a file in a folder is not UTF-8; it cannot be recorded then.

    field: what names the folder, for the message.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            found = f"{field}: found the file name {os.fsencode(name)!r} in {folder}"
            raise InvalidInput(found, "UTF-8", "rename the file") from error
