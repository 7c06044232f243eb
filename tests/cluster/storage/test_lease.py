"""Two at once in one output folder: refused, taken over from the dead, never both."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny import tiny_recipe

from cluster.storage import lease as leases
from cluster.storage.lease import FILE, InUse, Owner, lease
from cluster.storage.temporaries import StorageFull
from pipelines.stage import StageContext

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import signal, sys, time
from cluster.storage.lease import lease
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
with lease(sys.argv[1], lost=print):
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
    return lease(str(folder), lost=lambda reason: None, **{"patience_seconds": 0.0} | options)


def plant(folder, **changed):
    """The lease of an owner that differs from this process in what is given."""
    folder.mkdir(exist_ok=True)
    owner = replace(Owner.here(), **changed)
    (folder / FILE).write_text(json.dumps(asdict(owner)))
    return owner


def test_the_second_is_refused_and_told_who_is_there_and_what_to_do(holder, tmp_path):
    with pytest.raises(InUse, match=f"is in use by .*process {holder.pid} on .*kill -INT {holder.pid}") as refused:
        hold(tmp_path / "output").__enter__()
    assert str(tmp_path / "output") in str(refused.value)
    holder.send_signal(signal.SIGSTOP)  # asleep is not dead
    with pytest.raises(InUse):
        hold(tmp_path / "output").__enter__()


def test_the_folder_of_a_killed_process_is_free_at_once(holder, tmp_path):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, but not buried: it still has a number
    with hold(tmp_path / "output") as earlier:
        assert earlier.process == holder.pid
    holder.wait()


def test_one_that_ends_meanwhile_is_waited_for(holder, tmp_path):
    holder.send_signal(signal.SIGINT)
    with hold(tmp_path / "output", patience_seconds=10.0) as earlier:
        assert earlier is None or earlier.process == holder.pid


def test_a_process_number_that_was_given_again_is_not_its_owner(tmp_path):
    owner = plant(tmp_path / "output", process=os.getppid(), process_started="1")  # the parent started later
    with hold(tmp_path / "output") as earlier:
        assert earlier == owner


def test_an_owner_on_another_machine_is_believed_until_its_time_is_up(tmp_path):
    plant(tmp_path / "output", machine="another", host="node-7", expires=time.time() + 60)
    with pytest.raises(InUse, match="node-7"):
        hold(tmp_path / "output").__enter__()
    plant(tmp_path / "output", machine="another", host="node-7", expires=time.time() - 1)
    with hold(tmp_path / "output") as earlier:
        assert earlier.host == "node-7"


def test_a_lease_torn_by_a_crash_of_the_machine_holds_nobody_up(tmp_path):
    (tmp_path / FILE).write_bytes(b"\0\0")
    with hold(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["process"] == os.getpid()


def test_a_job_is_named_with_how_to_stop_it(tmp_path):
    plant(tmp_path, machine="another", job="raydit-run-cats-1")
    with pytest.raises(InUse, match="raydit jobs stop raydit-run-cats-1"):
        hold(tmp_path).__enter__()


def test_nothing_is_left_behind_and_what_was_put_in_stays(tmp_path):
    with hold(tmp_path / "outputs" / "cats"):
        assert (tmp_path / "outputs" / "cats" / FILE).exists()
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "outputs"):
        (tmp_path / "outputs" / "file").touch()
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["file"]


def test_one_process_may_hold_a_folder_twice(tmp_path):
    with hold(tmp_path):
        with hold(tmp_path):
            pass
        assert (tmp_path / FILE).exists()


def test_signs_of_life_put_the_end_off_and_a_full_disk_does_not_end_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    write, full = leases.write_atomically, [True] * 3

    def sometimes_full(path, data):
        if full:
            full.pop()
            raise StorageFull("no room")
        write(path, data)

    monkeypatch.setattr(leases, "write_atomically", sometimes_full)
    with hold(tmp_path):
        first = json.loads((tmp_path / FILE).read_text())["expires"]
        wait_until(lambda: json.loads((tmp_path / FILE).read_text())["expires"] > first)


def test_one_from_whom_it_was_taken_is_told_and_leaves_the_new_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    told = []
    with lease(str(tmp_path), lost=told.append):
        new = plant(tmp_path, machine="another", host="node-7")
        wait_until(lambda: told)
    assert "node-7" in told[0]
    assert json.loads((tmp_path / FILE).read_text())["id"] == new.id


@pytest.mark.slow
def test_of_many_that_find_a_dead_owner_one_takes_over(tmp_path):
    for index in range(40):
        plant(tmp_path / str(index), machine="another", expires=0.0)
    code = """
import sys
from cluster.storage import lease
owner = lease.Owner.here()
print("ready", flush=True); sys.stdin.readline()
for index in range(40):
    try:
        lease._acquire(f"{sys.argv[1]}/{index}/.lease.json", owner, 0.0); print(index, flush=True)
    except lease.InUse: pass
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


def test_a_stage_is_refused_where_another_process_works(holder, tmp_path):
    with pytest.raises(InUse, match=f"process {holder.pid}"):
        StageContext(tiny_recipe(tmp_path)).__enter__()


def test_a_stage_says_from_whom_it_took_over(tmp_path, capsys):
    plant(tmp_path / "output", machine="another", host="node-7", expires=time.time() - 1)
    with StageContext(tiny_recipe(tmp_path)):
        assert "taken over from" in (said := capsys.readouterr().out) and "node-7" in said


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
