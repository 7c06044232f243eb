"""Object stores on this machine: moto for s3://, whole or throttled, and just enough of Google's for gs://."""

import json
import os
import random
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Throttle:
    """Moto's application, a share of whose requests is refused as S3 does when there are too many of them."""

    def __init__(self, app):
        self.app, self.share, self.count, self.refused = app, 0.0, 0, 0
        self.random, self.lock = random.Random(0), threading.Lock()

    def __call__(self, environ, start_response):
        with self.lock:
            self.count += 1
            refuse = self.random.random() < self.share
            self.refused += refuse
        if not refuse:
            return self.app(environ, start_response)
        if length := environ.get("CONTENT_LENGTH"):
            environ["wsgi.input"].read(int(length))
        elif environ.get("wsgi.input_terminated"):  # the server knows where a body in chunks ends
            environ["wsgi.input"].read()
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response("503 Slow Down", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


@pytest.fixture(scope="session")
def s3_app():
    moto = pytest.importorskip("moto.server")
    return Throttle(moto.DomainDispatcherApplication(moto.create_backend_app))


@pytest.fixture(scope="session")
def s3_server(s3_app):
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *args):
            pass

    server = make_server("127.0.0.1", 0, s3_app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def access(server: str) -> dict[str, str]:
    """What a process has in its environment to use the server."""
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture
def s3_bucket(s3_server, tmp_path, monkeypatch):
    """URI of an empty bucket, which the environment gives access to."""
    for name, value in access(s3_server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    import boto3

    name = "raydit-" + os.urandom(4).hex()
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def throttled(s3_app):
    """The server's throttle; off again afterwards."""
    s3_app.refused = 0
    yield s3_app
    s3_app.share = 0.0


@pytest.fixture
def gs_bucket(tmp_path):
    """A folder, and a function from a path in it to a gs:// URI. Its own process: pyarrow waits with the GIL held."""
    folder = tmp_path / "gs"
    (folder / "bucket").mkdir(parents=True)
    command = [sys.executable, __file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        host = urllib.parse.quote(f"127.0.0.1:{int(server.stdout.readline())}", safe="")
        query = f"scheme=http&endpoint_override={host}&retry_limit_seconds=5"
        yield folder / "bucket", lambda path: f"gs://anonymous@bucket/{path}?{query}"
        server.kill()


class GoogleStorage(BaseHTTPRequestHandler):
    """Lists, describes, reads, writes, copies and deletes the objects of a bucket, which are files on disk."""

    root: Path

    def do_GET(self) -> None:
        url, query = self._parse()
        _, _, name = url.path.partition("/b/bucket/o")
        if not name:
            self._list(query.get("prefix", ""), query.get("delimiter"))
        elif (file := self._existing(name)) and query.get("alt") == "media":
            self._read(file)
        elif file:
            self._answer(200, json.dumps(self._describe(file)).encode())

    def do_DELETE(self) -> None:
        if file := self._existing(self._parse()[0].path.partition("/b/bucket/o")[2]):
            file.unlink()
            self._answer(204, b"")

    def do_POST(self) -> None:
        """Begin an upload, to which the client then puts the content; or copy an object."""
        url, query = self._parse()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "uploadType" in query:
            target = f"http://{self.headers['Host']}/upload/b/bucket/o/{urllib.parse.quote(query['name'])}"
            return self._answer(200, b"", {"Location": target})
        source, _, target = url.path.partition("/b/bucket/o")[2].partition("/rewriteTo/b/bucket/o")
        if file := self._existing(source):
            described = self._write(target, file.read_bytes())
            sizes = dict.fromkeys(("totalBytesRewritten", "objectSize"), described["size"])
            answer = {"kind": "storage#rewriteResponse", "done": True, **sizes, "resource": described}
            self._answer(200, json.dumps(answer).encode())

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        described = self._write(self._parse()[0].path.partition("/b/bucket/o")[2], data)
        self._answer(200, json.dumps(described).encode())

    def _parse(self) -> tuple[urllib.parse.SplitResult, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        return url, dict(urllib.parse.parse_qsl(url.query))

    def _existing(self, name: str) -> Path | None:
        """Return the file of an object; None, after an answer that says so, if there is none."""
        key = urllib.parse.unquote(name[1:])
        file = self.root / "bucket" / key
        if file.is_file() and not key.endswith("/"):
            return file
        self._answer(404, b'{"error": {"code": 404, "message": "not found"}}')
        return None

    def _write(self, name: str, data: bytes) -> dict:
        file = self.root / "bucket" / urllib.parse.unquote(name[1:])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return self._describe(file)

    def _list(self, prefix: str, delimiter: str | None) -> None:
        files = sorted(file for file in (self.root / "bucket").rglob("*") if file.is_file())
        items = [item for item in map(self._describe, files) if item["name"].startswith(prefix)]
        if delimiter:  # the rest would be named as prefixes, which pyarrow does not look at
            items = [item for item in items if delimiter not in item["name"][len(prefix) :]]
        self._answer(200, json.dumps({"kind": "storage#objects", "items": items}).encode())

    def _describe(self, file: Path) -> dict:
        name = file.relative_to(self.root / "bucket").as_posix()
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00Z")
        numbers = {"size": str(file.stat().st_size), "generation": "1", "metageneration": "1"}
        return {"kind": "storage#object", "name": name, "bucket": "bucket", **times, **numbers}

    def _read(self, file: Path) -> None:
        data = file.read_bytes()
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data)) if last else len(data)
            place = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            self._answer(206, data[start:stop], place)
        else:
            self._answer(200, data)

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "x-goog-generation": "1", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


if __name__ == "__main__":
    GoogleStorage.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), GoogleStorage)
    print(server.server_port, flush=True)
    server.serve_forever()
