"""Fakes of the interfaces behind which jobs see tracking, Ray and the console: one for each Protocol."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipelines.console import Progress, say
from pipelines.tracking.run_log import DatasetRef


class FakeRun:
    """A `pipelines.tracking.run_log.RunLog` that keeps what is logged.

    points: metrics of earlier commands, by name without "train/" and by step.
    """

    key = "fake"

    def __init__(self, points: dict[str, dict[int, float]] | None = None) -> None:
        self._points = points or {}
        self.logged: dict[str, dict[int, float]] = {}
        """Metrics by name and step."""
        self.models: dict[str, tuple[str, int, str]] = {}
        """Name, step and URI of checkpoints by digest."""
        self.removed: list[str] = []
        """Digests of removed checkpoints."""
        self.files: list[tuple[str | Path, str | None]] = []
        """Artifacts with their folder, and images with their key."""

    def points(self, prefix: str) -> dict[str, dict[int, float]]:
        return {name: dict(values) for name, values in self._points.items()} if prefix == "train/" else {}

    def params(self, params: dict[str, Any]) -> None: ...

    def settings(self, settings: dict[str, Any]) -> None: ...

    def tag(self, name: str, value: str) -> None: ...

    def metrics(
        self, metrics: dict[str, float], step: int = 0, *, model: str = "", dataset: DatasetRef | None = None
    ) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, {})[step] = value

    def values(self, name: str) -> dict[int, float]:
        """Return the logged values of a metric by step."""
        return self.logged.get(name, {})

    def model(self, digest: str, *, name: str, step: int, params: dict[str, Any], tags: dict[str, str]) -> None:
        self.models[digest] = (name, step, tags["raydit.checkpoint"])

    def model_removed(self, digest: str) -> None:
        self.removed.append(digest)

    def model_picture(self, digest: str, artifact: str) -> None: ...

    def scores(self, digest: str, metrics: dict[str, float], step: int, protocol_id: str) -> None: ...

    def input(self, *, name: str, digest: str, source: str, context: str) -> None: ...

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        self.files.append((path, folder))

    def image(self, path: str | Path, key: str, step: int) -> None:
        self.files.append((path, key))

    def end(self, status: str) -> None: ...


class FakeContext:
    """A `pipelines.stage.JobContext` without Ray, whose runs are one FakeRun, of an output that can be written."""

    is_writable = True

    def __init__(self) -> None:
        self.last_run = FakeRun()

    @contextmanager
    def run(
        self, stage: str, identity: dict[str, Any], tags: dict[str, str] | None = None, *, resumes: str | None = None
    ) -> Iterator[FakeRun]:
        yield self.last_run

    def progress(self, stage: str, *, total: int, unit: str, start: int = 0) -> Progress:
        return Progress(stage, total=total, unit=unit, start=start)

    def say(self, stage: str, text: str) -> None:
        say(stage, text)

    def skipped(self, stage: str, artifact: str) -> None:
        say(stage, f"already finished: {artifact}")

    def require_writable(self) -> None: ...

    def holding(self, part: str) -> AbstractContextManager[None]:
        return nullcontext()

    def holding_folder(self, folder: str, *, field: str) -> AbstractContextManager[None]:
        return nullcontext()

    def start_ray(self, workers: object, stage: str) -> None:
        raise AssertionError("this test runs without Ray")

    def prepare_work(self, workers: object, stage: str) -> None:
        raise AssertionError("this test runs without Ray")

    def ray_data(self, workers: object, stage: str) -> Any:
        raise AssertionError("this test runs without Ray")
