"""Measurements of how busy machines are."""

import subprocess
import sys
import time

import pytest

from cluster.usage import measure_usage, parse_gpu_usage, start_measuring_cpu


def test_a_busy_machine_has_a_utilization_between_0_and_100_percent():
    start_measuring_cpu()
    ends = time.process_time() + 0.3
    while time.process_time() < ends:
        pass
    usage = measure_usage()
    assert 0 < usage["cpu_utilization_percentage"] <= 100
    assert 0 < usage["system_memory_usage_percentage"] < 100
    total = usage["system_memory_usage_megabytes"] / usage["system_memory_usage_percentage"] * 100
    with open("/proc/meminfo") as file:
        assert total == pytest.approx(int(file.readline().split()[1]) / 1024)


def test_gpus_are_read_line_by_line_and_missing_values_are_left_out():
    assert parse_gpu_usage("87, 1024, 81920\n[N/A], 2048, 81920\n") == {
        "gpu_0_utilization_percentage": 87.0,
        "gpu_0_memory_usage_megabytes": 1024.0,
        "gpu_0_memory_usage_percentage": 1.25,
        "gpu_1_memory_usage_megabytes": 2048.0,
        "gpu_1_memory_usage_percentage": 2.5,
    }
    assert parse_gpu_usage("") == {}


OTHERS = """
import ray
from ray.cluster_utils import Cluster
from cluster import usage as module
from cluster.usage import measure_other_nodes
module.ANSWER_SECONDS = 60.0
assert measure_other_nodes() == {}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
try:
    ray.init(address=cluster.address, logging_level="ERROR")
    assert measure_other_nodes() == {}
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    (usage,) = measure_other_nodes().values()
    assert 0 < usage["system_memory_usage_percentage"] < 100
    print("answered")
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
def test_the_other_nodes_of_a_cluster_answer(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = subprocess.run([sys.executable, "-c", OTHERS], capture_output=True, text=True)
    assert "answered" in done.stdout, done.stderr
