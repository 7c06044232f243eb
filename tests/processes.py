"""Processes of a command, to be killed. Ray's are the driver's descendants."""

from contextlib import suppress
from pathlib import Path

import psutil


def processes_below(parent: int, name: str) -> list[int]:
    """Descendants of a process whose command line has `name` in it."""
    parents, found = {}, []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if name in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile

    def descends(process: int) -> bool:
        while process and process != parent:
            process = parents.get(process, 0)
        return process == parent

    return [process for process in found if descends(process)]


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and all its descendants, and wait for their end. A process that is gone is no error."""
    with suppress(psutil.NoSuchProcess):
        head = psutil.Process(pid)
        processes = [head, *head.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=30)
