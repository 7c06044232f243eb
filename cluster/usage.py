"""How busy machines are: CPU, memory and GPUs, of this one or of all nodes of a Ray."""

import shutil
import subprocess
import sys
import time

ANSWER_SECONDS = 5.0
_GPU_FIELDS = ("utilization.gpu", "memory.used", "memory.total")

CpuTimes = tuple[int, int]


def cpu_times() -> CpuTimes:
    """Time that all cores together have worked, and that has passed, since the start of the machine; Linux's ticks."""
    with open("/proc/stat") as file:
        ticks = [int(field) for field in file.readline().split()[1:9]]
    idle = ticks[3] + ticks[4]  # the disk is waited for in the second
    return sum(ticks) - idle, sum(ticks)


def machine_usage(since: CpuTimes) -> dict[str, float]:
    """Shares in percent and memory in MiB, of the CPU since `since`, by the names that MLflow's UI groups."""
    worked, passed = (now - before for now, before in zip(cpu_times(), since, strict=True))
    usage = {"cpu_utilization_percentage": 100.0 * worked / max(1, passed)}
    memory = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, value = line.split()[:2]
            memory[name] = int(value) / 1024
    used = memory["MemTotal:"] - memory["MemAvailable:"]
    usage["system_memory_usage_megabytes"] = used
    usage["system_memory_usage_percentage"] = 100.0 * used / memory["MemTotal:"]
    return usage | gpu_usage()


def gpu_usage() -> dict[str, float]:
    """The same of NVIDIA's GPUs, asked through their tool, which takes no memory on them; nothing without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ANSWER_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return gpus_of(answer)


def gpus_of(answer: str) -> dict[str, float]:
    """The numbers in nvidia-smi's answer, a line for each GPU; what a GPU does not tell is left out."""
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
    except ValueError:  # such as [N/A], of a divided GPU
        return None


def other_nodes_usage() -> dict[str, dict[str, float]]:
    """Usage of every node but this one of the Ray that this process has joined, by its address; of those that answer.

    Nothing without a Ray, or on one machine.
    """
    if "ray" not in sys.modules:
        return {}
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        return {}
    here = ray.get_runtime_context().get_node_id()
    task, asked = ray.remote(num_cpus=0, max_retries=0)(_usage_of_a_second), {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != here:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[task.options(scheduling_strategy=place).remote()] = node["NodeManagerAddress"]
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS) if asked else ([], [])
    usage = {}
    for reference in answered:
        try:
            usage[asked[reference]] = ray.get(reference)
        except Exception:  # a node that is lost meanwhile is missed by the work itself
            continue
    return usage


def _usage_of_a_second() -> dict[str, float]:
    since = cpu_times()
    time.sleep(1.0)
    return machine_usage(since)
