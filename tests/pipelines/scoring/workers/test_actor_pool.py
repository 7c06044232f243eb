"""Every task is run, even if actors die; a task that cannot be run ends the pool with an error."""

import os
import signal
from pathlib import Path

import pytest

from cluster import storage
from pipelines.config.training import WorkersConfig
from pipelines.scoring.workers.actor_pool import MAX_DEATHS, PoolWorker, run_on_actors
from raydit.errors import Failed, InvalidInput

pytestmark = pytest.mark.usefixtures("local_ray")
TASKS = [f"task-{number}" for number in range(7)]


def noting(folder: Path, dies_at: str = "", times: int = 0):
    """Return what creates a function that leaves a file for every call, and is killed at the first calls of a task."""

    def create():  # in here it is pickled by value: workers cannot import this file
        def note(task: str) -> None:
            calls = len(list(folder.glob(f"{task}.*")))
            (folder / f"{task}.{os.getpid()}").touch()
            if task == dies_at and calls < times:
                os.kill(os.getpid(), signal.SIGKILL)

        return note

    return create


def run(*arguments) -> tuple[list[str], list[str]]:
    """Return the tasks that were done, in their order, and the messages about deaths."""
    messages: list[str] = []
    return list(run_on_actors(*arguments, messages.append, [])), messages


def calls(folder: Path, task: str = "*") -> list[str]:
    return sorted(file.stem for file in folder.glob(f"{task}.*"))


@pytest.mark.parametrize("num_workers", [1, 2, 20])
def test_every_task_is_done_once(tmp_path, num_workers):
    """Also if not all actors can be placed: the Ray of these tests has six CPUs."""
    workers = WorkersConfig(num_workers=num_workers, cpus_per_worker=3 if num_workers == 20 else 1)
    done, messages = run(TASKS, noting(tmp_path), workers)
    assert sorted(done) == TASKS == calls(tmp_path) and not messages
    assert num_workers > 1 or done == TASKS


def test_the_task_of_a_dead_worker_is_retried_on_another(tmp_path):
    done, messages = run(TASKS, noting(tmp_path, "task-2", times=MAX_DEATHS - 1), WorkersConfig(num_workers=2))
    assert sorted(done) == TASKS
    assert [line[:13] for line in messages] == ["a worker died"] * (MAX_DEATHS - 1)
    assert calls(tmp_path) == sorted([*TASKS, *["task-2"] * (MAX_DEATHS - 1)])


def test_a_task_that_kills_every_worker_is_not_retried_for_ever(tmp_path):
    with pytest.raises(ChildProcessError, match="again and again on the same task .*again: it resumes"):
        run(TASKS[:2], noting(tmp_path, "task-1", times=100), WorkersConfig())
    assert calls(tmp_path, "task-1") == ["task-1"] * MAX_DEATHS


def test_workers_that_die_while_they_start_are_not_restarted_for_ever():
    def create():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="workers died again and again while they started"):
        run(TASKS, create, WorkersConfig())


@pytest.mark.parametrize("at_start", [True, False])
def test_errors_of_tasks_are_raised_unchanged(at_start):
    def create():
        def refuse(task=None):
            raise ValueError("found 0, expected 1; take another")

        if at_start:
            refuse()
        return refuse

    with pytest.raises(ValueError) as raised:
        run(TASKS, create, WorkersConfig(num_workers=2))
    assert str(raised.value) == "found 0, expected 1; take another"


def test_a_worker_whose_memory_is_full_says_which_setting_takes_less():
    def fill(task=None):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(Failed, match="Tried to allocate 2 GiB. Lower evaluate.batch_size"):
        PoolWorker(fill).start()
    worker = PoolWorker(lambda: fill)
    worker.start()
    with pytest.raises(Failed, match="Tried to allocate 2 GiB. Lower evaluate.batch_size"):
        worker.run("task")


def test_actors_look_for_the_folders_that_they_write_into(tmp_path, monkeypatch):
    folders = [str(tmp_path / name) for name in ("records", "samples")]

    def create():
        marks = [(folder, list(Path(folder).iterdir())) for folder in folders]

        def write(task):
            for folder, (mark,) in marks:
                (Path(folder) / f"{task}-{mark.name}").touch()

        return write

    list(run_on_actors(TASKS[:2], create, WorkersConfig(), print, folders))
    for folder in folders:
        first, second = sorted(file.name.split("-", 2) for file in Path(folder).iterdir())
        assert (first[:2], second[:2]) == (["task", "0"], ["task", "1"]) and first[2] == second[2]

    monkeypatch.setattr("cluster.storage.shared_folders.WAIT_SECONDS", 0.02)
    elsewhere = storage.SharedFolder(folders[0], ".shared-on-another-machine")
    with pytest.raises(InvalidInput, match="records on .*found another folder .*the same folder on all machines"):
        PoolWorker(create, [elsewhere]).start()
