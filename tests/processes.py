"""Processes of a command, to be killed. Ray's are the driver's descendants."""

from pathlib import Path


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
