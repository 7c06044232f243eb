"""What the doctor makes of the answers of nodes; a real cluster is asked in tests/pipelines/test_doctor_command.py."""

import json

import pytest

from cluster import node_checks
from cluster.doctor import Check
from cluster.node_checks import Answer, versions

GOOD = Check("storage", True, "s3://bucket can be written")
FULL = Check("storage", False, "/tmp: full", "free some space")


def answer(node, *checks, **changed):
    options = {"versions": versions(), "time": 0.0, "sees_marker": True} | changed
    return Answer(node=node, checks=checks, **options)


@pytest.fixture
def found(monkeypatch, tmp_path):
    def check(*answers, silent=()):
        monkeypatch.setattr(node_checks, "_ask", lambda *_: (list(answers), list(silent)))
        return {check.name: check for check in node_checks.check_nodes(str(tmp_path / "output"))}

    yield check
    assert list(tmp_path.iterdir()) == []


def test_equal_nodes_are_green_with_their_number(found):
    checks = found(answer("10.0.0.1", GOOD), answer("10.0.0.2", GOOD))
    assert all(check.ok for check in checks.values()) and list(checks) == ["nodes", "clocks", "node storage"]
    assert checks["nodes"].found.startswith("2 node(s) with Python 3.")
    assert checks["node storage"].found == "on 2 node(s): s3://bucket can be written"


def test_another_version_on_a_node_is_named_with_ours(found):
    other = versions() | {"raydit": "0.0.9"}
    check = found(answer("10.0.0.1"), answer("10.0.0.2", versions=other))["nodes"]
    assert not check.ok and check.found == f"10.0.0.2 has raydit 0.0.9 (here {versions()['raydit']})" and check.do


def test_a_doctor_that_runs_as_a_job_compares_with_who_sent_it(found, monkeypatch):
    monkeypatch.setenv(node_checks.ASKER, json.dumps(versions() | {"Python": "3.99.0"}))
    assert "(here 3.99.0)" in found(answer("10.0.0.1"))["nodes"].found


def test_a_node_that_does_not_answer_is_named_with_why(found):
    check = found(answer("10.0.0.1"), silent=["10.0.0.2: No module named 'cluster'"])["nodes"]
    assert not check.ok and "10.0.0.2: No module named 'cluster'" in check.found and "install raydit" in check.do


def test_a_clock_that_is_off_is_named(found):
    check = found(answer("10.0.0.1"), answer("10.0.0.2", skew_seconds=400.0))["clocks"]
    assert not check.ok and check.found == "that of 10.0.0.2 is off by 400 s" and "NTP" in check.do


def test_one_node_that_cannot_write_is_red_for_all(found):
    check = found(answer("10.0.0.1", GOOD), answer("10.0.0.2", FULL))["node storage"]
    assert check == Check("node storage", False, "on 10.0.0.2: /tmp: full", "free some space")


def test_a_folder_that_each_node_has_for_itself_is_told_from_a_shared_one(found, tmp_path):
    check = found(answer("10.0.0.1", GOOD), answer("10.0.0.2", GOOD, sees_marker=False))["shared"]
    assert not check.ok and "is a folder of its own on 10.0.0.2" in check.found and "s3://" in check.do
