"""Submit raydit commands as Ray jobs, follow their logs, stop them.

All of it goes over HTTP to the job server of the head node (the dashboard, port 8265). The token is taken
where Ray takes it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.
"""

import asyncio
import ipaddress
import json
import logging
import os
import shlex
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cluster.credentials import refuse_credentials

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

logger = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
RAYDIT = ("-m", "pipelines.cli")
INTERRUPTED = 130  # exit code of a stopped job

# Ray runs an entrypoint with the PATH that `ray start` had, where `python` may be another one (or none) when
# the cluster's environment was not activated. The raylet, the parent of the job supervisor that runs our
# shell, has the interpreter of all workers on its command line.
CLUSTER_PYTHON = (
    "$(grep -aoP '(?<=--python_worker_command=)[^ ]+' "
    "/proc/$(awk '/^PPid/{print $2}' /proc/$PPID/status)/cmdline || echo python)"
)
# Ray's own way is SIGTERM, on which a driver that runs Ray dies without leaving its `with` blocks, and three
# seconds later SIGKILL: no way to close a tracking run.
STOP_LIKE_CTRL_C = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "20"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submitted job, as the job server describes it."""

    submission_id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    command: str
    """The raydit command; for a job submitted by other means its entrypoint."""
    started: str | None
    """ISO 8601, UTC."""
    exit_code: int | None
    """None until the job has ended."""
    message: str
    metadata: dict[str, str]

    @property
    def has_ended(self) -> bool:
        return self.exit_code is not None


def submit(
    command: Sequence[str],
    *,
    address: str | None = None,
    submission_id: str | None = None,
    env: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
    working_dir: str | None = None,
    pip: Sequence[str] = (),
    program: Sequence[str] = RAYDIT,
) -> str:
    """Start a raydit command on a cluster and return its submission id.

    command: arguments of raydit, for example ["train", "recipe.toml"]. program: what Python runs with them.
    submission_id: a job of this id that is still running is joined, not started twice; one that has ended
    raises ValueError. working_dir: a local folder or zip file to upload, or a URI; else raydit must be installed
    there. pip: requirements that each node installs first; it needs virtualenv and a package index.
    Raises ValueError for a refused token, another Ray version or credentials in what anybody could read,
    ConnectionError when nobody answers.
    """
    settings = {"the command": shlex.join(command), **(env or {}), **(metadata or {})}
    refuse_credentials(settings)
    client = _client(address)
    earlier = _find(client, submission_id) if submission_id else None
    if earlier and earlier.has_ended:
        raise ValueError(
            f"job {submission_id} has already ended ({earlier.status}), expected a new submission id; choose "
            f"another one, or read its log: raydit jobs logs {submission_id}"
        )
    if earlier:
        logger.info("job %s is %s already; joining it", submission_id, earlier.status)
        return earlier.submission_id
    runtime_env: dict[str, object] = {"env_vars": STOP_LIKE_CTRL_C | (env or {})}
    if working_dir:
        runtime_env["working_dir"] = working_dir
    if pip:
        runtime_env["pip"] = {"packages": list(pip), "pip_check": False}
    python = "python" if pip else CLUSTER_PYTHON  # Ray activates the environment that it makes for pip
    try:
        return client.submit_job(
            entrypoint=f"exec {python} {shlex.join([*program, *command])}",
            submission_id=submission_id,
            metadata={"raydit.command": shlex.join(command)} | (metadata or {}),
            runtime_env=runtime_env,
        )
    except RuntimeError:
        if submission_id and _find(client, submission_id):  # somebody else was a moment faster
            return submission_id
        raise


def follow(submission_id: str, address: str | None = None, write: Callable[[str], object] = print) -> int:
    """Pass on the log of a job line by line until it ends, and return its exit code.

    A lost connection is taken up again where it broke. 130 means stopped.
    """
    job, num_seen, complete = status(submission_id, address), 0, False
    while not (complete and job.has_ended):
        num_seen, complete = asyncio.run(_tail(_client(address), submission_id, write, skip=num_seen))
        job = status(submission_id, address)
        if not complete:
            logger.info("the log of %s broke off after %d characters; looking again", submission_id, num_seen)
            time.sleep(1)
    if job.exit_code not in (0, INTERRUPTED):
        reason = job.message.partition("\n")[0]
        write(f"job {submission_id} {job.status}, exit code {job.exit_code}: {reason}")
    return cast(int, job.exit_code)


async def _tail(
    client: "JobSubmissionClient", submission_id: str, write: Callable[[str], object], skip: int
) -> tuple[int, bool]:
    """Write the log from its skip-th character on; return how many there were and whether it is complete."""
    import aiohttp

    num_seen, line, complete = 0, "", True
    try:
        async for text in client.tail_job_logs(submission_id):
            *lines, line = (line + text[max(0, skip - num_seen) :]).split("\n")
            num_seen += len(text)
            for whole in lines:
                write(whole)
    except (RuntimeError, aiohttp.ClientError):
        complete = False
    if line:
        write(line)
    return max(num_seen, skip), complete


def status(submission_id: str, address: str | None = None) -> Job:
    """The job of this id; ValueError if there is none."""
    return _get(_client(address), submission_id)


def log(submission_id: str, address: str | None = None) -> str:
    """All that a job has printed so far."""
    client = _client(address)
    _get(client, submission_id)
    return client.get_job_logs(submission_id)


def list_jobs(address: str | None = None) -> list[Job]:
    """All submitted jobs, oldest first."""
    found = [_job(details) for details in _client(address).list_jobs() if details.submission_id]
    return sorted(found, key=lambda job: job.started or "")


def stop(submission_id: str, address: str | None = None) -> bool:
    """Ask a job to end as Ctrl-C does, and kill it after 20 seconds; False if it had ended already."""
    client = _client(address)
    _get(client, submission_id)
    return client.stop_job(submission_id)


def current_job_id() -> str | None:
    """Submission id of the job that this process runs in, if it does."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return job.get("job_submission_id")


def check_server(address: str | None = None) -> str:
    """Return the Ray version of a job server, or raise one clear line if it cannot be used."""
    url = server_url(address)
    request = urllib.request.Request(f"{url}/api/version", headers=_token_header())
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            version = json.load(response)["ray_version"]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            found = "no token" if error.code == 401 else "another token"
            raise ValueError(
                f"the job server at {url} found {found} (HTTP {error.code}), expected its own; "
                "set RAY_AUTH_TOKEN to it, or RAY_AUTH_TOKEN_PATH to a file that holds it"
            ) from None
        raise ValueError(
            f"{url} answered HTTP {error.code}, expected a Ray job server; check the port (8265 by default)"
        ) from None
    except (ValueError, KeyError):
        raise ValueError(f"{url} is not a Ray job server; check the port (8265 by default)") from None
    except OSError as error:
        raise ConnectionError(
            f"no job server answers at {url} ({getattr(error, 'reason', error)}), expected the dashboard "
            "of a Ray head; start one with `ray start --head`, or forward its port 8265 to this machine"
        ) from None
    return version


def _client(address: str | None) -> "JobSubmissionClient":
    import ray
    from ray.job_submission import JobSubmissionClient

    version = check_server(address)
    if version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise ValueError(
            f"the cluster at {server_url(address)} runs Ray {version}, expected {ray.__version__} as here; "
            f'install the same on both sides, here: pip install "ray[default]=={version}"'
        )
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)  # else a line per ignored file and closed connection
    url = server_url(address)
    # Ray lets these two override the address it is given
    hidden = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    try:
        return JobSubmissionClient(url, headers=_token_header())
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


def is_open(address: str | None = None) -> bool:
    """Whether a job server takes jobs from anybody, without a token."""
    request = urllib.request.Request(f"{server_url(address)}/api/jobs/")
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except urllib.error.HTTPError:
        return False


def clock_skew_seconds(address: str | None = None) -> float:
    """How far the clock of a job server is off, to a second: the way of the question and the answer is not counted."""
    request = urllib.request.Request(f"{server_url(address)}/api/version", headers=_token_header())
    before = time.time()
    with urllib.request.urlopen(request, timeout=10) as response:
        theirs = parsedate_to_datetime(response.headers["Date"]).timestamp()
    return max(theirs - time.time(), before - theirs - 1.0, 0.0)


def is_this_machine(address: str | None) -> bool:
    """Whether a job server answers at a loopback address, from where a job sees the same files."""
    host = urllib.parse.urlsplit(server_url(address)).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def server_url(address: str | None) -> str:
    """The job server's address: the given one, RAY_API_SERVER_ADDRESS, or port 8265 here. ValueError if it is none."""
    url = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f"found the job server address {url!r}, expected http://HOST:PORT of the head's dashboard, "
            f"for example {DEFAULT_ADDRESS}"
        )
    return url.rstrip("/")


def _token_header() -> dict[str, str]:
    """The Authorization header, from the same places and in the same order as Ray's own tools."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        token = file.read_text() if file.is_file() else ""
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def _get(client: "JobSubmissionClient", submission_id: str) -> Job:
    job = _find(client, submission_id)
    if job is None:
        raise ValueError(
            f"found no job {submission_id} at {client.get_address()}; see which there are: raydit jobs list"
        )
    return job


def _find(client: "JobSubmissionClient", submission_id: str) -> Job | None:
    try:
        return _job(client.get_job_info(submission_id))
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise


def _job(details: "JobDetails") -> Job:
    exit_code = details.driver_exit_code
    if exit_code is None:  # Ray knows none for a job that was stopped or whose driver never started
        exit_code = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": INTERRUPTED}.get(details.status)
    started = datetime.fromtimestamp(details.start_time / 1000, UTC) if details.start_time else None
    return Job(
        submission_id=details.submission_id or "",
        status=str(details.status),
        command=(details.metadata or {}).get("raydit.command", details.entrypoint),
        started=started.isoformat(timespec="seconds") if started else None,
        exit_code=exit_code,
        message=details.message or "",
        metadata=details.metadata or {},
    )
