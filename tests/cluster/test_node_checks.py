"""How the doctor judges the reports of nodes; tests/pipelines/cli/test_doctor_command.py asks a real cluster."""

import json

import pytest

from cluster import node_checks
from cluster.doctor import Check
from cluster.node_checks import NodeReport, installed_versions

GOOD = Check("storage", True, "s3://bucket is writable")
FULL = Check("storage", False, "/tmp: full", "free some space")

NAMES = ["nodes", "clocks", "node compiler"]


def report(node, *checks, **changed):
    options = {"versions": installed_versions(), "time": 0.0, "sees_marker": True} | changed
    return NodeReport(node=node, checks=checks, **options)


@pytest.fixture
def found(monkeypatch, tmp_path):
    def check(*reports, failures=()):
        monkeypatch.setattr(node_checks, "_collect_reports", lambda *_: (list(reports), list(failures)))
        return {check.name: check for check in node_checks.check_nodes(str(tmp_path / "output"))}

    yield check
    assert list(tmp_path.iterdir()) == []


def test_equal_nodes_pass_with_their_number(found):
    checks = found(report("10.0.0.1", GOOD), report("10.0.0.2", GOOD))
    assert all(check.ok for check in checks.values()) and list(checks) == [*NAMES, "node storage"]
    assert checks["nodes"].found.startswith("2 node(s) with Python 3.")
    assert checks["node storage"].found == "on 2 node(s): s3://bucket is writable"


def test_another_version_on_a_node_is_reported_with_ours(found):
    other = installed_versions() | {"raydit": "0.0.9"}
    check = found(report("10.0.0.1"), report("10.0.0.2", versions=other))["nodes"]
    assert (
        not check.ok
        and check.found == f"10.0.0.2 has raydit 0.0.9 (here {installed_versions()['raydit']})"
        and check.do
    )


def test_a_doctor_that_runs_as_a_job_compares_with_the_sender(found, monkeypatch):
    monkeypatch.setenv(node_checks.SENDER_VERSIONS, json.dumps(installed_versions() | {"Python": "3.99.0"}))
    assert "(here 3.99.0)" in found(report("10.0.0.1"))["nodes"].found


def test_a_node_that_does_not_answer_is_reported_with_the_reason(found):
    check = found(report("10.0.0.1"), failures=["10.0.0.2: No module named 'cluster'"])["nodes"]
    assert not check.ok and "10.0.0.2: No module named 'cluster'" in check.found and "install raydit" in check.do


def test_a_wrong_clock_is_reported(found):
    check = found(report("10.0.0.1"), report("10.0.0.2", skew_seconds=400.0))["clocks"]
    assert not check.ok and check.found == "the clock of 10.0.0.2 differs by 400 s" and "NTP" in check.do


def test_one_node_that_cannot_write_fails_the_check(found):
    check = found(report("10.0.0.1", GOOD), report("10.0.0.2", FULL))["node storage"]
    assert check == Check("node storage", False, "on 10.0.0.2: /tmp: full", "free some space")


def test_a_folder_that_the_nodes_do_not_share_is_reported(found, tmp_path):
    check = found(report("10.0.0.1", GOOD), report("10.0.0.2", GOOD, sees_marker=False))["shared"]
    assert not check.ok and "is not the same folder on 10.0.0.2" in check.found and "s3://" in check.do


def test_nodes_without_a_compiler_are_named_and_pass(found):
    check = found(report("10.0.0.1", compiler="/usr/bin/g++"), report("10.0.0.2"))["node compiler"]
    assert check.ok and check.found.startswith("on 10.0.0.2: no C++ compiler, which compile = true in a recipe needs")
    check = found(*(report(node, compiler="/usr/bin/g++") for node in "ab"))["node compiler"]
    assert check == Check("node compiler", True, "on 2 node(s): /usr/bin/g++")
