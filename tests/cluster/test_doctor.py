"""The doctor's checks of working and of broken machines, servers and storage."""

import http.server
import json
import os
import re
import socket
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict

import pytest

from cluster import doctor
from cluster.doctor import Check


def test_this_python_and_its_packages_are_found():
    assert doctor.check_python().ok
    ray, missing = doctor.check_packages(["ray", "no-such-package"])
    assert ray.ok and ray.found.startswith("2.")
    assert missing == Check("no-such-package", False, "not installed", "pip install no-such-package")


def test_devices_name_the_cores():
    assert f"{os.cpu_count()} CPU cores" in doctor.check_devices().found


def test_a_machine_without_a_compiler_passes_and_is_told_what_needs_one(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert doctor.check_compiler() == Check("compiler", True, doctor.NO_COMPILER)
    (tmp_path / "g++").touch(mode=0o755)
    assert doctor.check_compiler() == Check("compiler", True, str(tmp_path / "g++"))


def test_a_driver_that_torch_cannot_use_fails(monkeypatch):
    def fail(index):
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040)")

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", fail)
    check = doctor.check_devices()
    assert not check.ok and "driver on your system is too old (found version 11040)" in check.found
    assert check.do.startswith("update the driver")


@pytest.mark.parametrize(("of_ray", "of_torch", "ok"), [(1, 0, False), (1, 1, True), (0, 0, True)])
def test_gpus_of_ray_that_torch_does_not_find_fail(monkeypatch, of_ray, of_torch, ok):
    monkeypatch.setattr(doctor, "ray_session", nullcontext)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0, "GPU": of_ray})
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}])
    monkeypatch.setattr("torch.cuda.device_count", lambda: of_torch)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check = doctor.check_ray()
    assert check.ok == ok and f"2 CPU, {of_ray} GPU on 1 node(s)" in check.found
    assert ok or "finds no GPU" in check.found and "set gpus_per_worker = 0" in check.do


def test_writable_storage_passes_and_is_left_as_it_was(tmp_path):
    check = doctor.check_storage(str(tmp_path / "outputs" / "cifar10"))
    assert check.ok and "GiB free" in check.found
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["/proc/raydit", "ftp://host/folder"])
def test_storage_that_is_not_writable_fails(path):
    check = doctor.check_storage(path)
    assert not check.ok
    assert check.found.startswith(path) and check.do


def test_a_job_server_is_asked_over_http(ray_head, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_head.token)
    assert doctor.check_ray(ray_head.address).ok
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    check = doctor.check_ray(ray_head.address)
    assert not check.ok and "another token" in check.found and "\n" not in check.found


def test_an_unreachable_ray_fails(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests may have started Ray
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        check = doctor.check_ray(f"127.0.0.1:{unused.getsockname()[1]}")
    assert not check.ok and "no Ray answers" in check.found


@pytest.mark.slow
def test_a_local_ray_starts():
    check = doctor.check_ray()
    assert check.ok and "on 1 node" in check.found


def test_lines_are_aligned_and_failures_say_what_to_do():
    checks = [Check("ray", True, "2.60.0"), Check("storage", False, "/x: full", "free some space")]
    assert doctor.render(checks) == "ok ray      2.60.0\n!! storage  /x: full -> free some space"
    assert json.loads(json.dumps([asdict(check) for check in checks]))[1]["do"] == "free some space"


@pytest.fixture
def open_server():
    """A job server without a token, whose clock is an hour late. Requests for /500 and so on are answered so."""

    class Open(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            code = self.path[1:4]
            self.send_response(int(code) if code.isdigit() else 200)
            self.end_headers()
            self.wfile.write(b"{}")

        def date_time_string(self, timestamp=None):
            return super().date_time_string(time.time() - 3600)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Open)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_job_server_without_a_token_fails(open_server, ray_head):
    check = doctor.check_token(open_server)
    assert not check.ok and "CVE-2023-48022" in check.found and "RAY_AUTH_MODE=token" in check.do
    assert doctor.check_token(ray_head.address).ok


@pytest.mark.parametrize(("code", "refuses"), [(401, True), (403, True), (302, False), (500, False)])
def test_only_a_refusal_shows_that_a_token_is_needed(open_server, code, refuses):
    check = doctor.check_token(f"{open_server}/{code}")
    assert check.ok == refuses and (refuses or str(code) in check.found)


def test_another_server_than_rays_is_named_without_what_else_was_expected(open_server):
    check = doctor.check_ray(open_server)
    assert check.found == f"{open_server} is not a Ray job server" and "8265" in check.do


def test_a_wrong_clock_fails(open_server, ray_head, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_head.token)
    check = doctor.check_head_clock(open_server, max_seconds=30)
    assert not check.ok and re.match(r"the head's clock differs from ours by 3\d\d\d s", check.found)
    assert doctor.check_head_clock(ray_head.address, max_seconds=30).ok
