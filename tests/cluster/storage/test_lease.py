"""An output folder has one owner: a second process is refused, and takes over only from a dead owner."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny import tiny_recipe

from cluster.storage import lease as leases
from cluster.storage.lease import LEASE_FILE, LeaseOwner, hold_folder
from pipelines.stage import StageContext
from raydit.errors import InUse, StorageFull

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import signal, sys, time
from cluster.storage.lease import hold_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a shell ignore it
with hold_folder(sys.argv[1], on_lost=print):
    print("held", flush=True)
    time.sleep(60)
"""


def python(code, *arguments, **options):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=env, text=True, **options)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / "output"."""
    process = python(HOLD, str(tmp_path / "output"), stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def hold(folder, **options):
    return hold_folder(str(folder), on_lost=lambda reason: None, **{"wait_seconds": 0.0} | options)


def plant(folder, **changed):
    """Write the lease of an owner that differs from this process in the given fields."""
    folder.mkdir(exist_ok=True)
    owner = replace(LeaseOwner.this_process(), **changed)
    (folder / LEASE_FILE).write_text(json.dumps(asdict(owner)))
    return owner


@pytest.fixture
def brief_silence(monkeypatch):
    monkeypatch.setattr(leases, "SILENCE_SECONDS", 0.1)


def test_a_second_process_is_refused_with_the_owner_and_what_to_do(holder, tmp_path):
    with pytest.raises(InUse, match=f"is in use by .*process {holder.pid} on .*kill -INT {holder.pid}") as refused:
        hold(tmp_path / "output").__enter__()
    assert str(tmp_path / "output") in str(refused.value)
    holder.send_signal(signal.SIGSTOP)  # a suspended owner is not dead
    with pytest.raises(InUse):
        hold(tmp_path / "output").__enter__()


def test_the_folder_of_a_killed_process_is_free_at_once(holder, tmp_path):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, but it still has a process id
    with hold(tmp_path / "output") as earlier:
        assert earlier.process == holder.pid
    holder.wait()


def test_an_owner_that_is_about_to_end_is_waited_for(holder, tmp_path):
    holder.send_signal(signal.SIGINT)
    with hold(tmp_path / "output", wait_seconds=10.0) as earlier:
        assert earlier is None or earlier.process == holder.pid


def test_a_later_process_with_the_owners_id_is_not_the_owner(tmp_path):
    owner = plant(tmp_path / "output", process=os.getppid(), process_started="1")  # the parent started later
    with hold(tmp_path / "output") as earlier:
        assert earlier == owner


def test_a_lease_that_a_living_process_has_released_is_free_at_once(tmp_path):
    """In a bucket the record of a released lease stays."""
    parent = {"process": os.getppid(), "process_started": leases._process_started(os.getppid())}
    plant(tmp_path, **parent)
    with pytest.raises(InUse, match=f"process {os.getppid()}"):
        hold(tmp_path).__enter__()
    plant(tmp_path, **parent, expires=0.0)
    with hold(tmp_path):
        assert json.loads((tmp_path / LEASE_FILE).read_text())["process"] == os.getpid()


def test_an_owner_on_another_machine_is_alive_until_its_lease_expires(tmp_path, brief_silence):
    plant(tmp_path / "output", machine="another", host="node-7", expires=time.time() + 60)
    with pytest.raises(InUse, match="node-7"):
        hold(tmp_path / "output").__enter__()
    plant(tmp_path / "output", machine="another", host="node-7", expires=time.time() - 1)
    with hold(tmp_path / "output") as earlier:
        assert earlier.host == "node-7"


def test_an_owner_whose_clock_is_behind_keeps_the_folder_by_its_heartbeats(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "SILENCE_SECONDS", 20.0)
    behind = {"machine": "another", "host": "node-7"}
    plant(tmp_path, **behind, expires=time.time() - 10)
    heartbeat = threading.Timer(0.3, lambda: plant(tmp_path, **behind, expires=time.time() - 9))
    heartbeat.start()
    with pytest.raises(InUse, match="node-7.*its lease is still extended, by a clock that is behind"):
        hold(tmp_path).__enter__()
    heartbeat.join()


def test_an_expired_lease_that_is_released_while_it_is_watched_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "SILENCE_SECONDS", 20.0)
    plant(tmp_path, machine="another", expires=time.time() - 10)
    release = threading.Timer(0.3, (tmp_path / LEASE_FILE).unlink)
    release.start()
    with hold(tmp_path, wait_seconds=5.0):
        assert json.loads((tmp_path / LEASE_FILE).read_text())["process"] == os.getpid()
    release.join()


def test_a_lease_that_was_cut_off_by_a_crash_is_taken_over(tmp_path):
    (tmp_path / LEASE_FILE).write_bytes(b"\0\0")
    with hold(tmp_path):
        assert json.loads((tmp_path / LEASE_FILE).read_text())["process"] == os.getpid()


def test_an_owner_that_is_a_job_is_named_with_the_command_that_stops_it(tmp_path):
    plant(tmp_path, machine="another", job="raydit-run-cats-1")
    with pytest.raises(InUse, match="raydit jobs stop raydit-run-cats-1"):
        hold(tmp_path).__enter__()


def test_empty_folders_are_removed_and_files_stay(tmp_path):
    with hold(tmp_path / "outputs" / "cats"):
        assert (tmp_path / "outputs" / "cats" / LEASE_FILE).exists()
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "outputs"):
        (tmp_path / "outputs" / "file").touch()
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["file"]


def test_one_process_may_hold_a_folder_twice(tmp_path):
    with hold(tmp_path):
        with hold(tmp_path):
            pass
        assert (tmp_path / LEASE_FILE).exists()


def test_heartbeats_extend_the_lease_and_a_full_disk_does_not_stop_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    write, full = leases.write_atomically, [True] * 3

    def sometimes_full(path, data):
        if full:
            full.pop()
            raise StorageFull("the disk is full", "", "")
        write(path, data)

    monkeypatch.setattr(leases, "write_atomically", sometimes_full)
    with hold(tmp_path):
        first = json.loads((tmp_path / LEASE_FILE).read_text())["expires"]
        wait_until(lambda: json.loads((tmp_path / LEASE_FILE).read_text())["expires"] > first)


def test_an_owner_that_lost_its_folder_is_notified_and_keeps_the_new_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    messages = []
    with hold_folder(str(tmp_path), on_lost=messages.append):
        new = plant(tmp_path, machine="another", host="node-7")
        wait_until(lambda: messages)
    assert "node-7" in messages[0]
    assert json.loads((tmp_path / LEASE_FILE).read_text())["id"] == new.id


@pytest.mark.slow
def test_one_of_several_processes_takes_over_from_a_dead_owner(tmp_path):
    for index in range(40):
        plant(tmp_path / str(index), machine="another", expires=0.0)
    code = """
import sys
from cluster.storage import lease
from raydit.errors import InUse
owner = lease.LeaseOwner.this_process()
print("ready", flush=True); sys.stdin.readline()
for index in range(40):
    try:
        lease._acquire(f"{sys.argv[1]}/{index}/.lease.json", owner, 0.0); print(index, flush=True)
    except InUse: pass
print("end", flush=True); sys.stdin.readline()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    contenders = [python(code, str(tmp_path), **pipes) for _ in range(3)]
    assert {contender.stdout.readline() for contender in contenders} == {"ready\n"}
    for contender in contenders:
        contender.stdin.write("go\n")
        contender.stdin.flush()
    won = [int(line) for contender in contenders for line in iter(contender.stdout.readline, "end\n")]
    for contender in contenders:
        contender.communicate()
    assert sorted(won) == list(range(40))


def test_a_stage_is_refused_in_the_folder_of_another_process(holder, tmp_path):
    with pytest.raises(InUse, match=f"process {holder.pid}"):
        StageContext(tiny_recipe(tmp_path)).__enter__()


def test_a_stage_reports_the_owner_from_which_it_took_over(tmp_path, capsys, brief_silence):
    plant(tmp_path / "output", machine="another", host="node-7", expires=time.time() - 1)
    with StageContext(tiny_recipe(tmp_path)):
        output = capsys.readouterr().out
        assert "took over the folder from" in output and "node-7" in output


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


HOSTILE_FIELDS = [
    {"expires": 1e300},
    {"expires": float("inf")},
    {"expires": float("nan")},
    {"expires": "tomorrow"},
    {"since": -1e300},
    {"since": None},
    {"process": 10**400},
    {"process": "abc"},
    {"process": True},
    {"machine": ["a"]},
    {"host": "x" * 5000},
    {"job": {"a": 1}},
    {"unknown": 1},
]


@pytest.mark.parametrize("changed", HOSTILE_FIELDS, ids=str)
def test_a_lease_that_raydit_never_writes_is_taken_over(tmp_path, changed):
    content = asdict(replace(LeaseOwner.this_process(), machine="elsewhere")) | changed
    (tmp_path / LEASE_FILE).write_text(json.dumps(content))
    with hold(tmp_path) as earlier:
        assert earlier == leases.UNKNOWN_OWNER


@pytest.mark.parametrize("kind", ["sparse", "deep", "device", "pipe"])
def test_a_lease_without_end_is_taken_over(tmp_path, kind):
    path = tmp_path / LEASE_FILE
    if kind == "sparse":
        path.touch()
        os.truncate(path, 2**40)
    elif kind == "deep":
        path.write_text("[" * 50_000)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    with hold(tmp_path) as earlier:
        assert earlier == leases.UNKNOWN_OWNER and path.is_file() and not path.is_symlink()
    assert not path.exists()


def test_a_lease_that_ends_in_years_names_the_file_to_remove(tmp_path):
    plant(tmp_path / "output", machine="elsewhere", expires=time.time() + 10**9)
    with pytest.raises(InUse, match=r"if its machine is gone, remove .*/output/.lease.json, which lasts until 20\d\d-"):
        hold(tmp_path / "output").__enter__()
