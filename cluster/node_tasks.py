"""Call a function on every node of the Ray cluster that this process has joined."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class NodeReply(Generic[Result]):
    """What one node replied: a result, or an error if the call failed or the node did not reply in time."""

    address: str
    result: Result | None = None
    error: str = ""


def call_on_nodes(
    function: Callable[..., Result], *arguments: object, timeout_seconds: float, include_this_node: bool = True
) -> Iterator[NodeReply[Result]]:
    """Call a function on all living nodes at the same time, and yield each reply as soon as it arrives.

    The calls reserve no CPU, so they run on nodes that are busy. A node that does not reply in time is yielded with
    an error.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = ray.get_runtime_context().get_node_id()
    task, addresses = ray.remote(num_cpus=0, max_retries=0)(function), {}
    for node in ray.nodes():
        if node["Alive"] and (include_this_node or node["NodeID"] != this_node):
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            addresses[task.options(scheduling_strategy=strategy).remote(*arguments)] = node["NodeManagerAddress"]
    waiting, deadline = list(addresses), time.monotonic() + timeout_seconds
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready, waiting = ray.wait(waiting, timeout=left)
        for reference in ready:
            try:
                yield NodeReply(address=addresses[reference], result=ray.get(reference))
            except ray.exceptions.RayError as error:
                yield NodeReply(address=addresses[reference], error=str(error).strip().splitlines()[-1])
    for reference in waiting:
        yield NodeReply(address=addresses[reference], error=f"no answer in {timeout_seconds:g} s")
