"""What the jobs share: the surroundings in which they run."""

import _thread
import functools
import logging
import math
import os
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from cluster import storage
from cluster.lease import PATIENCE_SECONDS, InUse, lease
from pipelines.config.recipe import ImagesConfig, Recipe
from pipelines.config.training import ElasticWorkersConfig, WorkersConfig
from pipelines.console import Progress, say
from pipelines.tracking.provenance import provenance_tags, recipe_artifact
from pipelines.tracking.system_metrics import system_metrics
from pipelines.tracking.tracker import RunLog, Tracker


class StageContext:
    """The surroundings of jobs: one Ray session, one tracker, one way to speak. Use `with`.

    Inside, nobody else works in the recipe's output folder; cluster.lease.InUse says who does. part: only in this
    folder of the output: what is evaluated may still be trained. It has tracking of its own.
    """

    def __init__(self, config: Recipe, *, address: str | None = None, part: str = ""):
        self.config = config
        self.address = address
        self.part = part
        self._cleanup = ExitStack()
        self._ray_started = False
        self._parent: RunLog | None = None

    def __enter__(self) -> "StageContext":
        self._hold(self._cleanup, self.part)
        return self

    def _hold(self, held: ExitStack, part: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        folder = storage.join(self.config.output, part) if part else self.config.output
        earlier = held.enter_context(lease(folder, lost=_stop_working, patience_seconds=patience_seconds))
        if earlier and earlier.expires:
            self.say("output", f"taken over from {earlier}, which ended without a word")

    @contextmanager
    def holding(self, part: str):
        """Nobody else works in this folder of the output meanwhile; who does is waited for."""
        with ExitStack() as held:
            try:
                self._hold(held, part)
            except InUse as error:
                self.say("output", f"waiting, because {error}")
                self._hold(held, part, patience_seconds=math.inf)
            yield

    def __exit__(self, *error) -> None:
        self._cleanup.close()

    @functools.cached_property
    def tracker(self) -> Tracker:
        tracker = Tracker.open(self.config, self.part)
        self._cleanup.callback(tracker.close)
        return tracker

    def start_ray(self, workers: ElasticWorkersConfig, stage: str) -> None:
        """Connect to Ray, or start a local one, and refuse what it cannot place."""
        from cluster.session import ray_session, require_resources

        if not self._ray_started:
            address = self.address or os.environ.get("RAY_ADDRESS")  # Ray sets it for a job
            self.say(stage, f"joining Ray at {address}" if address else "starting Ray")
            most = max(part.most_workers * part.cpus_per_worker for part in self._all_workers())
            # Two more than the workers: reading and writing must never wait for a worker to end.
            self._cleanup.enter_context(ray_session(self.address, num_cpus=most + 2))
            self._ray_started = True
        per_worker = (workers.cpus_per_worker, workers.gpus_per_worker)
        require_resources(workers.fewest_workers, *per_worker, stage, **workers.placement)

    def ray_data(self, workers: WorkersConfig, stage: str):
        """Ray Data, on a started Ray. Progress is ours: of its own words only warnings are let through."""
        self.start_ray(workers, stage)
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # It warns that there are no progress bars.
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        return ray.data

    def _all_workers(self) -> list[ElasticWorkersConfig]:
        config = self.config
        trained = [config.autoencoder.train] if config.autoencoder.train else []
        return [*trained, config.encode, config.train, config.evaluate]

    def progress(self, stage: str, *, total: int, unit: str, start: int = 0) -> Progress:
        return Progress(stage, total=total, unit=unit, start=start)

    def say(self, stage: str, text: str) -> None:
        say(stage, text)

    def skipped(self, stage: str, what: str) -> None:
        say(stage, f"finished already: {what}")

    @contextmanager
    def pipeline(self, identity: dict):
        """All runs inside are children of one pipeline run, which exists only if there is one."""
        self._pipeline_identity = identity
        try:
            yield
        except BaseException as error:
            self._end_pipeline("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        self._end_pipeline("FINISHED")

    _pipeline_identity: dict | None = None

    def _end_pipeline(self, status: str) -> None:
        if self._parent is not None:
            self._parent.end(status)
        self._parent = self._pipeline_identity = None

    @contextmanager
    def run(self, stage: str, identity: dict, tags: dict[str, str] | None = None):
        """An MLflow run for one execution of a stage; a killed execution's run is taken up again."""
        if self._pipeline_identity is not None and self._parent is None:
            self._parent = self._start_run("pipeline", self._pipeline_identity, {})
        run = self._start_run(stage, identity, tags or {})
        try:
            with system_metrics(run):
                yield run
        except BaseException as error:
            run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        run.end("FINISHED")

    def _start_run(self, stage: str, identity: dict, tags: dict[str, str]) -> RunLog:
        """A run that says how it came about, with the recipe as a file."""
        tags = {**provenance_tags(self.config, stage, tags), **tags}
        run = self.tracker.start_run(stage, identity, parent=self._parent, tags=tags)
        run.artifact(recipe_artifact(self.config, self.tracker.folder))
        return run


def _stop_working(reason: str) -> None:
    """End as Ctrl-C does: two at work in one folder would overwrite each other."""
    say("output", f"{reason}; stopping")
    _thread.interrupt_main()


def with_absolute_paths(images: ImagesConfig) -> ImagesConfig:
    """The same images for workers: by an absolute path, as those of a cluster run in other working directories.

    A data set on a hub by its commit, as others may push to it meanwhile.
    """
    from pipelines.images.open import is_on_hub
    from pipelines.images.sources.huggingface import pinned

    if is_on_hub(images):
        return replace(images, path=pinned(images))
    if images.path == "digits" or not Path(images.path).exists():  # a URI
        return images
    return replace(images, path=str(Path(images.path).absolute()))


def job(function):
    """Let a job be called with a context to share, or without one: then it has its own."""

    @functools.wraps(function)
    def with_context(config: Recipe, *args, context: StageContext | None = None, **kwargs):
        if context is not None:
            return function(config, *args, context=context, **kwargs)
        with StageContext(config) as own:
            return function(config, *args, context=own, **kwargs)

    return with_context
