"""A Hugging Face hub on this machine: just enough of it for huggingface_hub to find and fetch data sets."""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@dataclass
class Hub:
    """Data sets as folders on disk, by commit; and the paths that were asked for."""

    url: str
    stop: Callable[[], None]
    """Takes the network away."""
    commits: dict[tuple[str, str], Path] = field(default_factory=dict)
    """(OWNER/NAME, commit) -> folder."""
    revisions: dict[tuple[str, str], str] = field(default_factory=dict)
    """(OWNER/NAME, branch or tag) -> commit."""
    fetched: list[str] = field(default_factory=list)

    def commit(self, name: str, folder: Path, *revisions: str) -> str:
        """Put a folder on the hub as the newest of some branches or tags."""
        sha = hashlib.sha1(str(folder).encode()).hexdigest()
        self.commits[name, sha] = folder
        self.revisions |= {(name, revision): sha for revision in revisions}
        return sha

    def find(self, name: str, revision: str) -> tuple[str, Path] | None:
        """Commit and folder."""
        sha = self.revisions.get((name, revision), revision)
        return (sha, self.commits[name, sha]) if (name, sha) in self.commits else None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that huggingface_hub of this process asks, with an empty cache."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)

    def stop() -> None:
        server.shutdown()
        server.server_close()

    server.hub = Hub(f"http://127.0.0.1:{server.server_port}", stop)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    # What HF_ENDPOINT and HF_HOME set, which are looked at when the library is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.hub.url)
    template = f"{server.hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server.hub
    stop()


class Answers(BaseHTTPRequestHandler):
    """/api/datasets/OWNER/NAME[/revision/REVISION | /tree/REVISION], /datasets/OWNER/NAME/resolve/REVISION/FILE."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        kind, name, what, rest = re.fullmatch(r"/(?:(api)/)?datasets/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path).groups()
        revision, _, file = (rest or "main").partition("/") if what == "resolve" else (rest or "main", "", "")
        found = self.server.hub.find(name, revision)
        if found is None:
            known = any(known == name for known, _ in self.server.hub.commits)
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        elif kind is None:
            self.send_file(found[0], found[1] / file)
        else:
            files = sorted(file for file in found[1].rglob("*") if file.is_file())
            self.answer(200, json.dumps(self.describe_step(name, *found, files, tree=what == "tree")).encode())

    do_HEAD = do_GET

    def describe_step(self, name: str, sha: str, folder: Path, files: list[Path], tree: bool) -> dict | list[dict]:
        names = [file.relative_to(folder).as_posix() for file in files]
        if not tree:
            return {"id": name, "sha": sha, "siblings": [{"rfilename": name} for name in names]}
        return [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": oid(file)}
            for name, file in zip(names, files, strict=True)
        ]

    def send_file(self, sha: str, file: Path) -> None:
        if self.command == "GET":
            self.server.hub.fetched.append(file.name)
        self.answer(200, file.read_bytes(), {"ETag": f'"{oid(file)}"', "X-Repo-Commit": sha})

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


def oid(file: Path) -> str:
    """As git names a file's content."""
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
