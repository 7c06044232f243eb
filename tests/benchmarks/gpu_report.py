"""Parts of a benchmark under one limit of time, and its figures as lines, JSON and a Markdown table.

Needs only torch.
"""

import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import say

STARTED = time.monotonic()
"""When torch was imported, and the script began."""

KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "sm80_xmma", "sm90_xmma", "splitk"),
    "optimizer and averages": ("multi_tensor", "foreach", "adam", "lerp"),
}
"""Kinds of GPU kernels by parts of their lower-case names, in the order in which they are looked for."""

FUSED = "triton_"
"""How names of kernels begin that torch's compiler has made of elementwise operations and reductions.

The rest of such a name lists the operations that it comes from, also of those that other kernels compute.
"""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured figure, with the speed of the matrix product that was measured just before."""

    what: str
    value: float | None
    """None where nothing was measured; then `note` says why."""
    unit: str = ""
    product: float | None = None
    """FLOPs per second of the GPU's matrix product in bfloat16, measured just before."""
    share: float | None = None
    """FLOPs per second of the measured work as a share of `product`."""
    target: float | None = None
    """Target on an H200-class GPU: a value of `share`, or of `value` if there is no share."""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A part of a benchmark."""

    seconds: float
    """Expected upper bound of its duration; the part is skipped if less time is left."""
    measure: Callable[[], Iterable[Figure]]
    """Yields each figure as soon as it is measured."""
    needs: str = ""
    """Package without which the part is left out."""


class GpuReport:
    """The figures of a run, written to disk after each one, so that an interrupted run loses none."""

    def __init__(self, folder: Path, name: str, machine: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.machine = folder / name, machine
        self.figures: list[Figure] = []
        self.failed = False

    def run(self, parts: dict[str, Part], limit_seconds: float) -> None:
        """Run the parts in turn while they fit into the limit, which counts from STARTED."""
        for name, part in parts.items():
            left = limit_seconds - elapsed()
            if left < part.seconds:
                self.add(Figure(what=name, value=None, note=f"left out: {left:.0f} s were left of {part.seconds:.0f}"))
                continue
            try:
                for figure in part.measure():
                    self.add(figure)
            except ImportError as error:
                self.failed |= not part.needs or (error.name or "").partition(".")[0] != part.needs
                self.add(Figure(what=name, value=None, note=f"left out: {error}"))
            except Exception as error:  # the other parts still run
                traceback.print_exc()
                self.failed = True
                self.add(Figure(what=name, value=None, note=f"failed: {type(error).__name__}: {error}"[:200]))
            torch.compiler.reset()  # the next part compiles as if it were the only one
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)
        say(f"[{elapsed():4.0f} s] " + " | ".join(cell for cell in cells(figure) if cell))
        content = {"machine": self.machine, "seconds": elapsed(), "figures": [asdict(each) for each in self.figures]}
        self.path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(self.markdown())

    def markdown(self) -> str:
        """Return the machine and a table of all figures."""
        head = ["what", "figure", "GPU's bf16 product", "share of it", "target", "notes"]
        lines = [head, ["---"] * len(head), *(cells(figure) for figure in self.figures)]
        machine = "; ".join(f"{name}: {value}" for name, value in self.machine.items())
        return machine + "\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def elapsed() -> float:
    """Return the seconds since the start."""
    return time.monotonic() - STARTED


def cells(figure: Figure) -> list[str]:
    """Return a figure as the cells of a table's row."""
    value = "" if figure.value is None else f"{figure.value:,.4g} {figure.unit}".strip()
    product = "" if figure.product is None else f"{figure.product / 1e12:,.4g} TFLOP/s"
    share = "" if figure.share is None else f"{figure.share:.2f}"
    target = "" if figure.target is None else f"{figure.target:g}"
    details = ", ".join(f"{name} {format_detail(value)}" for name, value in figure.details.items())
    return [figure.what, value, product, share, target, "; ".join(filter(None, (figure.note, details)))]


def format_detail(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def busy_share(intervals: Iterable[tuple[float, float]]) -> tuple[float, list[float]]:
    """Return the share of time from the first start to the last end that is in an interval, and the largest gaps.

    intervals: start and end of each kernel, which may overlap.
    """
    ordered = sorted(intervals)
    busy, first, last, gaps = 0.0, ordered[0][0], ordered[0][0], []
    for start, end in ordered:
        if start > last:
            gaps.append(start - last)
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return busy / (last - first), sorted(gaps, reverse=True)[:5]


def kind_of(kernel: str) -> str:
    """Return the kind of work of a GPU kernel by its name."""
    name = kernel.lower()
    if name.startswith(FUSED):
        return "fused elementwise"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "others")


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return what ran on the GPU in a trace of torch's profiler: events with "name", "ts" and "dur" in microseconds."""
    events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
