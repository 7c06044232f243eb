"""What listens beyond this machine: nothing of a Ray that raydit starts, and much of a head of a cluster."""

import os
import subprocess
import sys

import psutil
import pytest
from mlflow_server import wait_until
from ray_head import started_head

from cluster.doctor import check_ports
from cluster.listeners import Listener, is_loopback, listeners_below, ray_listeners

SERVERS = """
import socket
ports = []
for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET, "0.0.0.0"),
                     (socket.AF_INET6, "::")):
    server = socket.create_server((host, 0), family=family)
    ports.append((server, server.getsockname()[1]))
print(*(port for _, port in ports), flush=True)
input()
"""

JOIN = """
import sys
import ray
from cluster.address import is_on_loopback_only, refuse_wrong_address
from cluster.session import ray_session
refuse_wrong_address(sys.argv[1])
only = is_on_loopback_only(sys.argv[1])
with ray_session(sys.argv[1]):
    print(only, ray.get(ray.remote(ray.util.get_node_ip_address).remote()))
"""


def processes_of_the_local_ray():
    """Return this process, which is the driver, and those that Ray has started; not other tests' servers."""
    from ray._private.worker import _global_node

    return [info.process.pid for infos in _global_node.all_processes.values() for info in infos]


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.0.1.1", True), ("::1", True), ("::ffff:127.0.0.1", True)]
    + [("0.0.0.0", False), ("::", False), ("192.0.2.2", False), ("::ffff:192.0.2.2", False), ("fe80::1%eth0", False)],
)
def test_loopback_addresses(address, expected):
    assert is_loopback(address) is expected


def test_only_what_others_reach_is_listed():
    server = subprocess.Popen([sys.executable, "-c", SERVERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        ports = [int(port) for port in server.stdout.readline().split()]
        found = listeners_below(psutil.Process(server.pid))
        assert {(each.address, each.port) for each in found} == {("0.0.0.0", ports[2]), ("::", ports[3])}
    finally:
        server.communicate("\n")


def test_a_ray_that_raydit_starts_listens_on_loopback_only(local_ray):
    """It answers there, and the sockets of the driver, of Ray's processes and of a worker are all it has."""
    import ray

    @ray.remote(num_cpus=1)
    def own_ports():
        return len([each for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN])

    assert ray.get(own_ports.remote()) >= 1  # a worker has a port; it is one of the raylet's children
    assert ray.util.get_node_ip_address() == "127.0.0.1"
    driver = [each for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    assert driver and all(is_loopback(each.laddr.ip) for each in driver)
    below = [listener for pid in processes_of_the_local_ray() for listener in listeners_below(psutil.Process(pid))]
    assert below == []


@pytest.mark.slow
def test_a_head_of_a_cluster_listens_beyond_its_machine_and_the_doctor_says_so():
    with started_head() as ours:  # of its own: on the tests' head a job runs for a minute, which listens as well
        port = int(ours.ray_address.rpartition(":")[2])
        head = psutil.Process(ours.pid)
        assert Listener("gcs_server", "::", port) in listeners_below(head)
        wait_until(lambda: set(listeners_below(head)) <= set(ray_listeners()))  # workers start and end in between
        check = check_ports()
        assert check.ok and "needs a firewall (cluster/README.md)" in check.found and "\n" not in check.found


@pytest.mark.slow
def test_a_head_that_is_told_so_listens_on_loopback_only():
    """The command of cluster/README.md, "A machine of your own"."""
    with started_head(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0") as head:
        assert listeners_below(psutil.Process(head.pid)) == []
        # Processes that were not told so join it, although Ray would look for it at the machine's own address.
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | head.env
        joined = subprocess.run(
            [sys.executable, "-c", JOIN, head.ray_address],
            env=env | {"PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert joined.stdout == "True 127.0.0.1\n", joined.stderr
