"""Refuse credentials in recipes, settings and files, which job servers and tracking servers store and show to users.

Credentials belong in the environment.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from raydit.errors import InvalidInput

SECRET_NAMES = re.compile(r"(^|_)(SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|PRIVATE_KEY)(_|$)")
MIN_SECRET_LENGTH = 8
"""Minimum number of characters of a secret that is searched for; a shorter one would match by chance."""
USER_IN_URI = re.compile(r"[a-zA-Z][\w+.-]*://[^/\s@?#]*:[^/\s@?#]+@")
"""Matches scheme://user:password@..."""
_SHOWN_TO_USERS = "recipes and settings are shown by job servers and tracking to all their users"


def refuse_password(name: str, text: str) -> None:
    """Raise InvalidInput if a text has a URI with a password in it; the message does not repeat the password.

    name: the field, flag or file that the text is the value of.
    """
    if USER_IN_URI.search(text):
        raise InvalidInput(
            f"{name}: found a URI with a password in it",
            f"none, because {_SHOWN_TO_USERS}",
            "remove it, and set credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, ...)",
        )


def refuse_credentials(texts: Mapping[str, object]) -> None:
    """Raise InvalidInput if a recipe or setting contains a password or the value of a secret environment variable.

    texts: the texts by their names; a text may be a mapping of further texts. The message names the field and the
    variable, never the credential.
    """
    for name, text in _texts_in(texts):
        refuse_password(name, text)
        for variable, secret in _secret_variables().items():
            if secret in text:
                raise InvalidInput(
                    f"{name}: found the value of {variable}",
                    f"no credentials, because {_SHOWN_TO_USERS}",
                    "remove it, and set it in the environment",
                )


def _texts_in(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _texts_in(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            yield f"{prefix}{name}", value


def refuse_files_with_credentials(files: Iterable[tuple[str, Path]]) -> None:
    """Raise InvalidInput if a file contains the value of a secret environment variable.

    files: the name of each file for the message, and its path.
    """
    secrets = {variable: secret.encode() for variable, secret in _secret_variables().items()}
    for name, file in files if secrets else ():
        content = file.read_bytes()
        for variable, secret in secrets.items():
            if secret in content:
                raise InvalidInput(
                    f"{name}: found the value of {variable}",
                    "no credentials in files that are sent with a job",
                    "remove it from the file, or list the file in .gitignore",
                )


def _secret_variables() -> dict[str, str]:
    """Return the environment variables whose names say that their values are secret, without paths to secrets."""
    return {
        name: value
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name) and len(value) >= MIN_SECRET_LENGTH and os.sep not in value[:1]
    }
