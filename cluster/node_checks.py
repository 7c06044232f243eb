"""The doctor's checks of every node of a cluster: versions, clock, shared storage, and checks that the caller
passes."""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster import storage
from cluster.doctor import NO_COMPILER, Check, check_storage, probe_folder
from cluster.node_tasks import call_on_nodes
from cluster.storage.lease import EXPIRY_SECONDS
from raydit.compilers import find_compiler
from raydit.versions import installed_version

ANSWER_SECONDS = 60.0
MAX_CLOCK_SKEW_SECONDS = EXPIRY_SECONDS / 3
"""A lease on an output folder must not expire by a wrong clock; object stores refuse requests from 15 minutes on."""
SENDER_VERSIONS = "RAYDIT_DOCTOR_ASKER"
"""Environment variable with the versions, as JSON, of the machine whose doctor started this doctor as a job."""


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What one node reports about itself."""

    node: str = ""
    """Its address, which the receiver fills in."""
    versions: dict[str, str]
    time: float
    """Seconds since 1970 by the node's clock."""
    sees_marker: bool
    """Whether the node sees the file that the doctor's machine wrote to the output folder."""
    compiler: str | None = None
    """Path of its C++ compiler; None if it has none."""
    checks: tuple[Check, ...]
    skew_seconds: float = 0.0
    """Lower bound of the clock's difference from ours: the time that the call takes is not counted."""


def installed_versions() -> dict[str, str]:
    """Return the versions of Python, Ray and raydit, which must be equal on all nodes."""
    packages = {"Ray": installed_version("ray"), "raydit": installed_version("raydit")}
    return {"Python": platform.python_version()} | {name: found or "not installed" for name, found in packages.items()}


def check_nodes(output: str | None, further: Callable[[], Check] | None = None) -> list[Check]:
    """Check all nodes of the Ray cluster that this process has joined; return one check for each subject.

    output: folder or URI that runs will write to; None omits the checks of storage. further: another check to run on
    each node.
    """
    marker = _write_marker(output) if output else None
    try:
        reports, failures = _collect_reports(output, marker, further)
    finally:
        if marker:
            storage.remove_folder(marker)
    names = dict.fromkeys(check.name for report in reports for check in report.checks)
    checks = [
        _compare_versions(reports, failures),
        _compare_clocks(reports),
        _summarize_compilers(reports),
        *(_summarize(name, reports) for name in names),
    ]
    if blind := [report.node for report in reports if not report.sees_marker]:
        do = "choose a URI (s3://BUCKET/...) or the path of a mount that all nodes share"
        checks.append(Check("shared", False, f"{output} is not the same folder on {', '.join(blind)}", do))
    return checks


def _write_marker(output: str) -> str | None:
    """Write a file that all nodes should see, and return its folder; None if the output is not writable.

    The nodes' own check of storage then reports that.
    """
    marker = probe_folder(output)
    try:
        storage.write_atomically(storage.join(marker, "marker"), b"seen")
    except (OSError, ValueError):
        return None
    return marker


def _collect_reports(
    output: str | None, marker: str | None, further: Callable[[], Check] | None
) -> tuple[list[NodeReport], list[str]]:
    """Return the reports of all nodes, and a message for each node that sent none."""
    reports, failures, started = [], [], time.time()
    for reply in call_on_nodes(_report, output, marker, further, timeout_seconds=ANSWER_SECONDS):
        if reply.result is None:
            failures.append(f"{reply.address}: {reply.error}")
        else:
            skew = max(reply.result.time - time.time(), started - reply.result.time, 0.0)
            reports.append(replace(reply.result, node=reply.address, skew_seconds=skew))
    return reports, failures


def _report(output: str | None, marker: str | None, further: Callable[[], Check] | None) -> NodeReport:
    """Return the report of the node on which this runs."""
    checks = (*([check_storage(output)] if output else []), *([further()] if further else []))
    seen = marker is None or storage.exists(storage.join(marker, "marker"))
    return NodeReport(
        versions=installed_versions(),
        time=time.time(),
        sees_marker=seen,
        compiler=find_compiler(gpu=False),
        checks=checks,
    )


def _compare_versions(reports: list[NodeReport], failures: list[str]) -> Check:
    ours = json.loads(os.environ.get(SENDER_VERSIONS, "null")) or installed_versions()
    if failures:
        do = "install raydit there (with pip, or the image of cluster/deploy/Dockerfile), and read the node's log"
        return Check("nodes", False, f"cannot run raydit: {'; '.join(failures)}", do)
    for report in reports:
        other = [
            f"{name} {found} (here {ours[name]})" for name, found in report.versions.items() if found != ours[name]
        ]
        if other:
            do = "install the same versions on both sides: other versions may lead to other results"
            return Check("nodes", False, f"{report.node} has {', '.join(other)}", do)
    versions = ", ".join(f"{name} {version}" for name, version in ours.items())
    return Check("nodes", True, f"{len(reports)} node(s) with {versions}, as here")


def _compare_clocks(reports: list[NodeReport]) -> Check:
    worst = max(reports, key=lambda report: report.skew_seconds, default=None)
    if worst is None or worst.skew_seconds <= MAX_CLOCK_SKEW_SECONDS:
        return Check("clocks", True, f"agree within {MAX_CLOCK_SKEW_SECONDS:g} s")
    do = "synchronize the nodes by NTP: leases and object stores compare clocks"
    return Check("clocks", False, f"the clock of {worst.node} differs by {worst.skew_seconds:.0f} s", do)


def _summarize_compilers(reports: list[NodeReport]) -> Check:
    """Name the nodes without a compiler; the check passes, as `check_compiler` does."""
    lacking = [report.node for report in reports if report.compiler is None]
    if lacking:
        return Check("node compiler", True, f"on {', '.join(lacking)}: {NO_COMPILER}")
    found = sorted({str(report.compiler) for report in reports})
    return Check("node compiler", True, f"on {len(reports)} node(s): {', '.join(found)}")


def _summarize(name: str, reports: list[NodeReport]) -> Check:
    """Return the first failure of a check, with its node, or what the first node found."""
    found = [(report.node, check) for report in reports for check in report.checks if check.name == name]
    for node, check in found:
        if not check.ok:
            return Check(f"node {name}", False, f"on {node}: {check.found}", check.do)
    return Check(f"node {name}", True, f"on {len(found)} node(s): {found[0][1].found}")
