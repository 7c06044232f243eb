"""The files that are sent with a job to another machine: code and recipes, but no data, outputs or keys."""

import fnmatch
import hashlib
import os
import posixpath
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cluster.credentials import refuse_files_with_credentials
from raydit.errors import InvalidInput, NotFound
from raydit.listed_names import require_utf8

MAX_PACKAGE_BYTES = 100 * 2**20
"""The head keeps packages in memory; Ray itself refuses more than 512 MB."""
EXCLUDED_AT_TOP = ("data", "outputs", "mlruns", "mlartifacts", "build", "dist", "mlflow.db*")
EXCLUDED_ANYWHERE = (".*", "__pycache__", "venv", "node_modules", "*.egg-info")
"""Names that begin with a dot are .git, .venv and caches, and .env, .aws and .netrc, which contain keys."""
KEY_FILES = (
    *("*.pem", "*.key", "*.p8", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "*.env"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "auth_token", "*token.txt", "tokens.txt", "*.token"),
    *("credentials", "credentials.*", "*credentials.json", "secret.*", "secrets.*", "*.secret", "*.secrets"),
    *(
        "kubeconfig",
        "kubeconfig.*",
        "*.kubeconfig",
        "service-account*.json",
        "service_account*.json",
        "netrc",
        "htpasswd",
    ),
)
"""Patterns of names, in lower case, of files that usually hold keys."""
RAY_PACKAGE_PREFIX = "_ray_pkg_"
"""Begins the name of the folder that Ray unpacks a package into, and deletes when no job uses it any more."""
EARLIEST_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Package:
    """Files to send with a job."""

    files: Mapping[str, Path]
    """Local files by their names in the job's working directory, with slashes."""

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())

    def contains(self, path: str) -> bool:
        """Return whether a file, or any file in a folder, is part of the package."""
        name = posixpath.normpath(path)
        return name in self.files or any(other.startswith(f"{name}/") for other in self.files)

    def digest(self) -> str:
        """Return the SHA-256 of all names and contents, which does not depend on the files' times."""
        total = hashlib.sha256()
        for name in sorted(self.files):
            total.update(f"{name}\0{hashlib.sha256(self.files[name].read_bytes()).hexdigest()}\n".encode())
        return total.hexdigest()

    def write(self, path: Path) -> None:
        """Write the package as a zip file, whose bytes depend only on names, contents and execute permissions."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(self.files):
                info = zipfile.ZipInfo(name, EARLIEST_ZIP_TIME)
                info.external_attr = (0o755 if os.access(self.files[name], os.X_OK) else 0o644) << 16
                archive.writestr(info, self.files[name].read_bytes(), zipfile.ZIP_DEFLATED)


def pack(folder: Path, extra: Mapping[str, Path] | None = None, *, max_bytes: int = MAX_PACKAGE_BYTES) -> Package:
    """Return the package of a folder: its files without data, outputs, keys and what .gitignore excludes.

    extra: further files by their names in the package, which are never excluded. Raises InvalidInput if the package is
    larger than max_bytes, naming the largest files, or if a file contains a credential, is a link out of the folder, or
    has a name that is not UTF-8.
    """
    names = [name for name in _list_not_ignored(folder) if not _is_excluded(name) and (folder / name).is_file()]
    require_utf8(names, str(folder), "working directory")
    _refuse_links_out_of(folder, names)
    package = Package(files={name: folder / name for name in names} | dict(extra or {}))
    if package.num_bytes > max_bytes:
        sizes = sorted(((file.stat().st_size, name) for name, file in package.files.items()), reverse=True)
        largest = ", ".join(f"{name} ({_mib(size)})" for size, name in sizes[:5])
        raise InvalidInput(
            f"{folder}: found {len(sizes):,} files of {_mib(package.num_bytes)} to send (the largest: {largest})",
            f"at most {_mib(max_bytes)}",
            "list them in .gitignore, move them into data/, or keep them on storage that the cluster reads",
        )
    refuse_files_with_credentials(package.files.items())
    return package


def _refuse_links_out_of(folder: Path, names: Iterable[str]) -> None:
    """Raise InvalidInput for a link to a file outside of the folder, or to one that is not sent itself."""
    root = folder.resolve()
    for name in names:
        target = (folder / name).resolve()
        inside = target.is_relative_to(root)
        if not inside or _is_excluded(target.relative_to(root).as_posix()):
            raise InvalidInput(
                f"{name}: found a link to {target}",
                "files of the working directory only, without data and keys",
                "replace the link by the file, or list it in .gitignore",
            )


def is_job_folder(path: Path) -> bool:
    """Return whether a path is in the folder of a job that a package was sent with, which Ray deletes."""
    return any(part.startswith(RAY_PACKAGE_PREFIX) for part in path.parts)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _is_excluded(name: str) -> bool:
    parts = name.split("/")
    return (
        any(fnmatch.fnmatch(parts[0], pattern) for pattern in EXCLUDED_AT_TOP)
        or any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in EXCLUDED_ANYWHERE)
        or any(fnmatch.fnmatchcase(parts[-1].lower(), pattern) for pattern in KEY_FILES)
    )


def _list_not_ignored(folder: Path) -> list[str]:
    """Return the names of all files that git does not ignore; the folder need not be in a repository."""
    if shutil.which("git") is None:
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
    listing = ["ls-files", "-z", "--others", "--exclude-standard"]
    result = subprocess.run(["git", *listing, "--cached"], cwd=folder, capture_output=True)
    if result.returncode != 0:
        with tempfile.TemporaryDirectory() as empty:
            subprocess.run(["git", "init", "--quiet", empty], check=True, capture_output=True)
            empty_repository = [f"--git-dir={empty}/.git", f"--work-tree={folder}"]
            result = subprocess.run(["git", *empty_repository, *listing], cwd=folder, capture_output=True, check=True)
    return sorted({os.fsdecode(name) for name in result.stdout.split(b"\0") if name})


def pinned_requirements(distribution: str) -> list[str]:
    """Return the requirements of a distribution, pinned to the versions installed here.

    Ray is left out, because the cluster has its own. Raises NotFound if the distribution is not installed.
    """
    try:
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        raise NotFound(
            f"found no installed distribution {distribution}, whose requirements the cluster would install",
            "raydit installed with pip, not only its files on the path",
            "install it here with `pip install .` in its folder, or submit without --pip",
        ) from None
    needed = [line for line in requirements if "extra ==" not in line]
    names = sorted({re.split(r"[^\w.-]", line)[0] for line in needed})
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names if name != "ray"]
