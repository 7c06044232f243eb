"""A Ray head with a job server and token authentication, for the tests that submit jobs.

from ray_head import ray_head  # noqa: F401  in the conftest.py of a test folder
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from processes import kill_tree

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "0123456789abcdef" * 4


@dataclass(frozen=True)
class RayHead:
    """address: of the job server. token: what it accepts. env: variables with which clients find both.

    folder: with the logs of the head and of its jobs. pid: of its process. ray_address: where drivers join.
    """

    address: str
    token: str
    env: dict[str, str]
    folder: str
    pid: int
    ray_address: str

    def kill(self) -> None:
        """As when its machine is lost: SIGKILL of all that it has started, jobs and workers too."""
        kill_tree(self.pid)


@pytest.fixture(scope="session")
def ray_head(workers) -> Iterator[RayHead]:
    """One head for the whole test session: the first worker starts it, and stops it when no other uses it."""
    if not workers.is_first:
        yield RayHead(**json.loads(workers.wait_for("head.json", seconds=120)))
        return
    with started_head() as head:
        workers.publish("head.json", json.dumps(asdict(head)))
        yield head
        workers.wait_until_others_have_ended()


@contextmanager
def started_head(*, environment: Path | None = None, **variables: str) -> Iterator[RayHead]:
    """A head started as a user would, its environment not activated.

    environment: folder of a virtual environment without raydit; None: the one of the tests, with this checkout.
    variables: further ones of its process environment.
    """
    with tempfile.TemporaryDirectory(prefix="rayhead", dir="/tmp") as folder:  # short: sockets have 107 bytes
        gcs_port, dashboard_port, agent_port, client_port = _free_ports(4)
        address = f"http://127.0.0.1:{dashboard_port}"
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        command = [
            str((environment / "bin" if environment else Path(sys.executable).parent) / "ray"),
            "start",
            "--head",
            "--block",
            "--disable-usage-stats",
        ]
        command += [f"--port={gcs_port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
        command += [f"--dashboard-agent-listen-port={agent_port}", f"--ray-client-server-port={client_port}"]
        command += ["--num-cpus=4", f"--object-store-memory={100 * 2**20}", f"--temp-dir={folder}"]
        head_env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        head_env |= auth | {"PATH": "/usr/bin:/bin"} | variables
        if environment:
            head_env.pop("PYTHONPATH", None)
        else:  # jobs start elsewhere: there this checkout is found whether or not it is the one that is installed
            head_env["PYTHONPATH"] = str(ROOT)
        with open(Path(folder) / "head.log", "w") as log:
            head = subprocess.Popen(
                command,
                env=head_env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        try:
            _wait_until_it_answers(address, head, Path(folder) / "head.log")
            env = auth | {"RAY_API_SERVER_ADDRESS": address}
            yield RayHead(address, TOKEN, env, folder, head.pid, f"127.0.0.1:{gcs_port}")
        finally:
            _stop(head)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_until_it_answers(address: str, head: subprocess.Popen, log: Path) -> None:
    """Wait for the list of jobs: it needs the dashboard and the agent on the node."""
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    for _ in range(240):
        if head.poll() is not None:
            break
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    raise RuntimeError(f"the Ray head did not start:\n{log.read_text()}")


def _die_with_parent() -> None:
    """Have Linux send SIGTERM when the test run is killed, so that no head outlives it."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _stop(head: subprocess.Popen) -> None:
    """Kill the head and all that it has started. After SIGTERM, `ray start --block` takes five seconds and more."""
    kill_tree(head.pid)
    with suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)  # what a head that ended by itself has left
    head.wait()
