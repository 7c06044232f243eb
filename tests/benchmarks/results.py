"""Benchmark results: one JSON file and one Markdown table for each kind of device."""

import functools
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from harness import Timing, bandwidth, matmul_peak, say, speed

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure. A new row replaces an earlier one with the same benchmark, case and baseline."""

    benchmark: str
    case: str
    against: str
    """The baseline that ours was measured against, alternately in one run; or "growth exponent"; or empty."""
    value: float | None
    """Speed relative to the baseline, share of the hardware limit, or exponent; None if only `ours` is a figure."""
    low: float | None
    high: float | None
    """Lower and upper quartile over the rounds."""
    ours: str
    """Our own figure, with its unit."""
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.benchmark, self.case, self.against


class Results:
    """Rows of this run, each merged into the earlier ones at once, so that an interrupted run loses none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, benchmark: str, case: str, ours: str, against: str = "", value=None, low=None, high=None) -> None:
        stamp = {"commit": commit(), "date": datetime.now(UTC).date().isoformat()}
        row = Row(benchmark, case, against, value, low, high, ours, **stamp)
        say(f"\n{benchmark}, {case}: {ours}" + (f"; {against}: {format_value(row)}" if value else ""))
        self._put(row)

    def add_speedup(
        self, benchmark: str, case: str, ours: str, against: str, our_time: Timing, their_time: Timing
    ) -> None:
        """Add how many times as fast ours is as the baseline, round by round."""
        self.add(benchmark, case, ours, against, *speed(our_time, their_time))

    def _put(self, row: Row) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = device_name()
        path = self.folder / f"{name}.json"
        old = [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []
        rows = {each.key: each for each in (*old, row)}
        ordered = sorted(rows.values(), key=lambda row: row.key)
        found = {"machine": machine(), "rows": [asdict(row) for row in ordered]}
        path.write_text(json.dumps(found, indent=1) + "\n")
        (self.folder / f"{name}.md").write_text(markdown(found["machine"], ordered))


def format_value(row: Row) -> str:
    spread = "" if row.low is None else f" ({row.low:.2f} to {row.high:.2f})"
    return f"{row.value:.2f}{spread}"


def markdown(machine: dict, rows: list[Row]) -> str:
    lines = [
        "Written by `make benchmark`. *Ratio* is raydit's speed divided by the baseline's in column *Against*, "
        "measured alternately in one run: median over rounds and interquartile range. Against a hardware limit it is "
        "the share of that limit; for growth it is the exponent.",
        "",
        "; ".join(f"{name}: {value}" for name, value in machine.items()),
        "",
        "| Benchmark | Case | raydit | Against | Ratio | Commit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        value = "" if row.value is None else format_value(row)
        lines.append(f"| {row.benchmark} | {row.case} | {row.ours} | {row.against} | {value} | {row.commit} |")
    return "\n".join(lines) + "\n"


def device_name() -> str:
    return torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"


@functools.cache
def machine() -> dict[str, str]:
    """Describe the machine, and its peak speeds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    described = {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "matrix product, float32": f"{matmul_peak(device=device) / 1e9:,.0f} GFLOP/s",
        "copying": f"{bandwidth(device) / 1e9:,.1f} GB/s",
    }
    return described | ({"device": torch.cuda.get_device_name()} if device == "cuda" else {})


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def commit() -> str:
    """Return the measured commit, with a plus sign if there are uncommitted changes."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=FOLDER.parent, capture_output=True, text=True).stdout.strip()

    # Results themselves change while figures are added.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){FOLDER}")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
