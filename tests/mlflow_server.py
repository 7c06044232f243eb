"""`mlflow server` on a store, and waiting for what is told to one."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager


class MlflowServer:
    """A server that can be started and stopped again, by its own handle."""

    def __init__(self, store, port, folder):
        self.command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
        self.command += ["--host", "127.0.0.1", "--port", str(port), "--artifacts-destination", str(folder / "files")]
        self.log, self.uri = folder / "server.log", f"http://127.0.0.1:{port}"

    def __enter__(self):
        with open(self.log, "a") as log:
            # Its runner of background jobs starts five more processes, and nothing here needs it.
            env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self.process = subprocess.Popen(self.command, env=env, stdout=log, stderr=log, start_new_session=True)
        return self

    def __exit__(self, *error):
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait(self):
        """Until it answers."""
        wait_until(lambda: is_healthy(self.uri))


def is_healthy(uri):
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5) as answer:
            return answer.read() == b"OK"
    except OSError:
        return False


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def wait_until(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def close_delivered(tracker):
    """Close a tracker when MLflow was told everything: a busy machine may take longer than a command waits."""
    wait_until(lambda: not tracker._journal.undelivered)
    tracker.close()


@contextmanager
def answering(status, body):
    """A server that answers every request alike, such as a proxy before MLflow that asks for a password."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(answer["status"])
            self.send_header("content-length", str(len(answer["body"])))
            self.end_headers()
            self.wfile.write(answer["body"])

        do_POST = do_GET

        def log_message(self, *arguments): ...

    answer = {"status": status, "body": body}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", answer
    finally:
        server.shutdown()
        server.server_close()
