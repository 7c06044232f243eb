"""Messages reach the driver from its own node, and their loss is reported."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import ray

from pipelines.training.messages import Notice, receive_messages
from raydit.errors import WorkersDied


@pytest.fixture
def address(monkeypatch):
    """Address of a cluster of three nodes; the head is the smallest, so that Ray would choose another one."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=4)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_the_mailbox_is_on_the_drivers_node_and_its_death_is_an_error(address):
    # In a process of its own: in this one other tests may have joined another Ray.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(check_messages, address).result()


def check_messages(address):
    ray.init(address, log_to_driver=False)
    here, received = ray.get_runtime_context().get_node_id(), []
    with pytest.raises(WorkersDied, match="reports did not reach tracking. Run the same command again"):
        for _ in range(3):
            with receive_messages(received.append) as mailbox:
                assert ray.get(mailbox.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) == here
                ray.get(mailbox.put.remote(Notice("a")))
        with receive_messages(received.append) as mailbox:
            ray.kill(mailbox)
    assert received == [Notice("a")] * 3
