"""Every task is done, whoever dies; and what cannot be done is said."""

import os
import signal
from pathlib import Path

import pytest

from pipelines.config.training import WorkersConfig
from pipelines.scoring.actor_pool import DEATHS, run_on_actors

pytestmark = pytest.mark.usefixtures("local_ray")
TASKS = [f"task-{number}" for number in range(7)]


def noting(folder: Path, dies_at: str = "", times: int = 0):
    """What leaves a file for every call, and is killed at the first calls with one of the tasks."""

    def make():  # in here it is pickled by value: workers cannot import this file
        def note(task: str) -> None:
            calls = len(list(folder.glob(f"{task}.*")))
            (folder / f"{task}.{os.getpid()}").touch()
            if task == dies_at and calls < times:
                os.kill(os.getpid(), signal.SIGKILL)

        return note

    return make


def share(*arguments) -> tuple[list[str], list[str]]:
    """What is done, and what is told meanwhile."""
    told: list[str] = []
    return list(run_on_actors(*arguments, told.append)), told


def calls(folder: Path, task: str = "*") -> list[str]:
    return sorted(file.stem for file in folder.glob(f"{task}.*"))


@pytest.mark.parametrize("num_workers", [1, 2, 20])
def test_every_task_is_done_once(tmp_path, num_workers):
    """By as many workers as there is room for: the Ray of these tests has six CPUs."""
    workers = WorkersConfig(num_workers=num_workers, cpus_per_worker=3 if num_workers == 20 else 1)
    done, told = share(TASKS, noting(tmp_path), (), workers)
    assert sorted(done) == TASKS == calls(tmp_path) and not told
    assert num_workers > 1 or done == TASKS


def test_what_a_dead_worker_had_in_hand_is_done_by_another(tmp_path):
    done, told = share(TASKS, noting(tmp_path, "task-2", times=DEATHS - 1), (), WorkersConfig(num_workers=2))
    assert sorted(done) == TASKS
    assert [line[:13] for line in told] == ["a worker died"] * (DEATHS - 1)
    assert calls(tmp_path) == sorted([*TASKS, *["task-2"] * (DEATHS - 1)])


def test_a_task_that_kills_every_worker_is_not_tried_for_ever(tmp_path):
    with pytest.raises(ChildProcessError, match="again and again at the same work: .*the same command goes on"):
        share(TASKS[:2], noting(tmp_path, "task-1", times=100), (), WorkersConfig())
    assert calls(tmp_path, "task-1") == ["task-1"] * DEATHS


def test_workers_that_die_before_they_work_are_not_started_for_ever():
    def make():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="workers died again and again at their start"):
        share(TASKS, make, (), WorkersConfig())


@pytest.mark.parametrize("at_start", [True, False])
def test_errors_are_raised_as_they_were(at_start):
    def make(found):
        def refuse(task=None):
            raise ValueError(f"found {found}, expected 1; take another")

        if at_start:
            refuse()
        return refuse

    with pytest.raises(ValueError) as raised:
        share(TASKS, make, (0,), WorkersConfig(num_workers=2))
    assert str(raised.value) == "found 0, expected 1; take another"
