"""Where the address of Ray comes from, and what is said of one where no Ray can be joined."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.address import given_address, refuse_wrong_address
from cluster.job_server import is_this_machine, server_url
from raydit.errors import InvalidInput, Unreachable

CHECK = "import sys; from cluster.address import refuse_wrong_address; refuse_wrong_address(sys.argv[1])"


@pytest.fixture(autouse=True)
def no_ray_in_this_process(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_flag_comes_before_the_variable_and_both_are_named(monkeypatch):
    assert given_address(None) == ("local", "")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert given_address(None) == ("head:6379", "RAY_ADDRESS")
    assert given_address("other:6379") == ("other:6379", "--address")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "head"])
def test_an_address_of_another_kind_is_refused_with_its_source(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InvalidInput, match=f"RAY_ADDRESS: found the Ray address '{address}', expected \"HOST:PORT\""):
        refuse_wrong_address(None)


def test_an_address_where_nothing_answers_is_reported_with_its_source(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(Unreachable, match="--address: no Ray answers.*ray start --head.*unset --address"):
            refuse_wrong_address(address)


def test_the_port_of_another_server_is_reported(ray_head):
    with pytest.raises(Unreachable, match="no Ray answers at .*another server"):
        refuse_wrong_address(ray_head.address.removeprefix("http://"))


@pytest.mark.parametrize(("token", "accepted"), [("right", True), ("wrong", False), (None, False)])
def test_a_token_file_is_used_without_further_settings(ray_head, tmp_path, token, accepted):
    """In a process of its own: Ray keeps the token of a process."""
    (tmp_path / ".ray").mkdir()
    if token:
        (tmp_path / ".ray" / "auth_token").write_text(ray_head.token if token == "right" else token)
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CHECK, ray_head.ray_address]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == accepted, done.stderr
    last = done.stderr.strip().splitlines()[-1:]
    assert accepted or "refuses our token, or we have none" in last[0] and "Set RAY_AUTH_TOKEN" in last[0]


JOIN = """
import ray, sys
from cluster.session import ray_session
with ray_session(sys.argv[1]):
    class Echo:
        def echo(self, text):
            return text
    print(ray.get(ray.remote(Echo).options(num_cpus=0).remote().echo.remote("answered")))
"""


@pytest.fixture
def open_cluster(monkeypatch):
    """Address of a cluster without token authentication."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["", "token"])
def test_a_token_is_left_off_where_the_cluster_wants_none(open_cluster, tmp_path, mode):
    """With it this process would refuse what the cluster asks it, and each of its actors would count as dead."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    env |= {"RAY_AUTH_MODE": mode} if mode else {}
    command = [sys.executable, "-c", JOIN, open_cluster]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    if mode:
        assert done.returncode == 1 and "has no token authentication, which is on in this process" in done.stderr
    else:
        assert done.stdout == "answered\n", done.stderr


@pytest.mark.parametrize("address", ["http://[::1:8265", "http://", "head:8265"])
def test_an_address_of_a_job_server_that_is_no_url_is_refused(address):
    for function in (server_url, is_this_machine):
        with pytest.raises(InvalidInput, match=re.escape(f"job server address: found '{address}'")) as refused:
            function(address)
        assert refused.value.exit_code == 2
