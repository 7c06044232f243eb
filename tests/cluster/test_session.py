"""Sessions on a real Ray: the one that all tests share, and in separate processes where a test starts or ends Ray."""

import os
import subprocess
import sys

import psutil
import pytest
import ray

from cluster.node_tasks import NodeReply
from cluster.placement import WorkerNeeds
from cluster.session import count_free_workers, ray_session, require_compilers, require_resources
from raydit.errors import Failed

SESSION_CODE = """
import ray
from cluster.session import ray_session
with ray_session(num_cpus=5):
    @ray.remote
    def double(x):
        return 2 * x
    print(ray.get(double.remote(21)))
"""
INTERRUPTED_CODE = """
import ray
from cluster.session import ray_session
try:
    with ray_session(num_cpus=5):
        started = ray.is_initialized()
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print(started, ray.is_initialized())
"""


def run_python(code):
    env = os.environ | {"RAY_ADDRESS": "", "PYTHONPATH": os.getcwd()}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_session_prints_nothing():
    done = run_python(SESSION_CODE)
    assert (done.stdout, done.stderr) == ("42\n", "")


@pytest.mark.slow
def test_ray_stops_when_a_session_ends_even_by_ctrl_c():
    done = run_python(INTERRUPTED_CODE)
    assert (done.stdout, done.stderr) == ("True False\n", "")


def test_an_inner_session_joins_the_outer_one_and_leaves_it_running(local_ray):
    with ray_session(num_cpus=1):
        assert ray.cluster_resources()["CPU"] >= 5
    assert ray.is_initialized()


def test_ray_starts_neither_its_log_monitor_nor_its_autoscaler(local_ray):
    from ray._private import ray_constants as names
    from ray._private.worker import _global_node

    started = set(_global_node.all_processes)
    assert names.PROCESS_TYPE_RAYLET in started
    assert not started & {names.PROCESS_TYPE_LOG_MONITOR, names.PROCESS_TYPE_MONITOR}


def test_a_signal_to_the_process_group_of_a_command_does_not_reach_ray(local_ray):
    local_ray.get(local_ray.remote(num_cpus=0)(lambda: os.getpid()).remote())  # in a worker
    names = {process.name(): process for process in psutil.Process().children(recursive=True)}
    of_ray = {name: process for name, process in names.items() if name in ("gcs_server", "raylet") or "ray::" in name}
    assert {"gcs_server", "raylet"} < of_ray.keys()
    assert os.getpgid(0) not in {os.getpgid(process.pid) for process in of_ray.values()}


def test_storage_does_not_import_ray():
    done = run_python("import sys, cluster.storage; print('ray' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_workers_that_fit_are_accepted(local_ray):
    require_resources(4, WorkerNeeds(cpus=1, gpus=0), "train")
    require_resources(8, WorkerNeeds(cpus=0.5, gpus=0), "train")


def test_too_many_workers_are_refused_with_the_number_that_fits(local_ray):
    with pytest.raises(ValueError, match=r"train asks for 1000 workers.*Set train.num_workers to \d+ or less"):
        require_resources(1000, WorkerNeeds(cpus=1, gpus=0), "train")


def test_a_gpu_on_a_cluster_without_gpus_is_refused(local_ray):
    with pytest.raises(ValueError, match="0 GPU on 1 node.*Set encode.gpus_per_worker to 0"):
        require_resources(1, WorkerNeeds(cpus=1, gpus=1000), "encode")


def test_a_worker_is_not_split_between_two_nodes(monkeypatch, local_ray):
    node = {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}}
    monkeypatch.setattr("ray.nodes", lambda: [node, node, {"Alive": False, "Resources": {"GPU": 8.0}}])
    require_resources(2, WorkerNeeds(cpus=1, gpus=4), "train")
    with pytest.raises(
        ValueError, match="fit on the Ray cluster: 0 .*8 GPU on 2 node.*Reduce the resources that train asks for"
    ):
        require_resources(1, WorkerNeeds(cpus=1, gpus=8), "train")


def test_a_cluster_that_can_grow_is_trusted(monkeypatch, local_ray):
    largest = {"CPU": 64, "GPU": 8}
    monkeypatch.setattr("ray._private.state.state.get_max_resources_from_cluster_config", lambda: largest)
    require_resources(8, WorkerNeeds(cpus=1, gpus=1), "train")


def test_free_workers_are_counted_beside_what_runs(monkeypatch, local_ray):
    nodes = [{"NodeID": name, "Alive": name != "c", "Labels": {}} for name in "abc"]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    free = {"a": {"CPU": 3.0, "GPU": 1.0}, "b": {"CPU": 1.0}}
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: free)
    assert count_free_workers(WorkerNeeds(cpus=1, gpus=0)) == 4
    assert count_free_workers(WorkerNeeds(cpus=2, gpus=0)) == count_free_workers(WorkerNeeds(cpus=1, gpus=1)) == 1
    assert count_free_workers(WorkerNeeds(cpus=1, gpus=1, label_selector={"market": "spot"})) == 0


def cluster_of(monkeypatch, cpus, replies, largest=None):
    """Let the cluster have nodes with so many CPUs each, and let them reply to whether they lack a compiler."""
    nodes = [
        {"Alive": True, "NodeManagerAddress": address, "Resources": {"CPU": count}, "Labels": {}}
        for address, count in cpus.items()
    ]
    replied = [NodeReply(address=address, result=lacks) for address, lacks in replies.items()]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("cluster.session.call_on_nodes", lambda *arguments, **options: replied)
    monkeypatch.setattr("ray._private.state.state.get_max_resources_from_cluster_config", lambda: largest)


@pytest.mark.parametrize(
    ("workers", "replies", "largest"),
    [
        (2, {"a": False, "b": False, "c": True}, None),
        (2, {"a": False, "b": None, "c": True}, None),  # b does not answer
        (1, {"a": False, "b": True, "c": False}, None),
        (2, {"a": True, "b": True, "c": True}, {"CPU": 64}),  # further nodes may be started
    ],
)
def test_workers_that_compile_need_nodes_with_a_compiler_that_hold_them(monkeypatch, workers, replies, largest):
    cluster_of(monkeypatch, {"a": 4, "b": 4, "c": 1}, replies, largest)
    require_compilers(workers, WorkerNeeds(cpus=4))


def test_workers_that_fit_only_where_no_compiler_is_are_refused(monkeypatch):
    cluster_of(monkeypatch, {"a": 4, "b": 4, "c": 1}, {"a": True, "b": False, "c": True})
    with pytest.raises(Failed, match=r"compile = true, and no C\+\+ compiler \(.*\) on a, expected"):
        require_compilers(2, WorkerNeeds(cpus=4))


def test_nodes_say_whether_they_have_a_compiler(local_ray):
    require_compilers(1, WorkerNeeds(cpus=1))
