"""Submit raydit commands as Ray jobs, follow their logs, list and stop them; over HTTP (see job_server)."""

import asyncio
import functools
import json
import logging
import os
import shlex
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

from cluster.credentials import refuse_credentials
from cluster.job_server import explains_failed_requests, server_url, server_version, token_header
from raydit.errors import InvalidInput

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

logger = logging.getLogger(__name__)

RAYDIT = ("-m", "pipelines.cli")
"""Arguments with which Python runs the raydit command."""
INTERRUPTED = 130
"""Exit code of a stopped job."""
MISSING_MODULE = f"No module named '{RAYDIT[1].partition('.')[0]}'"
"""What Python prints in a job on a cluster where raydit is not installed."""
INSTALL_SECONDS = 3600
"""Time for a node to install requirements, of some gigabytes; Ray's default is ten minutes."""
READY_SECONDS = 30
"""Time that a head may take from answering requests to running jobs."""
SILENCE_SECONDS = 300.0
"""Time without a line after which a log is read again: nothing else shows that a connection has died quietly."""
LAST_LINES = 20
"""Lines at the end of a log in which the reason for a failure is looked for."""

# Ray runs an entrypoint with the PATH that `ray start` had. If the cluster's environment was not activated, `python`
# may be another interpreter there, or missing. The raylet, which is the parent of the job supervisor that runs our
# shell, has the interpreter of all workers on its command line.
CLUSTER_PYTHON = (
    "$(grep -aoP '(?<=--python_worker_command=)[^ ]+' "
    "/proc/$(awk '/^PPid/{print $2}' /proc/$PPID/status)/cmdline || echo python)"
)
# By default Ray kills a job three seconds after the signal. A training first writes a checkpoint, which may take 15
# seconds, and then closes its tracking run.
STOP_LIKE_CTRL_C = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "40"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A submitted job, as the job server describes it."""

    submission_id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    command: str
    """The raydit command, or the entrypoint of a job that was not submitted by raydit."""
    started: str | None
    """ISO 8601, UTC."""
    exit_code: int | None
    """As in a shell: 128 plus the number of the signal that killed the driver. None until the job has ended."""
    message: str
    metadata: dict[str, str]

    @property
    def has_ended(self) -> bool:
        return self.exit_code is not None


@explains_failed_requests
def submit(
    command: Sequence[str],
    *,
    address: str | None = None,
    submission_id: str | None = None,
    env: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
    working_dir: str | None = None,
    pip: Sequence[str] = (),
    folder: str = "",
    program: Sequence[str] = RAYDIT,
) -> str:
    """Start a raydit command on a cluster and return its submission id.

    command: arguments of raydit, for example ["train", "recipe.toml"]. program: arguments of Python that run them.
    submission_id: if a job with this id is still running, it is joined and no second one is started. working_dir: a
    local folder or zip file to upload, or a URI; without it raydit must be installed on the cluster. pip: requirements
    that each node installs first, for which it needs virtualenv and a package index. folder: the job's working
    directory, for a job on this machine; without it, Ray chooses one.
    Raises InvalidInput for a refused token, another Ray version, a credential in settings that all users of the job
    server can read, and the id of a job that has ended; Unreachable if the job server does not answer.
    """
    settings = {"the command": shlex.join(command), **(env or {}), **(metadata or {})}
    refuse_credentials(settings)
    client = _client(address)
    earlier = _find(client, submission_id) if submission_id else None
    if earlier and earlier.has_ended:
        raise InvalidInput(
            f"job {submission_id} has already ended ({earlier.status})",
            "a new submission id",
            f"choose another id, or read the job's log: raydit jobs logs {submission_id}",
        )
    if earlier:
        logger.info("job %s is %s already; joining it", submission_id, earlier.status)
        return earlier.submission_id
    runtime_env: dict[str, object] = {"env_vars": STOP_LIKE_CTRL_C | (env or {})}
    if working_dir:
        runtime_env["working_dir"] = working_dir
    if pip:
        runtime_env["pip"] = {"packages": list(pip), "pip_check": False}
        runtime_env["config"] = {"setup_timeout_seconds": INSTALL_SECONDS}
    python = "python" if pip else CLUSTER_PYTHON  # Ray activates the environment that it creates for pip
    send = functools.partial(
        client.submit_job,
        entrypoint=entrypoint(python, [*program, *command], folder),
        submission_id=submission_id,
        metadata={"raydit.command": shlex.join(command)} | (metadata or {}),
        runtime_env=runtime_env,
    )
    try:
        return _when_ready(send)
    except RuntimeError:
        if submission_id and _find(client, submission_id):  # submitted by another process in the meantime
            return submission_id
        raise


def entrypoint(python: str, arguments: Sequence[str], folder: str) -> str:
    """Return the shell command that runs a job's Python, in a folder if one is given."""
    if not folder:
        return f"exec {python} {shlex.join(arguments)}"
    missing = f"raydit: the job finds no folder {folder}; through a forwarded port, submit with --pack"
    enter = f"cd {shlex.quote(folder)} || {{ echo {shlex.quote(missing)}; exit 2; }}"
    return f"{enter}; exec {python} -P {shlex.join(arguments)}"  # as the raydit command, -P imports nothing from there


def _when_ready(send: Callable[[], str]) -> str:
    """Send a job, again after a second while a head that has just started has no agent to run it."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            return send()
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1)


def follow(submission_id: str, address: str | None = None, write: Callable[[str], object] = print) -> int:
    """Pass each line of a job's log to `write` until the job ends, and return its exit code; 130 if it was stopped.

    After a lost connection the log continues where it broke off. Raises InvalidInput for an unknown job.
    """
    job, num_seen, complete = get_job(submission_id, address), 0, False
    last_lines: deque[str] = deque(maxlen=LAST_LINES)

    def write_and_keep(line: str) -> None:
        last_lines.append(line)
        write(line)

    while not (complete and job.has_ended):
        num_seen, complete = asyncio.run(_tail(_client(address), submission_id, write_and_keep, skip=num_seen))
        job = get_job(submission_id, address)
        if not complete:
            logger.info("the log of %s broke off after %d characters; reading it again", submission_id, num_seen)
            time.sleep(1)
    if job.exit_code not in (0, INTERRUPTED):
        reason = failure_reason(job, list(last_lines))
        write(f"job {submission_id} {job.status}, exit code {job.exit_code}: {reason}")
    return cast(int, job.exit_code)


def failure_reason(job: Job, log: Sequence[str]) -> str:
    """Return in one line why a job failed. log: its last lines."""
    if any(MISSING_MODULE in line for line in log):
        return (
            "raydit is not installed on the cluster. Submit with --pip, which sends it and installs what it needs, or "
            "start the cluster from an environment or image that has it"
        )
    number = (job.exit_code or 0) - 128
    if number in set(signal.Signals):
        memory = ", which Linux sends when memory runs out" if number == signal.SIGKILL else ""
        return f"its driver was killed by {signal.Signals(number).name}{memory}"
    # Ray appends the end of the log to its message, which says nothing else then.
    message, _, logs = job.message.partition(", last available logs")
    last_line = next((line.strip() for line in reversed(log) if line.strip()), "") if logs else ""
    return last_line or message.partition("\n")[0]


async def _tail(
    client: "JobSubmissionClient", submission_id: str, write: Callable[[str], object], skip: int
) -> tuple[int, bool]:
    """Write the log without its first `skip` characters; return its length so far and whether it is complete."""
    import aiohttp

    num_seen, line, complete = 0, "", True
    try:
        async with asyncio.timeout(SILENCE_SECONDS) as silence:
            async for text in client.tail_job_logs(submission_id):
                silence.reschedule(asyncio.get_running_loop().time() + SILENCE_SECONDS)
                *lines, line = (line + text[max(0, skip - num_seen) :]).split("\n")
                num_seen += len(text)
                for complete_line in lines:
                    write(complete_line)
    except (RuntimeError, aiohttp.ClientError, TimeoutError):
        complete = False
    if line:
        write(line)
    return max(num_seen, skip), complete


@explains_failed_requests
def get_job(submission_id: str, address: str | None = None) -> Job:
    """Return the job with this id. Raises InvalidInput if there is none."""
    return _get(_client(address), submission_id)


@explains_failed_requests
def read_log(submission_id: str, address: str | None = None) -> str:
    """Return everything that a job has printed so far. Raises InvalidInput if there is none."""
    client = _client(address)
    _get(client, submission_id)
    return client.get_job_logs(submission_id)


@explains_failed_requests
def list_jobs(address: str | None = None) -> list[Job]:
    """Return all submitted jobs, oldest first."""
    found = [_describe(details) for details in _client(address).list_jobs() if details.submission_id]
    return sorted(found, key=lambda job: job.started or "")


@explains_failed_requests
def stop(submission_id: str, address: str | None = None) -> bool:
    """Interrupt a job as Ctrl-C does, and kill it after 40 seconds; return False if it had ended already.

    Raises InvalidInput if there is none.
    """
    client = _client(address)
    _get(client, submission_id)
    return client.stop_job(submission_id)


def current_job_id() -> str | None:
    """Return the submission id of the job in which this process runs; None outside of a job."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return job.get("job_submission_id")


def _client(address: str | None) -> "JobSubmissionClient":
    import ray
    from ray.job_submission import JobSubmissionClient

    url, version = server_url(address), server_version(address)
    if version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise InvalidInput(
            f"the cluster at {url} runs Ray {version}",
            f"{ray.__version__} as on this machine",
            f'install the same version on both, here with: pip install "ray[default]=={version}"',
        )
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line for each ignored file otherwise
    # Ray lets these two variables override the address that it is given
    hidden = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    try:
        return JobSubmissionClient(url, headers=token_header())
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


def _get(client: "JobSubmissionClient", submission_id: str) -> Job:
    job = _find(client, submission_id)
    if job is None:
        address = client.get_address()
        raise InvalidInput(f"no job {submission_id} at {address}", "the id of a job", "list the jobs: raydit jobs list")
    return job


def _find(client: "JobSubmissionClient", submission_id: str) -> Job | None:
    try:
        return _describe(client.get_job_info(submission_id))
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise


def _describe(details: "JobDetails") -> Job:
    exit_code = details.driver_exit_code
    if exit_code is not None and exit_code < 0:
        exit_code = 128 - exit_code
    if exit_code is None:  # Ray has none for a job that was stopped or whose driver never started
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
