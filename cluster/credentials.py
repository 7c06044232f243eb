"""Credentials come from the environment. Nothing that a job server or tracking shows and keeps may hold one."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

SECRET_NAMES = re.compile(r"(^|_)(SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|PRIVATE_KEY)(_|$)")
SHORTEST_SECRET = 8
"""Characters; what is shorter would be found by chance."""
USER_IN_URI = re.compile(r"[a-zA-Z][\w+.-]*://[^/\s@?#]*:[^/\s@?#]+@")
"""scheme://user:password@..."""


def refuse_password(place: str, text: str) -> None:
    """Refuse a URI, or a text, with a password; place: what it is. Raises ValueError, which does not repeat it."""
    if USER_IN_URI.search(text):
        raise ValueError(
            f"{place}: found a URI with a password in it, expected none: recipes and settings are shown by job servers "
            "and tracking to all their users. Take it out, and set credentials in the environment (AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, ...)"
        )


def refuse_credentials(texts: Mapping[str, object]) -> None:
    """Refuse recipes and settings with a credential in them; texts: what it is, and its text, or texts within it.

    Raises ValueError, which names the place, never the credential.
    """
    for place, text in _texts_in(texts):
        refuse_password(place, text)
        for name, secret in _secrets_here().items():
            if secret in text:
                raise ValueError(
                    f"{place}: found the value of {name}, expected no credentials: recipes and settings are shown "
                    "by job servers and tracking to all their users. Take it out, and set it in the environment"
                )


def _texts_in(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _texts_in(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            yield f"{prefix}{name}", value


def refuse_files_with_credentials(files: Iterable[tuple[str, Path]]) -> None:
    """Refuse files that hold the value of a secret variable of this environment. Raises ValueError."""
    secrets = {name: secret.encode() for name, secret in _secrets_here().items()}
    for shown, file in files if secrets else ():
        content = file.read_bytes()
        for name, secret in secrets.items():
            if secret in content:
                raise ValueError(
                    f"{shown}: found the value of {name}, expected no credentials in what is sent with a job; take "
                    "it out of the file, or list the file in .gitignore"
                )


def _secrets_here() -> dict[str, str]:
    """Variables whose names say that they are secret; paths to secrets are not."""
    return {
        name: value
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name) and len(value) >= SHORTEST_SECRET and os.sep not in value[:1]
    }
