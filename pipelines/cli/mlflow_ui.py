"""The MLflow UI on the tracking store in use: found if it already runs, else started."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.cli.options import LAST_PORT
from pipelines.console import say
from pipelines.tracking.experiment_page import landing_page
from pipelines.tracking.lookup import connected_client
from pipelines.tracking.moved_store import earlier_folders
from pipelines.tracking.store import check_tracking, gets_credentials
from raydit.errors import InvalidInput, RayditError, Unreachable

HOST = "127.0.0.1"
NUM_PORTS = 10
"""Number of ports to try, from the given one on."""
START_SECONDS = 180.0
END_SECONDS = 2.0


def serve_ui(uri: str, port: int) -> None:
    """Print the address of the MLflow UI on a tracking store; start the UI if it does not run, and wait for its end.

    Tries `port` and the ports after it. A tracking server is its own UI. Raises Unreachable if the server or the
    started UI does not answer, and InvalidInput if other programs use all ports.
    """
    if uri.startswith("http"):
        say("ui", f"{_landing_address(uri)}: the UI of the server in use, {check_tracking(uri)}")
        return
    check_tracking(uri)  # creates a database that does not exist, as every stage does
    if folders := earlier_folders(uri):
        say(
            "ui",
            f"artifacts are looked for in {folders[0]}, where they were before the move; `raydit runs relocate` "
            "corrects this",
        )
    ports = range(port, min(port + NUM_PORTS, LAST_PORT + 1))
    free = [each for each in ports if _is_free(each)]
    if found := next((each for each in ports if each not in free and _serves(each, uri)), None):
        say("ui", f"{_landing_address(_address(found), uri)} on {uri} (already running)")
        return
    if not free:
        raise InvalidInput(
            f"ports {port} to {ports[-1]}: found other programs on all of them",
            f"a free port, or the UI on {uri}",
            "choose other ports with --port",
        )
    with _run_server(uri, free[0]) as server:
        say("ui", f"{_landing_address(_address(free[0]), uri)} on {uri}; Ctrl-C stops it")
        # Not wait(): polars, where installed, lets the system restart calls that Ctrl-C interrupts.
        while server.poll() is None:
            time.sleep(0.5)
    raise Unreachable(
        f"the UI at {_address(free[0])} ended with exit code {server.returncode}", "", "see its output above"
    )


def _landing_address(address: str, uri: str = "") -> str:
    """Return the address of the UI's page with the newest trainings. uri: of the store; empty: the address."""
    with connected_client(uri or address) as client:
        return f"{address.rstrip('/')}{landing_page(client)}"


def _address(port: int) -> str:
    return f"http://{HOST}:{port}"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _is_healthy(port: int) -> bool:
    """Whether an MLflow server answers at a port."""
    try:
        with urllib.request.urlopen(f"{_address(port)}/health", timeout=5) as answer:
            return answer.read() == b"OK"
    except (OSError, ValueError):  # no answer, or one in another protocol
        return False


def _serves(port: int, uri: str) -> bool:
    """Whether an MLflow server at a port has this store: one whose experiments were created at the same times.

    A server that would get the user's credentials for another one is not asked, and counts as another store's.
    """
    if gets_credentials(_address(port)) or not _is_healthy(port):
        return False
    try:
        return _experiments(_address(port)) == _experiments(uri)
    except RayditError:
        return False


def _experiments(uri: str) -> set[tuple[str, str, int, str]]:
    with connected_client(uri) as client:
        found = client.search_experiments()
    return {(each.experiment_id, each.name, each.creation_time, each.artifact_location) for each in found}


@contextmanager
def _run_server(uri: str, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `mlflow ui` until the end of the block; yields once it answers."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", HOST, "--port", str(port)]
    # One user needs one worker process, and nothing here uses MLflow's job runner, which starts five more.
    command += ["--workers", "1", "--uvicorn-opts", "--log-level warning"]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_healthy(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise Unreachable(
                    f"`mlflow ui` on {uri} did not start at {_address(port)}", "", "see its output above for the reason"
                )
            time.sleep(0.2)
        yield server
    finally:
        _end(server)


def _end(server: "subprocess.Popen[bytes]") -> None:
    """End the server's process group: MLflow's command runs the server in a process of its own.

    A server that holds nothing but requests need not end by itself, and on SIGTERM uvicorn may wait for long.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(END_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return
