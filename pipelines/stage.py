"""What the jobs share: one Ray session, one tracker, a lease on the output, and the console."""

import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from cluster import signals, storage
from cluster.address import given_address, refuse_wrong_address
from cluster.storage.failures import refused_write
from cluster.storage.lease import WAIT_SECONDS, LeaseOwner, hold_folder
from pipelines.config.recipe import Recipe
from pipelines.config.training import ElasticWorkersConfig, WorkersConfig, require_own_gpus
from pipelines.console import Progress, say
from pipelines.tracking.provenance import provenance_tags, recipe_artifact
from pipelines.tracking.run_log import RunLog
from pipelines.tracking.store import tracking_uri
from pipelines.tracking.system_metrics import system_metrics
from pipelines.tracking.tracker import Tracker
from raydit.errors import InUse, InvalidInput, StorageFailed

Result = TypeVar("Result")


class JobContext(Protocol):
    """What a job needs of its surroundings; StageContext is the real one, and tests have a fake."""

    def run(
        self, stage: str, identity: dict[str, Any], tags: dict[str, str] | None = None, *, resumes: str | None = None
    ) -> AbstractContextManager[RunLog]:
        """Open a tracking run for one execution of a stage. resumes: see Tracker.start_run."""
        ...

    def progress(self, stage: str, *, total: int, unit: str, start: int = 0) -> Progress:
        """Show the progress of a stage."""
        ...

    def say(self, stage: str, text: str) -> None:
        """Print one line about a stage."""
        ...

    def skipped(self, stage: str, artifact: str) -> None:
        """Say that a stage has nothing to do, because its artifact is finished."""
        ...

    def start_ray(self, workers: ElasticWorkersConfig, stage: str) -> None:
        """Connect to Ray, and refuse workers that no node can hold."""
        ...

    def prepare_work(self, workers: ElasticWorkersConfig, stage: str) -> None:
        """Refuse a tracking store or workers that can never be used, before a stage changes anything."""
        ...

    def ray_data(self, workers: WorkersConfig, stage: str) -> Any:
        """Return the module ray.data, on a started Ray."""
        ...

    def holding_folder(self, folder: str, *, field: str) -> AbstractContextManager[None]:
        """Hold a folder that other outputs may share. field: the one of the recipe that names it. Raises InUse."""
        ...


class StageContext:
    """The surroundings of jobs, used as a context manager.

    While it is open, no other process works in the recipe's output folder; raydit.errors.InUse names the process that
    does. SIGTERM ends the work as tidily as Ctrl-C does. An output that cannot be written is not held: what is finished
    there can be found, and raydit.errors.StorageFailed is raised as soon as there is work. part: hold this folder of
    the output only, with tracking of its own: a checkpoint may be evaluated while its training runs.
    """

    def __init__(self, config: Recipe, *, address: str | None = None, part: str = ""):
        self.config = config
        self.address = address
        self.part = part
        self._cleanup = ExitStack()
        self._ray_started = False
        self._checked: set[str] = set()
        """Stages whose workers are known to fit."""
        self._compilers_found: set[str] = set()
        """Stages that compile, whose nodes are known to have a compiler."""
        self._pipeline_identity: dict[str, Any] | None = None
        self._pipeline_run: RunLog | None = None
        self._write_refusal: StorageFailed | None = None
        """Error to raise as soon as there is work to do, if the output cannot be written; None if it can."""

    def __enter__(self) -> "StageContext":
        refuse_wrong_address(self.address)
        with ExitStack() as entered:
            entered.enter_context(signals.handle_signals())
            self._cleanup = entered  # the tracker is closed by it, also if this is interrupted
            self._hold(entered, self.part)
            self._deliver_what_waits()
            self._cleanup = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()
        if self._write_refusal is not None and self._is_refused_here(error):
            raise self._write_refusal from error

    def _is_refused_here(self, error: BaseException | None) -> bool:
        """Return whether an error says that a file of the output cannot be written."""
        if (refused := refused_write(error)) is None or not storage.is_local(self.config.output):
            return False
        return Path(str(refused.filename)).is_relative_to(storage.local_path(self.config.output))

    @property
    def is_writable(self) -> bool:
        """Whether the output can be written, so that there may be work to do."""
        return self._write_refusal is None

    def require_writable(self) -> None:
        """Raise StorageFailed if the output cannot be written."""
        if self._write_refusal is not None:
            raise self._write_refusal

    def _deliver_what_waits(self) -> None:
        """Deliver what an earlier command left in the journal, also if every stage is finished."""
        try:
            _ = Tracker.has_waiting(self.config, self.part) and self.tracker
        except (InvalidInput, StorageFailed) as error:
            if error is not self._write_refusal and not isinstance(error, InvalidInput):
                raise
            self.say("tracking", f"entries in the journal cannot be delivered: {error}")

    def _hold(self, held: ExitStack, part: str, wait_seconds: float = WAIT_SECONDS) -> None:
        folder = storage.join(self.config.output, part) if part else self.config.output
        try:
            earlier = held.enter_context(hold_folder(folder, on_lost=_stop_working, wait_seconds=wait_seconds))
        except StorageFailed as error:
            if (refused := refused_write(error)) is None:
                raise
            self._write_refusal = StorageFailed(
                f"{folder} cannot be written ({refused.strerror})",
                "a folder that can be written, because not all that was asked for is finished",
                "give yourself permission to write there, or choose another folder",
            )
            if not storage.exists(folder):  # so that nothing is finished in it
                raise self._write_refusal from error
        else:
            self._say_if_taken_over(earlier)

    def _say_if_taken_over(self, earlier: LeaseOwner | None) -> None:
        if earlier and earlier.expires:
            self.say("output", f"took over the folder from {earlier}, which ended without releasing it")

    @contextmanager
    def holding_folder(self, folder: str, *, field: str) -> Iterator[None]:
        """Hold a folder that other outputs may share. field: the one of the recipe that names it. Raises InUse."""
        with hold_folder(folder, on_lost=_stop_working, wait_seconds=WAIT_SECONDS, field=field) as earlier:
            self._say_if_taken_over(earlier)
            yield

    @contextmanager
    def holding(self, part: str) -> Iterator[None]:
        """Hold a folder of the output as well, waiting for another process that works in it."""
        with ExitStack() as held:
            try:
                self._hold(held, part)
            except InUse as error:
                self.say("output", f"waiting, because {error}")
                self._hold(held, part, wait_seconds=math.inf)
            yield

    @functools.cached_property
    def tracker(self) -> Tracker:
        """The tracker of the output, opened when the first run starts. Raises StorageFailed where it cannot write."""
        self.require_writable()
        tracker = Tracker.open(self.config, self.part)
        self._cleanup.callback(tracker.close)
        return tracker

    @property
    def tracking_uri(self) -> str:
        """URI of the MLflow store, which is repaired if it was moved and the output can be written."""
        return self.tracker.uri if self.is_writable else tracking_uri(self.config.tracking.uri)

    def start_ray(self, workers: ElasticWorkersConfig, stage: str) -> None:
        """Connect to Ray or start a local one. Raises InvalidInput if no node can ever hold such workers.

        Says so if the workers of a local Ray have more threads than the machine has cores, and if a cluster has no room
        for them now.
        """
        from cluster.session import ray_session, require_resources

        self.require_writable()
        address, _ = given_address(self.address)
        if not self._ray_started:
            self.say(stage, "starting Ray" if address == "local" else f"joining Ray at {address}")
            most = max(section.most_workers * section.cpus_per_worker for section in self._worker_sections())
            # Two CPUs more than the workers ask for: reading and writing must never wait for a worker to end.
            self._cleanup.enter_context(ray_session(self.address, num_cpus=most + 2))
            self._ray_started = True
        require_resources(workers.fewest_workers, workers.needs, stage)
        if stage not in self._checked:
            self._checked.add(stage)
            if address == "local":
                self._say_if_crowded(workers, stage)
            else:
                self._say_if_busy(workers, stage)

    def _say_if_crowded(self, workers: ElasticWorkersConfig, stage: str) -> None:
        """Say so if the workers have more threads than this machine, where Ray runs, has cores."""
        threads, cores = workers.most_workers * workers.cpus_per_worker, os.cpu_count() or 1
        if threads > cores:
            section = _section(stage)
            each = f"{workers.most_workers} x {workers.cpus_per_worker}"
            self.say(
                stage,
                f"workers have {each} = {threads} threads on {cores} cores and will wait for each other; "
                f"{section}.num_workers times {section}.cpus_per_worker should be at most {cores}",
            )

    def _say_if_busy(self, workers: ElasticWorkersConfig, stage: str) -> None:
        """Say so if the cluster has no room for the workers now: Ray waits for it without a word, and without limit."""
        from cluster.session import count_free_workers

        wanted = workers.fewest_workers
        room = count_free_workers(workers.needs)
        if room < wanted:
            self.say(
                stage,
                f"the cluster has room for {room:g} of {wanted} workers now; waiting for more "
                "(`ray status` shows what uses it)",
            )

    def prepare_work(self, workers: ElasticWorkersConfig, stage: str) -> None:
        """Refuse a tracking store or workers that can never be used, before a stage changes anything."""
        from cluster.session import load_ray, require_compilers

        self.require_writable()
        require_own_gpus(workers, _section(stage))
        # Importing MLflow takes about as long as Ray's processes take to start, which this process only waits for.
        load_ray()
        with ThreadPoolExecutor(1, thread_name_prefix="tracking") as pool:
            tracker = pool.submit(lambda: self.tracker)
            self.start_ray(workers, stage)
        tracker.result()
        if getattr(workers, "compile", None) and stage not in self._compilers_found:
            require_compilers(workers.fewest_workers, workers.needs)
            self._compilers_found.add(stage)

    def ray_data(self, workers: WorkersConfig, stage: str) -> Any:
        """Return the module ray.data, on a started Ray. Only its warnings are printed: raydit shows the progress."""
        self.start_ray(workers, stage)
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # It warns that there are no progress bars.
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        # It warns of actors with CPUs and GPUs, which need both: encoding keeps a core busy, too.
        logging.getLogger("ray.data._internal.execution.operators.map_operator").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        return ray.data

    def _worker_sections(self) -> list[ElasticWorkersConfig]:
        config = self.config
        trained = [config.autoencoder.train] if config.autoencoder.train else []
        return [*trained, config.encode, config.train, config.evaluate]

    def progress(self, stage: str, *, total: int, unit: str, start: int = 0) -> Progress:
        """Show the progress of a stage, from `start` to `total` units."""
        return Progress(stage, total=total, unit=unit, start=start)

    def say(self, stage: str, text: str) -> None:
        """Print one line about a stage."""
        say(stage, text)

    def skipped(self, stage: str, artifact: str) -> None:
        """Say that a stage has nothing to do, because its artifact is finished."""
        say(stage, f"already finished: {artifact}")

    @contextmanager
    def pipeline(self, identity: dict[str, Any]) -> Iterator[None]:
        """Make all runs inside the children of one pipeline run, which starts with the first of them."""
        self._pipeline_identity = identity
        try:
            yield
        except BaseException as error:
            self._end_pipeline(_status(error))
            raise
        self._end_pipeline("FINISHED")

    def _end_pipeline(self, status: str) -> None:
        if self._pipeline_run is not None:
            self._pipeline_run.end(status)
        self._pipeline_run = self._pipeline_identity = None

    @contextmanager
    def run(
        self, stage: str, identity: dict[str, Any], tags: dict[str, str] | None = None, *, resumes: str | None = None
    ) -> Iterator[RunLog]:
        """Open an MLflow run for one execution of a stage; the run of an interrupted execution is resumed."""
        if self._pipeline_identity is not None and self._pipeline_run is None:
            self._pipeline_run = self._start_run("pipeline", self._pipeline_identity, {})
        run = self._start_run(stage, identity, tags or {}, resumes)
        try:
            with system_metrics(run):
                yield run
        except BaseException as error:
            run.end(_status(error))
            raise
        run.end("FINISHED")

    def _start_run(
        self, stage: str, identity: dict[str, Any], tags: dict[str, str], resumes: str | None = None
    ) -> RunLog:
        """Start a run that carries its provenance and the recipe."""
        tags = {**provenance_tags(self.config, stage, tags), **tags}
        run = self.tracker.start_run(stage, identity, parent=self._pipeline_run, run_tags=tags, resumes=resumes)
        run.artifact(recipe_artifact(self.config, self.tracker.folder))
        return run


def _section(stage: str) -> str:
    """Return the table of the recipe with the settings of a stage's workers."""
    return {"autoencoder": "autoencoder.train", "autoencoders": "evaluate"}.get(stage, stage)


def _status(error: BaseException) -> str:
    """Return MLflow's status of a run that ended with an error."""
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def _stop_working(reason: str) -> None:
    """End as Ctrl-C does, because two processes in one folder would overwrite each other's files."""
    say("output", f"{reason}; stopping")
    signals.interrupt()


def job(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let a job be called with or without a context: without one, it opens a StageContext of its own."""

    @functools.wraps(function)
    def with_context(config: Recipe, *args: Any, context: StageContext | None = None, **kwargs: Any) -> Result:
        if context is not None:
            return function(config, *args, context=context, **kwargs)
        with StageContext(config) as own:
            return function(config, *args, context=own, **kwargs)

    return with_context
