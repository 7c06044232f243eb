"""Relative timing: candidates run alternately, round after round, so that a slow period of the machine affects all of
them equally."""

import contextlib
import itertools
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate in every round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def alternate(candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Call every candidate once per round, and return their timings."""
    return in_turn({name: clocked(call) for name, call in candidates.items()}, rounds, warmup)


def clocked(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that calls `call` and returns the seconds that it took."""

    def timed() -> float:
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return timed


def in_turn(candidates: dict[str, Callable[[], float]], rounds: int, warmup: int = 0) -> dict[str, Timing]:
    """Like `alternate`, for candidates that measure themselves and return their seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(warmup + rounds):
        for name, call in candidates.items():
            spent = call()
            if index >= warmup:
                seconds[name].append(spent)
    return {name: Timing(values) for name, values in seconds.items()}


def take_turns(
    sides: dict[str, list[int]], seconds: float, over: Callable[[], bool]
) -> dict[str, list[tuple[float, float]]]:
    """Run the groups of processes alternately, stopping all others, until `over` returns true. Return the start and end
    (time.time()) of each group's turns, without those of the last round.
    """
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    while True:
        for name in sides:
            for other, processes in sides.items():
                send(signal.SIGCONT if other == name else signal.SIGSTOP, processes)
            begun = time.time()
            time.sleep(seconds)
            turns[name].append((begun, time.time()))
        if over():
            send(signal.SIGCONT, itertools.chain(*sides.values()))
            return {name: of_side[:-1] for name, of_side in turns.items()}


def send(signal_number: int, processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # it has already ended
            os.kill(process, signal_number)


def speed(ours: Timing, theirs: Timing) -> tuple[float, float, float]:
    """Return how many times as fast ours is: median over rounds, lower and upper quartile."""
    ratios = sorted(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True))
    return statistics.median(ratios), ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the exponent p of a fit of cost = c size^p."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def matmul_peak(dtype: torch.dtype = torch.float32, device: str = "cpu", size: int | None = None) -> float:
    """Return the FLOP/s of the fastest of ten square matrix products, as the machine's peak."""
    size = size or (2048 if device == "cpu" else 8192)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    timing = alternate({"matmul": lambda: a @ b}, rounds=10)["matmul"]
    return 2 * size**3 / min(timing.seconds)


def bandwidth(device: str = "cpu", size: int = 2**27) -> float:
    """Return the bytes per second, read and written, of the fastest of ten large memory copies."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = alternate({"copy": lambda: target.copy_(source)}, rounds=10)["copy"]
    return 2 * size / min(timing.seconds)


def say(line: str) -> None:
    print(line, flush=True)
