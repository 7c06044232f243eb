"""The doctor's questions to every node of a cluster: versions, clock, storage, and what the caller adds."""

import json
import os
import platform
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata

from cluster import storage
from cluster.doctor import Check, check_storage
from cluster.storage.temporaries import TEMPORARY_PREFIX

ANSWER_SECONDS = 60.0
MOST_SKEW_SECONDS = 30.0
"""A third of what a lease on an output folder lasts; object stores refuse requests from 15 minutes on."""
ASKER = "RAYDIT_DOCTOR_ASKER"
"""Versions of the machine whose doctor sent this one as a job, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one node has."""

    node: str
    """Its address."""
    versions: dict[str, str]
    time: float
    """Seconds since 1970, by its clock."""
    sees_marker: bool
    """Whether the file is there that the asking process has left in the output folder."""
    checks: tuple[Check, ...]
    skew_seconds: float = 0.0
    """How far its clock is off for certain; the way of the question and the answer is not counted."""


def versions() -> dict[str, str]:
    """Of Python, and of what must be the same everywhere."""
    return {"Python": platform.python_version(), "Ray": _version("ray"), "raydit": _version("raydit")}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def check_nodes(output: str | None, further: Callable[[], Check] | None = None) -> list[Check]:
    """Ask all nodes of the Ray that this process has joined; one check for each matter.

    output: folder or URI where runs will write; None leaves storage out. further: one more check to run on each.
    """
    marker = _leave_marker(output) if output else None
    try:
        answers, silent = _ask(output, marker, further)
    finally:
        if marker:
            storage.remove_folder(marker)
    names = dict.fromkeys(check.name for answer in answers for check in answer.checks)
    checks = [_versions(answers, silent), _clocks(answers), *(_merged(name, answers) for name in names)]
    if blind := [answer.node for answer in answers if not answer.sees_marker]:
        do = "choose a URI (s3://BUCKET/...) or the path of a mount that all nodes share"
        checks.append(Check("shared", False, f"{output} is a folder of its own on {', '.join(blind)}", do))
    return checks


def _leave_marker(output: str) -> str | None:
    """A folder that all nodes should see; None where nothing can be written, which the nodes will say."""
    folder = storage.nearest_folder(output) if storage.is_local(output) else output
    marker = storage.join(folder, f"{TEMPORARY_PREFIX}doctor-{secrets.token_hex(4)}")
    try:
        storage.write_atomically(storage.join(marker, "marker"), b"seen")
    except (OSError, ValueError):
        return None
    return marker


def _ask(output: str | None, marker: str | None, further: Callable[[], Check] | None) -> tuple[list[Answer], list[str]]:
    """The answers, and the nodes that gave none, with why."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task, asked, started = ray.remote(num_cpus=0, max_retries=0)(_answer), {}, time.time()
    for node in (node for node in ray.nodes() if node["Alive"]):
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        reference = task.options(scheduling_strategy=place).remote(node["NodeManagerAddress"], output, marker, further)
        asked[reference] = node["NodeManagerAddress"]
    answers, silent, waiting, deadline = [], [], list(asked), time.monotonic() + ANSWER_SECONDS
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready, waiting = ray.wait(waiting, timeout=left)
        for reference in ready:
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                silent.append(f"{asked[reference]}: {str(error).strip().splitlines()[-1]}")
            else:
                skew = max(answer.time - time.time(), started - answer.time, 0.0)
                answers.append(replace(answer, skew_seconds=skew))
    return answers, silent + [f"{asked[reference]}: no answer in {ANSWER_SECONDS:g} s" for reference in waiting]


def _answer(node: str, output: str | None, marker: str | None, further: Callable[[], Check] | None) -> Answer:
    """Runs on the node."""
    checks = (*([check_storage(output)] if output else []), *([further()] if further else []))
    seen = marker is None or storage.exists(storage.join(marker, "marker"))
    return Answer(node=node, versions=versions(), time=time.time(), sees_marker=seen, checks=checks)


def _versions(answers: list[Answer], silent: list[str]) -> Check:
    ours = json.loads(os.environ.get(ASKER, "null")) or versions()
    if silent:
        do = "install raydit there (pip, or the image of cluster/deploy/Dockerfile), and look at the node's log"
        return Check("nodes", False, f"cannot run raydit: {'; '.join(silent)}", do)
    for answer in answers:
        other = [
            f"{name} {found} (here {ours[name]})" for name, found in answer.versions.items() if found != ours[name]
        ]
        if other:
            do = "install the same on both sides: results of another version are not those that were tested here"
            return Check("nodes", False, f"{answer.node} has {', '.join(other)}", do)
    return Check(
        "nodes", True, f"{len(answers)} node(s) with {', '.join(f'{k} {v}' for k, v in ours.items())}, as here"
    )


def _clocks(answers: list[Answer]) -> Check:
    worst = max(answers, key=lambda answer: answer.skew_seconds, default=None)
    if worst is None or worst.skew_seconds <= MOST_SKEW_SECONDS:
        return Check("clocks", True, f"agree within {MOST_SKEW_SECONDS:g} s")
    do = "let the nodes keep time by NTP: leases and object stores compare clocks"
    return Check("clocks", False, f"that of {worst.node} is off by {worst.skew_seconds:.0f} s", do)


def _merged(name: str, answers: list[Answer]) -> Check:
    """The first failure of a check, with its node; else what was found on the first."""
    found = [(answer.node, check) for answer in answers for check in answer.checks if check.name == name]
    for node, check in found:
        if not check.ok:
            return Check(f"node {name}", False, f"on {node}: {check.found}", check.do)
    return Check(f"node {name}", True, f"on {len(found)} node(s): {found[0][1].found}")
