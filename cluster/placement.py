"""Which nodes can hold a stage's workers, and what is missing where none can; plain dictionaries, no Ray.

A node is an entry of `ray.nodes()`: "Resources" by name, and "Labels".
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ACCELERATOR = "accelerator_type:"
"""Prefix of the resource by which a node tells the type of its accelerators."""
ACCELERATOR_SHARE = 0.001
"""What Ray takes of it for a worker that asks for a type."""
_NAME = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_CONDITION = re.compile(rf"(!?)(?:({_NAME})|in\(({_NAME}(?:, ?{_NAME})*)\))")


@dataclass(frozen=True, kw_only=True)
class WorkerNeeds:
    """What a node must have for one worker. Raises ValueError for a label condition that Ray would not take."""

    cpus: float
    gpus: float = 0
    accelerator_type: str | None = None
    label_selector: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, condition in self.label_selector.items():
            label_condition(key, condition)

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU, {self.gpus:g} GPU each"]
        if self.accelerator_type:
            parts.append(f"on {self.accelerator_type}")
        if self.label_selector:
            parts.append(f"on nodes labelled {_listed(self.label_selector)}")
        return " ".join(parts)

    @property
    def resources(self) -> dict[str, float]:
        """By Ray's names."""
        typed = {f"{ACCELERATOR}{self.accelerator_type}": ACCELERATOR_SHARE} if self.accelerator_type else {}
        return {"CPU": self.cpus, "GPU": self.gpus, **typed}


def label_condition(key: str, condition: str) -> tuple[bool, list[str]]:
    """Whether a label must be (or must not be) one of some values: "a", "!a", "in(a, b)" or "!in(a, b)"."""
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise ValueError(
            f'label_selector: found {key} = {condition!r}, expected a value, "!value", "in(value, value)" or '
            '"!in(value, value)" of letters, digits, dots, dashes and underscores'
        )
    values = [match[2]] if match[2] else re.split(", ?", match[3])
    return not match[1], values


def fits_labels(node: Mapping[str, Any], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels meet all conditions; a label that is not there is none of the values."""
    labels = node.get("Labels", {})
    conditions = ((labels.get(key), *label_condition(key, condition)) for key, condition in selector.items())
    return all((value in values) is wanted for value, wanted, values in conditions)


def workers_on(node: Mapping[str, Any], needs: WorkerNeeds) -> float:
    """How many workers one node holds; a worker cannot be split over two."""
    if not fits_labels(node, needs.label_selector):
        return 0
    asked = [(node["Resources"].get(name, 0), amount) for name, amount in needs.resources.items()]
    return min((have // amount for have, amount in asked if amount), default=math.inf)


def can_grow_to(largest: Mapping[str, float], num_workers: int, needs: WorkerNeeds) -> bool:
    """Whether an autoscaler may still add enough nodes.

    largest: what the cluster may have at most; empty for one of fixed size. Labels of nodes that are not there yet
    are not told, and their accelerators only by some autoscalers, so these count as there.
    """
    if not largest:
        return False
    tells_types = any(name.startswith(ACCELERATOR) for name in largest)
    asked = {name: amount for name, amount in needs.resources.items() if tells_types or name in ("CPU", "GPU")}
    return all(largest.get(name, 0) >= num_workers * amount for name, amount in asked.items())


def what_is_missing(nodes: Sequence[Mapping[str, Any]], num_workers: int, needs: WorkerNeeds, stage: str) -> str | None:
    """Why a cluster of these nodes can never hold a stage's workers, and what to do; None if it can."""
    room = sum(workers_on(node, needs) for node in nodes)
    if room >= num_workers:
        return None
    cpus, gpus = (sum(node["Resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    found = f"{cpus:g} CPU and {gpus:g} GPU on {len(nodes)} node(s)"
    advice = _advice(nodes, needs, stage, room, gpus)
    return (
        f"{stage} asks for {num_workers} workers of {needs}, the Ray cluster has room for {room:g} ({found}); "
        f"{advice}, or join a larger cluster with --address"
    )


def _advice(nodes: Sequence[Mapping[str, Any]], needs: WorkerNeeds, stage: str, room: float, gpus: float) -> str:
    types = {name.removeprefix(ACCELERATOR) for node in nodes for name in node["Resources"] if ACCELERATOR in name}
    if needs.gpus and not gpus:
        return f"set {stage}.gpus_per_worker to 0"
    if needs.accelerator_type and needs.accelerator_type not in types:
        return f"set {stage}.accelerator_type to what is there ({', '.join(sorted(types)) or 'none'}) or leave it out"
    for key, condition in needs.label_selector.items():
        if not any(fits_labels(node, {key: condition}) for node in nodes):
            there = sorted({node["Labels"][key] for node in nodes if key in node.get("Labels", {})})
            return (
                f"no node has {key} = {condition} (there: {', '.join(there) or 'none'}): change {stage}.label_selector"
            )
    if room:
        return f"set {stage}.num_workers to {room:g} or less"
    return f"lower what {stage} asks for per worker"


def _listed(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in labels.items())
