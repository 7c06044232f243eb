"""What a job on another machine gets of the working directory: code and recipes, not data, outputs or keys."""

import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from cluster.credentials import refuse_files_with_credentials

LIMIT_BYTES = 100 * 2**20
"""The head keeps packages in memory; Ray itself refuses more than 512 MB."""
LEFT_OUT_AT_THE_TOP = ("data", "outputs", "mlruns", "mlartifacts", "build", "dist", "mlflow.db*")
LEFT_OUT_ANYWHERE = (".*", "__pycache__", "venv", "node_modules", "*.egg-info")
"""What begins with a dot: .git, .venv, caches, and .env, .aws, .netrc, where keys are kept."""
KEYS = ("*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*", "auth_token", "credentials", "credentials.json")
OLDEST_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Package:
    """Files to send with a job."""

    files: Mapping[str, Path]
    """By their name in the job's working directory, with slashes."""

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())

    def holds(self, path: str) -> bool:
        """Whether a file, or anything in a folder, is part of the package."""
        name = PurePosixPath(path).as_posix()
        return name in self.files or any(other.startswith(f"{name}/") for other in self.files)

    def digest(self) -> str:
        """sha256 of names and contents: equal for equal content, whatever the times."""
        total = hashlib.sha256()
        for name in sorted(self.files):
            total.update(f"{name}\0{hashlib.sha256(self.files[name].read_bytes()).hexdigest()}\n".encode())
        return total.hexdigest()

    def write(self, path: Path) -> None:
        """Write it as a zip file, the same bytes for the same content."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(self.files):
                info = zipfile.ZipInfo(name, OLDEST_ZIP_TIME)
                info.external_attr = (0o755 if os.access(self.files[name], os.X_OK) else 0o644) << 16
                archive.writestr(info, self.files[name].read_bytes(), zipfile.ZIP_DEFLATED)


def pack(folder: Path, extra: Mapping[str, Path] | None = None, *, limit_bytes: int = LIMIT_BYTES) -> Package:
    """Choose what of a folder goes along: neither what .gitignore names nor data, outputs and keys.

    extra: further files, taken in any case. Raises ValueError if there is too much, naming the largest, or if a file
    holds a credential of this environment.
    """
    names = [name for name in _listed(folder) if not _is_left_out(name) and (folder / name).is_file()]
    package = Package(files={name: folder / name for name in names} | dict(extra or {}))
    if package.num_bytes > limit_bytes:
        sizes = sorted(((file.stat().st_size, name) for name, file in package.files.items()), reverse=True)
        largest = ", ".join(f"{name} ({_mib(size)})" for size, name in sizes[:5])
        raise ValueError(
            f"found {len(sizes):,} files of {_mib(package.num_bytes)} in {folder} to send with the job, expected at "
            f"most {_mib(limit_bytes)}; the largest: {largest}. List them in .gitignore, move them into data/, or "
            "keep them on storage that the cluster reads"
        )
    refuse_files_with_credentials(package.files.items())
    return package


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _is_left_out(name: str) -> bool:
    parts = name.split("/")
    return (
        any(fnmatch.fnmatch(parts[0], pattern) for pattern in LEFT_OUT_AT_THE_TOP)
        or any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in LEFT_OUT_ANYWHERE)
        or any(fnmatch.fnmatch(parts[-1], pattern) for pattern in KEYS)
    )


def _listed(folder: Path) -> list[str]:
    """Names of all files that git does not ignore, whether or not the folder is in a repository."""
    if shutil.which("git") is None:
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
    listing = ["ls-files", "-z", "--others", "--exclude-standard"]
    result = subprocess.run(["git", *listing, "--cached"], cwd=folder, capture_output=True)
    if result.returncode != 0:
        with tempfile.TemporaryDirectory() as empty:
            subprocess.run(["git", "init", "--quiet", empty], check=True, capture_output=True)
            elsewhere = [f"--git-dir={empty}/.git", f"--work-tree={folder}"]
            result = subprocess.run(["git", *elsewhere, *listing], cwd=folder, capture_output=True, check=True)
    return sorted({os.fsdecode(name) for name in result.stdout.split(b"\0") if name})


def pinned_requirements(distribution: str) -> list[str]:
    """What a distribution needs, each in the version that is installed here; without Ray, which is the cluster's."""
    needed = [line for line in metadata.requires(distribution) or [] if "extra ==" not in line]
    names = sorted({re.split(r"[^\w.-]", line)[0] for line in needed})
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names if name != "ray"]
