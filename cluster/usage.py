"""How busy machines are: CPU, memory and GPUs of this machine, or of all nodes of a Ray cluster."""

import shutil
import subprocess
import sys

import psutil

from cluster.node_tasks import call_on_nodes

ANSWER_SECONDS = 5.0
_GPU_FIELDS = ("utilization.gpu", "memory.used", "memory.total")


def start_measuring_cpu() -> None:
    """Begin the interval over which this thread's next call of measure_usage averages the CPU utilization."""
    psutil.cpu_percent()


def measure_usage(seconds: float | None = None) -> dict[str, float]:
    """Return the usage of this machine in percent and MiB, by the metric names that MLflow's UI groups.

    CPU utilization is averaged over the given time, in which this function blocks, or since the previous call in the
    same thread (see start_measuring_cpu). Memory and GPUs are read at the end of it.
    """
    usage = {"cpu_utilization_percentage": psutil.cpu_percent(seconds)}
    memory = psutil.virtual_memory()
    used = memory.total - memory.available
    usage["system_memory_usage_megabytes"] = used / 2**20
    usage["system_memory_usage_percentage"] = 100.0 * used / memory.total
    return usage | query_gpu_usage()


def query_gpu_usage() -> dict[str, float]:
    """Return the usage of NVIDIA GPUs in percent and MiB; empty without nvidia-smi.

    nvidia-smi is asked because, unlike a CUDA context, it takes no GPU memory.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ANSWER_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_gpu_usage(answer)


def parse_gpu_usage(answer: str) -> dict[str, float]:
    """Return the metrics in nvidia-smi's answer, which has a line for each GPU, without values that a GPU lacks."""
    usage = {}
    for index, line in enumerate(answer.splitlines()):
        busy, used, total = (_number(field) for field in line.split(","))
        if busy is not None:
            usage[f"gpu_{index}_utilization_percentage"] = busy
        if used is not None and total:
            usage[f"gpu_{index}_memory_usage_megabytes"] = used
            usage[f"gpu_{index}_memory_usage_percentage"] = 100.0 * used / total
    return usage


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:  # such as [N/A], of a GPU that is divided (MIG)
        return None


def measure_other_nodes() -> dict[str, dict[str, float]]:
    """Return the usage of the other nodes of the Ray cluster that this process has joined, by their addresses.

    CPU utilization is averaged over a second. A node that does not answer is left out. Empty without Ray, and on one
    machine.
    """
    if "ray" not in sys.modules:
        return {}
    import ray

    if not ray.is_initialized():
        return {}
    replies = call_on_nodes(measure_usage, 1.0, timeout_seconds=ANSWER_SECONDS, include_this_node=False)
    return {reply.address: reply.result for reply in replies if reply.result is not None}
