"""A report whose evaluation was cut off after writing and before logging it is logged by the next command."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from drawn_records import write_records
from fakes import FakeContext
from tiny import BROKEN, tiny_recipe
from tiny_checkpoint import tiny_output, write_checkpoint

from cluster import storage
from evaluation.autoencoder_report import AutoencoderProtocol, AutoencoderReport
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from pipelines import evaluate as checkpoints_job
from pipelines import evaluate_autoencoder as autoencoder_job
from pipelines import evaluate_images as images_job
from pipelines.checkpoints.open import open_checkpoint
from pipelines.config.evaluate import EvaluateConfig
from pipelines.evaluate import EvaluationOptions, evaluate, evaluate_each
from pipelines.evaluate_autoencoder import evaluate_autoencoder
from pipelines.evaluate_images import evaluate_images
from pipelines.images.open import open_source
from pipelines.scoring import score_checkpoint, score_extractors
from pipelines.scoring.protocols.build_protocol import evaluation_protocol
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.reports.unlogged import is_unlogged, mark_logged, mark_unlogged
from pipelines.scoring.score_checkpoint import CheckpointEvaluation
from pipelines.scoring.score_extractors import remove_all_records
from pipelines.scoring.seeds import SeedEvaluation
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.shards import make_shards, split_listing
from pipelines.stage import StageContext
from pipelines.tracking.journal import Journal
from pipelines.tracking.tracker import Tracker

SETTINGS = ("evaluate.num_samples=10", "evaluate.shard_rows=10", "evaluate.reconstructions=false")


class RecordingContext(FakeContext):
    """Keeps the identities of the runs that it opens."""

    def __init__(self):
        super().__init__()
        self.identities = []

    @contextmanager
    def run(self, stage, identity, tags=None, *, resumes=None):
        self.identities.append(identity)
        yield self.last_run


def interrupt_once(monkeypatch, module):
    """Let the module's log_report be interrupted at its first call."""
    log_report, calls = module.log_report, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        log_report(*arguments)

    monkeypatch.setattr(module, "log_report", interrupted)
    return calls


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlogged")
    config = tiny_output(folder, *SETTINGS)
    (folder / "images" / BROKEN).unlink()
    write_records(RealImages.of(ScoringSettings.from_recipe(config)).missing_shards())
    return config


def check_that_it_is_logged_once(score, context, calls, config, name):
    """Also where an evaluation with another size of shards was interrupted. name: of the report's folder."""
    with pytest.raises(KeyboardInterrupt):
        score()
    (report,) = Path(config.folder("evaluations")).glob(f"*/{name}/report.json")
    (records,) = report.parent.glob("shards-*")
    (report.parent / records.name.replace("-10", "-77")).mkdir()
    score()
    assert not list(report.parent.glob("shards-*")) and not list(report.parent.glob("unlogged*"))
    records.mkdir()  # as an interrupted --force leaves it
    score()
    assert len(calls) == 2  # the interrupted call, and that of the next command
    assert any(name.startswith("eval/fd_") for name in context.last_run.logged)
    assert context.identities[0] == context.identities[1] and len(context.identities) == 2


def test_the_report_of_a_checkpoint_is_logged(config, monkeypatch):
    opened = open_checkpoint(write_checkpoint(config, 2).path)
    settings = ScoringSettings.from_recipe(config)
    evaluation = CheckpointEvaluation(opened, evaluation_protocol(settings, opened), settings)
    write_records(evaluation.shards())
    context, calls = RecordingContext(), interrupt_once(monkeypatch, score_checkpoint)
    check_that_it_is_logged_once(
        lambda: evaluate(opened, config=config, context=context), context, calls, config, "step_0000002"
    )


def test_the_report_of_given_images_is_logged(config, monkeypatch):
    path = config.images.path
    settings = ScoringSettings.from_recipe(config)
    listing = open_source(images_job.scored_images(settings, path)).listing()
    record_folders = score_extractors.record_folders

    def with_records(*arguments):
        for folder in (folders := record_folders(*arguments)):
            write_records(make_shards(folder, split_listing(listing, config.evaluate.shard_rows)))
        return folders

    monkeypatch.setattr(images_job, "record_folders", with_records)
    context, calls = RecordingContext(), interrupt_once(monkeypatch, images_job)
    check_that_it_is_logged_once(
        lambda: evaluate_images(path, config=config, context=context), context, calls, config, "images"
    )


def test_the_report_of_an_autoencoder_is_logged(tmp_path, monkeypatch):
    identity = dict.fromkeys(("images_digest", "crop", "autoencoder", "autoencoder_config", "denoising"), "a")
    protocol = AutoencoderProtocol(**identity, image_size=32, num_images=20, extractors={})
    report = AutoencoderReport(
        protocol=protocol,
        autoencoder="a",
        kind="AutoencoderKL",
        moments_shape=(8, 4, 4),
        metrics={"psnr": 30.0},
        channels={},
        device="",
        images="",
    )
    storage.write_atomically(str(tmp_path / "report.json"), report.to_json().encode())
    evaluation = SimpleNamespace(
        protocol=protocol,
        folder=str(tmp_path),
        shard_folder=str(tmp_path / "shards-8"),
        config=SimpleNamespace(evaluate=EvaluateConfig()),
        settings=SimpleNamespace(each_extractor=[]),
        name="a",
    )
    logged = []
    monkeypatch.setattr(autoencoder_job, "_run_tags", lambda _: {})
    monkeypatch.setattr(autoencoder_job, "_log_settings", lambda *_: None)
    monkeypatch.setattr(autoencoder_job, "_log_report", lambda run, report, folder: logged.append(report.metrics))
    context = RecordingContext()
    for rows in (4, 8):  # records alone mean nothing
        storage.write_atomically(str(tmp_path / f"shards-{rows}" / "shard-00000.npz"), b"")
    for expected in ([], [report.metrics], [report.metrics]):
        assert evaluate_autoencoder(evaluation, context=context).report == report
        assert logged == expected and bool(list(tmp_path.glob("shards-*"))) != bool(expected)
        if not expected:
            mark_unlogged(str(tmp_path), report.to_json().encode())
    assert context.identities == [{"protocol": protocol.protocol_id}]


def test_records_of_a_later_evaluation_by_more_extractors_are_kept(tmp_path):
    report = SimpleNamespace(checkpoint_digest="a" * 64, protocols=[SimpleNamespace(protocol_id=each) for each in "pq"])
    remove_all_records(str(tmp_path / "nothing"), report)
    own = [tmp_path / f"shards-{'a' * 12}-{name}" for name in ("100", "100-q", "200")]
    others = [tmp_path / f"shards-{name}" for name in (f"{'b' * 12}-100", f"{'a' * 12}-100-r")]
    for folder in (*own, *others):  # of another checkpoint, and of another extractor
        folder.mkdir()
    remove_all_records(str(tmp_path), report)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_report_is_unlogged_from_its_writing_until_it_is_logged(tmp_path):
    folder, report = str(tmp_path), tmp_path / "report.json"
    assert not is_unlogged(folder, "a" * 64)
    report.write_bytes(b"old")
    mark_unlogged(folder, b"new", "a" * 64)
    assert not is_unlogged(folder, "a" * 64)  # interrupted before the new one was written
    report.write_bytes(b"new")
    assert is_unlogged(folder, "a" * 64) and not is_unlogged(folder, "b" * 64)
    mark_logged(folder, "a" * 64)
    assert not is_unlogged(folder, "a" * 64) and [path.name for path in tmp_path.iterdir()] == ["report.json"]
    mark_logged(folder, "a" * 64)


class LocalContext(StageContext):
    """A StageContext whose journal is delivered to nobody."""

    @property
    def tracker(self):
        server = SimpleNamespace(deliver=lambda entries, ids, history: len(entries))
        if not hasattr(self, "_tracker"):
            self._tracker = Tracker(Journal(Path(self.config.output) / "journal.jsonl", server), "tiny", "", None)
            self._cleanup.callback(lambda: self._tracker._journal.close(10))
        return self._tracker


def series_of(config):
    """The runs and steps that the journal has metrics of."""
    entries = [json.loads(line) for line in (Path(config.output) / "journal.jsonl").read_text().splitlines()]
    logged = [entry for entry in entries if entry["op"] == "metrics" and "eval/fd_e_10" in entry["metrics"]]
    return [(entry["run"], entry["step"]) for entry in logged]


def test_a_step_that_an_interrupted_command_left_out_of_the_series_is_logged(tmp_path, monkeypatch):
    config = tiny_recipe(tmp_path)
    protocol = EvaluationProtocol(
        num_samples=10, decoder="d", extractor="e", extractor_sha256="s", reference_digest="r"
    )
    reports = {
        step: EvaluationReport(
            protocol=protocol, checkpoint=f"step_{step}", checkpoint_digest="a", metrics={"fd_e_10": float(step)}
        )
        for step in (2, 4)
    }
    scored = set()

    def plan_seeds(step, *arguments, **options):
        settings, folder = SimpleNamespace(output=config.output), str(tmp_path / "evaluations" / "p" / f"step_{step}")
        evaluation = SimpleNamespace(settings=settings, folder=folder, saved=None, step=step)
        return [SeedEvaluation(evaluation, reports[step] if step in scored else None)]

    def score_seeds(context, seeds, images_per_step):
        scored.add(seeds[0].evaluation.step)
        return reports[seeds[0].evaluation.step]

    def interrupted(run, folder, report, images_per_step):
        if report is reports[4]:
            raise KeyboardInterrupt
        record_series(run, folder, report, images_per_step)

    record_series = checkpoints_job.record_series
    for name, value in {"StageContext": LocalContext, "plan_seeds": plan_seeds, "score_seeds": score_seeds}.items():
        monkeypatch.setattr(checkpoints_job, name, value)
    monkeypatch.setattr(checkpoints_job, "compute_together", lambda *_, **__: None)
    monkeypatch.setattr(checkpoints_job, "record_series", interrupted)
    targets = [[(2, config), (4, config)]]
    with pytest.raises(KeyboardInterrupt):
        evaluate_each(targets, EvaluationOptions())
    ((run, _),) = series_of(config)
    monkeypatch.setattr(checkpoints_job, "record_series", record_series)
    for _ in range(2):
        evaluate_each(targets, EvaluationOptions())
        assert series_of(config) == [(run, 2), (run, 4)]
