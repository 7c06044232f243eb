"""Refuse credentials in recipes, settings and files, which job servers and tracking servers store and show to users.

Credentials belong in the environment.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from raydit.errors import InvalidInput

SECRET_NAMES = re.compile(
    r"SECRET|TOKEN(?!IZER)|PASSWORD|PASSWD|PASSPHRASE|ACCESS_?KEY|API_?KEY|ACCOUNT_?KEY|PRIVATE_?KEY|SAS_|CONNECTION_STRING"
)
"""Matches names of environment variables whose values are secret, such as PGPASSWORD and AWS_SECRET_ACCESS_KEY."""
MIN_SECRET_LENGTH = 8
"""Minimum number of characters of a secret that is searched for; a shorter one would match by chance."""
MAX_SCHEME_LENGTH = 20
SECRET_QUERY_KEY = re.compile(
    r"sig|signature|token|password|passwd|secret|api_?key|credential|access_?key", re.IGNORECASE
)
"""Found in the names of query fields whose values are secret: sig of Azure, X-Amz-Signature, access_token."""
KEYS = {
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY",
    "the key of a service account": rb"[\"']private_key_id[\"']\s*:",
    "the key of a Kubernetes client": rb"client-key-data:\s*[A-Za-z0-9+/]{8}",
    "a secret key of AWS": rb"(?i)aws_secret_access_key[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])",
    "a token of GitHub": rb"\bgh[pousr]_[A-Za-z0-9]{36}",
    "a token of Hugging Face": rb"\bhf_[A-Za-z0-9]{34}\b",
}
"""Patterns of credentials in files, by what they are."""
_SHOWN_TO_USERS = "recipes and settings are shown by job servers and tracking to all their users"


def refuse_password(name: str, text: str) -> None:
    """Raise InvalidInput if a text has a URI with a credential in it; the message does not repeat the credential.

    That is a password or token in front of the host, or a query field with a secret's name. name: the field, flag or
    file that the text is the value of.
    """
    if any(map(_has_credential, _uris_in(text))):
        raise InvalidInput(
            f"{name}: found a URI with a password in it",
            f"none, because {_SHOWN_TO_USERS}",
            "remove it, and set credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, ...)",
        )


def _uris_in(text: str) -> Iterator[str]:
    """Yield the URIs in a text, in time that grows with its length only."""
    for match in re.finditer(r"://[^\s'\"<>]*", text):
        before = text[max(0, match.start() - MAX_SCHEME_LENGTH) : match.start()]
        if scheme := re.search(r"[a-zA-Z][a-zA-Z0-9+.-]*$", before):
            yield scheme[0] + match[0]


def _has_credential(uri: str) -> bool:
    scheme, _, rest = uri.partition("://")
    before_query = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, _, path = before_query.partition("/")
    user, at, _ = authority.rpartition("@")
    if at:
        # A name alone is no secret where databases and object stores are, but a token in front of a web server is.
        return ":" in user or scheme.lower().startswith(("http", "git+http"))
    _, colon, port = authority.partition(":")
    if colon and not port.isdigit() and "@" in path:
        return True  # a password with a slash in it
    query = rest[len(before_query) :].lstrip("?#")
    fields = (field.partition("=") for field in re.split(r"[&;#]", query))
    return any(value and SECRET_QUERY_KEY.search(key) for key, _, value in fields)


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
    """Raise InvalidInput if a file contains a key, a Ray token, or the value of a secret environment variable.

    files: the name of each file for the message, and its path.
    """
    values = {f"the value of {variable}": secret.encode() for variable, secret in _secret_variables().items()}
    if len(token := ray_token()) >= MIN_SECRET_LENGTH:
        values["the token of a Ray cluster"] = token.encode()
    for name, file in files:
        content = file.read_bytes()
        found = [what for what, secret in values.items() if secret in content]
        found += [what for what, pattern in KEYS.items() if re.search(pattern, content)]
        if found:
            raise InvalidInput(
                f"{name}: found {found[0]}",
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


def default_token_file() -> Path:
    """Return the file in which Ray keeps the token of this user's clusters."""
    return Path.home() / ".ray" / "auth_token"


def protect_token_file() -> None:
    """Let only this user read Ray's token file, and create it if there is none: Ray would let every user read it."""
    file = default_token_file()
    with contextlib.suppress(OSError):  # a home that cannot be written: Ray says so itself
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not file.exists():
            with (
                contextlib.suppress(FileExistsError),
                open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as out,
            ):
                out.write(secrets.token_hex(32))
        elif file.stat().st_mode & 0o077:
            file.chmod(0o600)


def ray_token() -> str:
    """Return the token of Ray's clusters, found in the same order as Ray's own tools do; empty without one."""
    if token := os.environ.get("RAY_AUTH_TOKEN", ""):
        return token.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or default_token_file())
    return file.read_text().strip() if file.is_file() else ""
