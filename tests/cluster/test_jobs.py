"""Jobs on a real head with token authentication, whose Python environment is not activated."""

import asyncio
import http.server
import shlex
import socket
import subprocess
import sys
import threading
import time

import pytest

from cluster import job_server, jobs

pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # Ray passes it to aiohttp


@pytest.fixture
def address(ray_head, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_head.token)
    return ray_head.address


def run(code, address, **options):
    return jobs.submit([], address=address, program=("-c", code), **options)


def follow(submission_id, address):
    lines = []
    return jobs.follow(submission_id, address, lines.append), lines


@pytest.mark.slow
def test_a_job_runs_in_the_clusters_python_with_its_arguments_unchanged(address, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # Ray would let it override the address
    code = "import os, sys; print(sys.prefix); print(os.environ['COLOUR'], os.getcwd()); print(sys.argv[1:])"
    arguments = ["train", "my recipe.toml", "--set", "name='a \"b\" $HOME'"]
    settings = {"program": ("-c", code), "env": {"COLOUR": "blue"}, "folder": str(tmp_path)}
    submission_id = jobs.submit(arguments, address=address, **settings)
    exit_code, lines = follow(submission_id, address)
    assert exit_code == 0
    assert lines[-3:] == [sys.prefix, f"blue {tmp_path}", str(arguments)]
    (listed,) = [job for job in jobs.list_jobs(address) if job.submission_id == submission_id]
    assert shlex.split(listed.command) == arguments
    assert (listed.status, listed.exit_code) == ("SUCCEEDED", 0)


@pytest.mark.slow
def test_a_running_job_is_joined_and_the_id_of_a_stopped_one_is_refused(address):
    code = "import time\ntry:\n  print('started'); time.sleep(600)\nfinally: print('cleaned up')"
    assert run(code, address, submission_id="once") == "once"
    assert run("print('twice')", address, submission_id="once") == "once"
    wait_for_line("started", "once", address)
    assert jobs.stop("once", address)
    exit_code, lines = follow("once", address)
    assert exit_code == 130
    assert "twice" not in lines and "cleaned up" in lines
    assert not jobs.stop("once", address)
    with pytest.raises(ValueError, match=r"already ended \(STOPPED\).*another"):
        run(code, address, submission_id="once")


def wait_for_line(line, submission_id, address):
    client = jobs._client(address)
    deadline = time.monotonic() + 30
    while line not in client.get_job_logs(submission_id).splitlines():
        assert time.monotonic() < deadline, f"{submission_id} has not written {line!r}"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_failing_job_is_reported_and_its_log_continues_after_a_broken_connection(address, monkeypatch):
    from ray.job_submission import JobSubmissionClient

    original_tail, calls = JobSubmissionClient.tail_job_logs, []

    async def breaking_tail(self, submission_id):
        calls.append(submission_id)
        async for text in original_tail(self, submission_id):
            yield text
            if "line 1" in text and len(calls) == 1:
                raise RuntimeError("WebSocket connection closed unexpectedly")

    monkeypatch.setattr(JobSubmissionClient, "tail_job_logs", breaking_tail)
    code = "import time\nfor i in range(4): print('line', i); time.sleep(0.3)\nraise SystemExit(3)"
    submission_id = run(code, address)
    exit_code, lines = follow(submission_id, address)
    assert (exit_code, len(calls)) == (3, 2)
    assert lines[-1] == f"job {submission_id} FAILED, exit code 3: line 3"
    assert lines[-5:-1] == [f"line {i}" for i in range(4)]
    assert lines.count("line 0") == 1


def test_a_log_from_which_nothing_comes_any_more_is_read_again(monkeypatch):
    class Silent:
        """A client whose connection dies quietly after two lines."""

        async def tail_job_logs(self, submission_id):
            yield "line 0\nline 1\n"
            await asyncio.sleep(60)

    monkeypatch.setattr(jobs, "SILENCE_SECONDS", 0.1)
    lines = []
    assert asyncio.run(jobs._tail(Silent(), "once", lines.append, skip=0)) == (14, False)
    assert lines == ["line 0", "line 1"]


def test_a_job_starts_in_its_folder_and_imports_nothing_from_there(tmp_path):
    folder = tmp_path / "it's here"
    folder.mkdir()
    (folder / "json.py").write_text("raise SystemExit('the wrong module')")
    arguments = ["-c", "import json, os, sys; print(os.getcwd(), sys.argv[1:])", "a b"]

    def run(folder):
        command = jobs.entrypoint(sys.executable, arguments, str(folder))
        return subprocess.run(command, shell=True, capture_output=True, text=True)

    assert run(folder).stdout == f"{folder} ['a b']\n"
    missing = run(tmp_path / "none")
    assert missing.returncode == 2
    assert missing.stdout == (
        f"raydit: the job finds no folder {tmp_path}/none; through a forwarded port, submit with --pack\n"
    )


RAYS_MESSAGE = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\n..."


@pytest.mark.parametrize(
    ("exit_code", "message", "log", "reason"),
    [
        (
            2,
            RAYS_MESSAGE.format(2),
            ["starting Ray", "raydit: no recipe at a.toml", "", " "],
            "raydit: no recipe at a.toml",
        ),
        (3, RAYS_MESSAGE.format(3), [], "Job entrypoint command failed with exit code 3"),
        (137, RAYS_MESSAGE.format(-9), ["step 3"], "its driver was killed by SIGKILL, which Linux sends when memory"),
        (139, RAYS_MESSAGE.format(-11), ["step 3"], "its driver was killed by SIGSEGV"),
        (
            1,
            "runtime_env setup failed: no pip\nmore",
            ["Runtime env is setting up."],
            "runtime_env setup failed: no pip",
        ),
        (
            1,
            RAYS_MESSAGE.format(1),
            ["python: Error (ModuleNotFoundError: No module named 'pipelines')"],
            "raydit is not ins",
        ),
    ],
)
def test_the_reason_for_a_failure_is_its_own_last_line(exit_code, message, log, reason):
    values = {"submission_id": "a", "status": "FAILED", "command": "", "started": None, "metadata": {}}
    found = jobs.failure_reason(jobs.Job(**values, exit_code=exit_code, message=message), log)
    assert found.startswith(reason) and "available logs" not in found


@pytest.mark.slow
def test_a_killed_driver_has_the_exit_code_of_a_shell_and_names_its_signal(address):
    exit_code, lines = follow(run("import os; os.kill(os.getpid(), 9)", address), address)
    assert exit_code == 137 and "exit code 137: its driver was killed by SIGKILL" in lines[-1]


@pytest.mark.slow
def test_a_cluster_without_raydit_leads_to_what_to_do(address):
    hidden = "import sys; sys.path.clear(); sys.meta_path[:] = sys.meta_path[:3]; import pipelines.cli"
    exit_code, lines = follow(run(hidden, address), address)
    assert exit_code == 1 and "raydit is not installed on the cluster. Submit with --pip" in lines[-1]


def test_a_wrong_token_is_refused_with_one_line(address, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(ValueError, match="another token.*403.*Set RAY_AUTH_TOKEN") as refusal:
        run("pass", address)
    assert "\n" not in str(refusal.value)


def test_a_missing_token_is_refused_with_one_line(address, monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no token.*401"):
        jobs.list_jobs(address)


def test_the_token_may_be_in_a_file(address, ray_head, monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text(ray_head.token + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert job_server.server_version(address).startswith("2.")


def test_an_unknown_job_is_named(address):
    with pytest.raises(ValueError, match="no job nowhere"):
        jobs.get_job("nowhere", address)


def test_another_ray_version_is_refused(address, monkeypatch):
    monkeypatch.setattr("ray.__version__", "2.1.0")
    with pytest.raises(ValueError, match=r"runs Ray 2\.\d+.*expected 2\.1\.0"):
        jobs.list_jobs(address)


def test_an_address_without_a_server_is_a_connection_error():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError, match="no job server answers.*ray start --head"):
            jobs.list_jobs(f"http://127.0.0.1:{unused.getsockname()[1]}")


def test_another_web_server_is_not_taken_for_a_job_server():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ValueError, match="HTTP 501, expected a Ray job server"):
            job_server.server_version(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def test_a_token_is_not_sent_on_to_where_a_server_points(monkeypatch):
    received = []

    class Redirect(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            received.append((self.server.server_port, self.headers["Authorization"]))
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{servers[1].server_port}/")
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret token")
    servers = [http.server.HTTPServer(("127.0.0.1", 0), Redirect) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ValueError, match="answered HTTP 302, expected a Ray job server"):
            job_server.server_version(f"http://127.0.0.1:{servers[0].server_port}")
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
    assert received == [(servers[0].server_port, "Bearer secret token")]


@pytest.mark.parametrize(
    ("address", "in_clear"),
    [("http://10.0.0.1:8265", True), ("https://10.0.0.1", False), ("http://127.0.0.1:8265", False)],
)
def test_a_token_in_clear_is_noticed(address, in_clear, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret token")
    assert job_server.sends_token_in_clear(address) == in_clear


def test_the_port_of_rays_own_protocol_is_not_taken_for_a_job_server(ray_head):
    with pytest.raises(ValueError, match="is not a Ray job server. Check the port"):
        job_server.server_version(f"http://{ray_head.ray_address}")


def test_a_job_server_that_fails_is_reported_in_one_line(address, monkeypatch):
    from ray.job_submission import JobSubmissionClient

    def fail(self, *_, **__):
        self._raise_error(type("Response", (), {"status_code": 500, "text": "No available agent\nTraceback"}))

    monkeypatch.setattr(JobSubmissionClient, "list_jobs", fail)
    with pytest.raises(ConnectionError, match="job server failed: .*500: No available agent") as failure:
        jobs.list_jobs(address)
    assert "\n" not in str(failure.value)


def test_an_address_without_http_is_refused():
    with pytest.raises(ValueError, match="'head:6379', expected http://"):
        job_server.server_version("head:6379")
