"""The way of messages from workers to the process that started them."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import ray

from pipelines.training.group import _mailbox
from pipelines.training.messages import Notice


@pytest.fixture
def address(monkeypatch):
    """Of a cluster of three nodes, of which the head is the smallest: Ray would choose another."""
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
def test_no_other_node_holds_messages_and_a_lost_mailbox_is_told(address):
    # In a process of its own: in this one other tests may have joined another Ray.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(check_messages, address).result()


def check_messages(address):
    ray.init(address, log_to_driver=False)
    here, heard = ray.get_runtime_context().get_node_id(), []
    with pytest.raises(RuntimeError, match="tracking has not heard of all.*the same command tells it"):
        for _ in range(3):
            with _mailbox(heard.append) as mailbox:
                assert ray.get(mailbox.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) == here
                ray.get(mailbox.put.remote(Notice("a")))
        with _mailbox(heard.append) as mailbox:
            ray.kill(mailbox)
    assert heard == [Notice("a")] * 3
