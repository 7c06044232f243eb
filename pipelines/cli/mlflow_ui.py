"""The MLflow UI on the store in use: found where it runs already, else started."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.console import say
from pipelines.tracking.lookup import connected_client
from pipelines.tracking.store import check_tracking

HOST = "127.0.0.1"
PORTS = 10
"""How many are looked at, from the one asked for on."""
START_SECONDS = 180.0
END_SECONDS = 15.0


def serve_ui(uri: str, port: int) -> None:
    """Print the address of the UI on a store; where none runs start one, which ends with this process.

    Looked for at `port` and those after it. A tracking server is its own UI. Raises ConnectionError if that or what
    was started does not answer, ValueError if all ports are taken by others.
    """
    if uri.startswith("http"):
        say("ui", f"{uri} is the UI of its own store: {check_tracking(uri)}")
        return
    check_tracking(uri)  # which makes a database, where there is none, as every stage does
    ports = range(port, port + PORTS)
    free = [each for each in ports if _is_free(each)]
    if found := next((each for each in ports if each not in free and _serves(each, uri)), None):
        say("ui", f"{_address(found)} on {uri}, which runs already")
        return
    if free:
        with _server(uri, free[0]) as server:
            say("ui", f"{_address(free[0])} on {uri}; Ctrl-C stops it")
            # Not wait(): polars, where installed, lets the system restart what Ctrl-C ends.
            while server.poll() is None:
                time.sleep(0.5)
        raise ConnectionError(f"the UI at {_address(free[0])} has ended by itself, with code {server.returncode}")
    raise ValueError(
        f"ports {port} to {port + PORTS - 1}: found other programs on all of them, expected a free one or the UI on "
        f"{uri}. Choose others by --port"
    )


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
    """Whether an MLflow server answers there."""
    try:
        with urllib.request.urlopen(f"{_address(port)}/health", timeout=5) as answer:
            return answer.read() == b"OK"
    except (OSError, ValueError):  # nobody, or somebody who speaks otherwise
        return False


def _serves(port: int, uri: str) -> bool:
    """Whether an MLflow server there has this very store: its experiments, made at the same milliseconds."""
    if not _is_healthy(port):
        return False
    try:
        return _experiments(_address(port)) == _experiments(uri)
    except (FileNotFoundError, ConnectionError):
        return False


def _experiments(uri: str) -> set[tuple]:
    with connected_client(uri) as client:
        found = client.search_experiments()
    return {(each.experiment_id, each.name, each.creation_time, each.artifact_location) for each in found}


@contextmanager
def _server(uri: str, port: int) -> Iterator[subprocess.Popen]:
    """`mlflow ui`, once it answers; it and what it starts are ended with the block, also by SIGTERM and SIGHUP."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", HOST, "--port", str(port)]
    # One user, one process; of MLflow's runner of background jobs, five more, nothing here makes use.
    command += ["--workers", "1", "--uvicorn-opts", "--log-level warning"]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    server = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_healthy(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ConnectionError(f"`mlflow ui` on {uri} did not come up at {_address(port)}; see what it printed")
            time.sleep(0.2)
        yield server
    finally:
        _end(server)


def _stop(number: int, frame) -> None:
    raise KeyboardInterrupt


def _end(server: subprocess.Popen) -> None:
    """End the whole group: MLflow's command starts the server as a process of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(END_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return
