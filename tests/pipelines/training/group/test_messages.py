"""Messages reach the driver from its own node, and their loss is reported."""

import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import ray

from pipelines.training.group import messages
from pipelines.training.group.messages import Mailbox, Notice, receive_messages
from raydit.errors import WorkersDied


@contextmanager
def joined_cluster():
    """Join a cluster of three nodes; the head is the smallest, so that Ray would choose another one."""
    from ray.cluster_utils import Cluster

    os.environ.pop("RAY_ADDRESS", None)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=4)
        ray.init(cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def in_another_process(function, *arguments):
    """Call a function in a process that no other test has let start or join a Ray."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(function, *arguments).result()


class FakeActor:
    """A Mailbox without Ray: tasks answer at once, or never if it is silent."""

    def __init__(self, monkeypatch, silent=False):
        self.mailbox, self.silent, self.killed = Mailbox(), silent, False
        monkeypatch.setattr(ray, "wait", lambda answers, timeout: ([], answers) if silent else (answers, []))
        monkeypatch.setattr(ray, "get", self.answer)
        monkeypatch.setattr(ray, "kill", lambda actor: setattr(actor, "killed", True))
        monkeypatch.setattr(messages, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(messages, "LAST_SECONDS", 0.1)

    @property
    def take_all(self):
        return SimpleNamespace(remote=self.mailbox.take_all if not self.killed else lambda: None)

    def answer(self, taken):
        if taken is None:
            raise ray.exceptions.RayActorError
        return taken


def test_the_end_waits_for_a_message_that_takes_longer_than_the_last_answer_may(monkeypatch):
    actor, received, busy = FakeActor(monkeypatch), [], threading.Event()

    def process(message):
        busy.set()
        time.sleep(0.3)
        received.append(message)

    with receive_messages(process, actor):
        actor.mailbox.put(Notice("a"))
        busy.wait(5)
        actor.mailbox.put(Notice("b"))
    assert received == [Notice("a"), Notice("b")] and actor.killed


def test_the_end_does_not_wait_for_a_mailbox_that_does_not_answer(monkeypatch):
    actor = FakeActor(monkeypatch, silent=True)
    with receive_messages(pytest.fail, actor):
        pass
    assert actor.killed


@pytest.mark.slow
def test_the_mailbox_is_on_the_drivers_node_and_its_death_is_an_error():
    in_another_process(check_messages)


@pytest.mark.slow
def test_a_mailbox_that_dies_before_its_first_task_is_started_again(tmp_path):
    in_another_process(check_restart, tmp_path)


def check_restart(folder):
    with joined_cluster():
        received = []
        for deaths in (1, 2, 3):
            messages.Mailbox = dying_mailbox(folder / str(deaths), deaths)
            if deaths == messages.START_ATTEMPTS:
                with (
                    pytest.raises(WorkersDied, match="died 3 times while it started"),
                    receive_messages(received.append),
                ):
                    pass
            else:
                with receive_messages(received.append) as mailbox:
                    ray.get(mailbox.put.remote(Notice("a")))
        assert received == [Notice("a")] * 2


def dying_mailbox(file, deaths):
    """Return a Mailbox whose process ends at once the first times. file: counts them."""

    class DyingMailbox(Mailbox):
        def __init__(self):
            super().__init__()
            with open(file, "a") as opened:
                opened.write("x")
            if file.stat().st_size <= deaths:
                os._exit(1)

    return DyingMailbox


def check_messages():
    with joined_cluster():
        here, received = ray.get_runtime_context().get_node_id(), []
        with pytest.raises(WorkersDied, match="reports did not reach tracking. Run the same command again"):
            for _ in range(3):
                with receive_messages(received.append) as mailbox:
                    assert (
                        ray.get(mailbox.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) == here
                    )
                    ray.get(mailbox.put.remote(Notice("a")))
            with receive_messages(received.append) as mailbox:
                ray.kill(mailbox)
        assert received == [Notice("a")] * 3
