"""Count how many workers of a stage fit on the nodes of a cluster, and say what is missing if they do not.

The functions take entries of `ray.nodes()` and do not import Ray.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from raydit.errors import InvalidInput

ACCELERATOR_PREFIX = "accelerator_type:"
"""Prefix of the resource that names the type of a node's accelerators."""
ACCELERATOR_SHARE = 0.001
"""Amount of that resource that Ray reserves for a worker that requires the type."""
RESOURCE_UNITS = 10_000
"""Parts of a resource that Ray counts in: it rounds amounts to four digits."""
_NAME = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_CONDITION = re.compile(rf"(!?)(?:({_NAME})|in\(({_NAME}(?:, ?{_NAME})*)\))")


class RayNode(TypedDict, total=False):
    """An entry of `ray.nodes()`, as far as it is used here."""

    Resources: dict[str, float]
    Labels: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class WorkerNeeds:
    """What a node must have for one worker. Raises InvalidInput for a label condition that Ray would refuse."""

    cpus: float
    gpus: float = 0
    accelerator_type: str | None = None
    label_selector: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, condition in self.label_selector.items():
            parse_label_condition(key, condition)

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU, {self.gpus:g} GPU each"]
        if self.accelerator_type:
            parts.append(f"on {self.accelerator_type}")
        if self.label_selector:
            parts.append(f"on nodes labelled {_format_labels(self.label_selector)}")
        return " ".join(parts)

    @property
    def resources(self) -> dict[str, float]:
        """Required amounts by the names of Ray's resources."""
        typed = {f"{ACCELERATOR_PREFIX}{self.accelerator_type}": ACCELERATOR_SHARE} if self.accelerator_type else {}
        return {"CPU": self.cpus, "GPU": self.gpus, **typed}


def parse_label_condition(key: str, condition: str) -> tuple[bool, list[str]]:
    """Parse the condition on a label: "a", "!a", "in(a, b)" or "!in(a, b)".

    Returns whether the label must be (True) or must not be (False) one of some values, and these values. Raises
    InvalidInput.
    """
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise InvalidInput(
            f"label_selector: found {key} = {condition!r}",
            'a value, "!value", "in(value, value)" or "!in(value, value)"',
            "correct the condition; values consist of letters, digits, dots, dashes and underscores",
        )
    values = [match[2]] if match[2] else re.split(", ?", match[3])
    return not match[1], values


def has_labels(node: RayNode, selector: Mapping[str, str]) -> bool:
    """Return whether a node's labels meet all conditions; a missing label equals none of the values."""
    labels = node.get("Labels", {})
    conditions = ((labels.get(key), *parse_label_condition(key, condition)) for key, condition in selector.items())
    return all((value in values) is wanted for value, wanted, values in conditions)


def count_workers(node: RayNode, needs: WorkerNeeds) -> float:
    """Return how many workers fit on one node; a worker cannot be split between nodes."""
    if not has_labels(node, needs.label_selector):
        return 0
    asked = [(name, node["Resources"].get(name, 0), amount) for name, amount in needs.resources.items()]
    return min((count_fitting(*each) for each in asked if each[2]), default=math.inf)


def count_fitting(resource: str, have: float, amount: float) -> int:
    """Return how many workers that need an amount of a resource fit into what there is, as Ray counts.

    Workers that need a fraction of a GPU share one; no worker is split across two.
    """
    if resource == "GPU" and amount < 1:
        return int(have) * _count_units(1.0, amount)
    return _count_units(have, amount)


def _count_units(have: float, amount: float) -> int:
    # In whole units, because in floating point 1.0 // 0.1 is 9.
    return round(have * RESOURCE_UNITS) // max(1, round(amount * RESOURCE_UNITS))


def can_grow_to(largest: Mapping[str, float], num_workers: int, needs: WorkerNeeds) -> bool:
    """Return whether an autoscaler can add enough nodes.

    largest: maximum resources of the cluster; empty for a cluster of fixed size. Autoscalers do not report the labels
    of nodes that they could add, and only some report their accelerators; what is not reported counts as available.
    """
    if not largest:
        return False
    reports_types = any(name.startswith(ACCELERATOR_PREFIX) for name in largest)
    asked = {
        name: amount for name, amount in needs.resources.items() if amount and (reports_types or name in ("CPU", "GPU"))
    }
    return all(count_fitting(name, largest.get(name, 0), amount) >= num_workers for name, amount in asked.items())


def explain_missing_resources(
    nodes: Sequence[RayNode], num_workers: int, needs: WorkerNeeds, stage: str
) -> InvalidInput | None:
    """Return the error for a stage whose workers never fit on these nodes, with what to do; None if they fit."""
    room = sum(count_workers(node, needs) for node in nodes)
    if room >= num_workers:
        return None
    cpus, gpus = (sum(node["Resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    found = f"{cpus:g} CPU and {gpus:g} GPU on {len(nodes)} node(s)"
    return InvalidInput(
        f"{stage} asks for {num_workers} workers of {needs}",
        f"no more than fit on the Ray cluster: {room:g} ({found})",
        f"{_advise(nodes, needs, stage, room, gpus)}, or join a larger cluster with --address",
    )


def _advise(nodes: Sequence[RayNode], needs: WorkerNeeds, stage: str, room: float, gpus: float) -> str:
    types = {
        name.removeprefix(ACCELERATOR_PREFIX)
        for node in nodes
        for name in node["Resources"]
        if name.startswith(ACCELERATOR_PREFIX)
    }
    if needs.gpus and not gpus:
        return f"set {stage}.gpus_per_worker to 0"
    if needs.accelerator_type and needs.accelerator_type not in types:
        return f"set {stage}.accelerator_type to an available type ({', '.join(sorted(types)) or 'none'}) or remove it"
    for key, condition in needs.label_selector.items():
        if not any(has_labels(node, {key: condition}) for node in nodes):
            values = sorted({node["Labels"][key] for node in nodes if key in node.get("Labels", {})})
            found = f"no node has {key} = {condition} (values: {', '.join(values) or 'none'})"
            return f"change {stage}.label_selector: {found}"
    if room:
        return f"set {stage}.num_workers to {room:g} or less"
    return f"reduce the resources that {stage} asks for per worker"


def _format_labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in labels.items())
