"""`raydit doctor`, on what is here and on what is broken on purpose."""

import json
import socket
import sys
import threading

import pytest
from mlflow_server import answering

from cluster.doctor import Check
from pipelines.cli import doctor_checks
from pipelines.cli import main as cli

NAMES = ["python", *doctor_checks.PACKAGES, "devices", "compiler", "storage", "weights"]
NAMES += ["tracking", "aliases", "auth", "ports", "ray"]


@pytest.fixture(autouse=True)
def tracked(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


@pytest.fixture
def no_ray(monkeypatch):
    """Starting a Ray takes seconds; one test does it."""
    monkeypatch.setattr(doctor_checks, "check_ray", lambda address: Check("ray", True, f"{address}"))


@pytest.fixture
def raydit_doctor(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["raydit", "doctor", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().out

    return call


def red(output):
    return {check["name"]: check for check in json.loads(output) if not check["ok"]}


@pytest.mark.slow
def test_all_is_green_here(raydit_doctor, tmp_path):
    code, output = raydit_doctor("--json")
    assert red(output) == {} and code == 0
    checks = json.loads(output)
    assert [check["name"] for check in checks] == NAMES
    assert all(check["found"] and not check["do"] for check in checks)
    assert list(tmp_path.iterdir()) == []


def test_a_ray_that_cannot_start_is_red(raydit_doctor, monkeypatch):
    import ray

    def init(*args, **kwargs):
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests' Ray is running, and must go on
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, output = raydit_doctor("--json")
    assert code == 1
    assert list(red(output)) == ["ray"]
    assert "timed out during startup" in red(output)["ray"]["found"] and red(output)["ray"]["do"]


def test_a_tracking_server_that_is_down_is_red(raydit_doctor, no_ray, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        code, output = raydit_doctor("--json")
    assert code == 1
    assert list(red(output)) == ["tracking"]
    tracking = red(output)["tracking"]
    assert tracking["found"].startswith(uri) and "\n" not in tracking["found"]
    assert "start the server, or set MLFLOW_TRACKING_URI" in tracking["do"]


@pytest.mark.parametrize("kind", ["file", "denied"])
def test_a_store_that_never_takes_runs_is_one_red_line(raydit_doctor, no_ray, monkeypatch, tmp_path, kind):
    with answering(401, b"You are not authenticated.") as (server, _):
        uri = f"file://{tmp_path}/mlruns" if kind == "file" else server
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        code, output = raydit_doctor("--json")
    assert code == 1 and list(red(output)) == ["tracking"]
    tracking = red(output)["tracking"]
    assert tracking["found"].startswith(f"tracking.uri: {uri} cannot be used") and "\n" not in tracking["found"]
    assert ("MLFLOW_TRACKING_USERNAME" if kind == "denied" else "sqlite:///PATH/mlflow.db") in tracking["do"]
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_makes_no_database(raydit_doctor, no_ray, monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    code, output = raydit_doctor("--json")
    assert code == 0 and list(tmp_path.iterdir()) == []
    (tracking,) = [check["found"] for check in json.loads(output) if check["name"] == "tracking"]
    assert tracking == f"sqlite:///{tmp_path}/mlflow.db: no database yet, the first stage creates it"


def test_an_output_that_cannot_be_written_is_red(raydit_doctor, no_ray):
    code, output = raydit_doctor("--json", "--output", "/proc/raydit")
    assert code == 1
    assert list(red(output)) == ["storage"]
    assert red(output)["storage"]["found"].startswith("/proc/raydit")


def test_the_lines_are_aligned_and_printed_as_they_become_known(raydit_doctor, monkeypatch):
    """All other lines are printed while Ray starts."""
    lines, others_are_printed = [], threading.Event()

    def echo(line):
        lines.append(line)
        if len(lines) == len(NAMES) - 1:
            others_are_printed.set()

    def check_ray(address):
        assert others_are_printed.wait(timeout=120)  # another thread checks the machine
        return Check("ray", False, "away", "start one")

    monkeypatch.setattr(doctor_checks, "echo", echo)
    monkeypatch.setattr(doctor_checks, "check_ray", check_ray)
    code, _ = raydit_doctor()
    assert code == 1
    assert [line.split()[1] for line in lines] == NAMES
    assert lines[-1] == f"!! {'ray':<{doctor_checks.NAME_WIDTH}}  away -> start one"
    findings = {line[: 5 + doctor_checks.NAME_WIDTH].strip() for line in lines[:-1]}
    assert findings == {f"ok {name}" for name in NAMES[:-1]}


def test_of_a_job_that_would_record_for_itself_the_tracking_is_red():
    checks = [Check("tracking", True, "sqlite:////tmp/x/mlflow.db: 0 experiments"), Check("nodes", True, "1 node(s)")]
    answers = doctor_checks.select_cluster_checks(checks, is_local=False)
    assert [check.name for check in answers if not check.ok] == ["node tracking"]
    assert "MLFLOW_TRACKING_URI" in answers[-1].do
    assert doctor_checks.select_cluster_checks(checks, is_local=True) == checks[1:]


def test_a_missing_ray_is_red(raydit_doctor, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    code, output = raydit_doctor("--json")
    assert code == 1 and list(red(output)) == ["ray"]


def test_what_cannot_be_imported_is_red_and_the_other_checks_report(raydit_doctor, no_ray, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    code, output = raydit_doctor("--json")
    assert code == 1 and list(red(output)) == ["devices", "weights"]
    assert "torch" in red(output)["weights"]["found"] and red(output)["weights"]["do"]
    assert [check["name"] for check in json.loads(output)] == NAMES
