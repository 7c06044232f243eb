"""A report says which real images it is of where its protocol does not: held-out ones, and the column of images."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from drawn_records import DIM, write_records
from fakes import FakeContext
from pictures import encoded, square
from tiny import BROKEN, tiny_recipe, write_images

from evaluation.protocol import EvaluationProtocol
from evaluation.reference import ReferenceStatistics
from evaluation.report import EvaluationReport
from pipelines import evaluate_images as images_job
from pipelines.evaluate_images import evaluate_images
from pipelines.images.open import open_source
from pipelines.scoring.real_images.held_out_digest import has_other_real_images, held_out_digest
from pipelines.scoring.real_images.reconstructions import Reconstructions
from pipelines.scoring.real_images.references import RealImages, save_reference
from pipelines.scoring.reports.report_files import save_report
from pipelines.scoring.score_checkpoint import CheckpointEvaluation
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.shards import make_shards, split_listing

GIVEN = "evaluate.reference=given.npz"


def settings_of(folder, *overrides):
    return ScoringSettings.from_recipe(tiny_recipe(folder, *overrides))


def digest_of(folder, *overrides):
    return held_out_digest(RealImages.of(settings_of(folder, *overrides)))


def test_the_digest_is_of_the_share_where_nothing_else_says_it(tmp_path):
    digest = digest_of(tmp_path, GIVEN)
    assert digest == digest_of(tmp_path, GIVEN, "evaluate.num_samples=20")
    assert digest != digest_of(tmp_path, GIVEN, "images.held_out=0.2") != ""
    validation = (f"images.validation={write_images(tmp_path / 'other', per_class=2)}", "images.held_out=0")
    assert digest_of(tmp_path) == digest_of(tmp_path, GIVEN, *validation) == ""


def test_a_finished_report_of_other_held_out_images_is_not_taken(tmp_path):
    protocol = EvaluationProtocol(decoder="d", extractor="e", extractor_sha256="s", reference_digest="r")
    opened = SimpleNamespace(digest="a", name="step_0000002")
    here = CheckpointEvaluation(opened, protocol, settings_of(tmp_path, GIVEN))
    other = replace(here, settings=settings_of(tmp_path, GIVEN, "images.held_out=0.2"))
    earlier = EvaluationReport(protocol=protocol, checkpoint="c", checkpoint_digest="a", metrics={"fd_e_50k": 1.0})
    assert "held_out_digest" not in earlier.to_json()
    save_report(earlier, here.folder)  # as earlier versions wrote it
    assert here.find_report() == other.find_report() == earlier
    later = replace(earlier, held_out_digest=digest_of(tmp_path, GIVEN))
    save_report(later, here.folder)
    assert here.find_report() == later and other.find_report() is None
    gone = settings_of(tmp_path, GIVEN, "images.path=nothing")
    assert not has_other_real_images(later, gone)
    assert not has_other_real_images(later, settings_of(tmp_path))


def test_a_finished_report_of_another_column_of_images_is_not_taken(tmp_path):
    pictures = [{"bytes": encoded(square(value)), "path": None} for value in range(24)]
    pq.write_table(pa.table({"scan": pictures, "thumb": pictures[::-1]}), tmp_path / "x.parquet")
    path = f"images.path={tmp_path / 'x.parquet'}"
    settings = {name: settings_of(tmp_path, path, f"images.image_column={name}") for name in ("scan", "thumb")}
    real = {name: RealImages.of(each) for name, each in settings.items()}
    scan, thumb = (real[name] for name in ("scan", "thumb"))
    assert scan.digest(scan.training) == thumb.digest(thumb.training)  # as reports have it
    for side in ("training", "held_out"):
        assert len({each.path(getattr(each, side)) for each in real.values()}) == 2
        assert len({each.shard_folder(getattr(each, side)) for each in real.values()}) == 2
    assert len({Reconstructions(each, num_samples=8, decoder="aa").path for each in real.values()}) == 2
    protocol = EvaluationProtocol(decoder="d", extractor="e", extractor_sha256="s", reference_digest="r")
    report = EvaluationReport(protocol=protocol, checkpoint="c", checkpoint_digest="a", metrics={"fd_e_50k": 1.0})
    assert "image_column" not in report.to_json()
    of_scan = EvaluationReport.from_json(replace(report, image_column=scan.training.image_column).to_json())
    assert has_other_real_images(of_scan, settings["thumb"]) and not has_other_real_images(of_scan, settings["scan"])
    assert not has_other_real_images(report, settings["thumb"])  # of an earlier release


def test_given_images_are_scored_again_beside_other_held_out_images(tmp_path, monkeypatch):
    tiny_recipe(tmp_path)
    (tmp_path / "images" / BROKEN).unlink()
    moments = {"n": 20, "mu": np.zeros(DIM), "sigma": np.eye(DIM)}
    own = settings_of(tmp_path).extractor
    reference = ReferenceStatistics(**moments, extractor=own.name, extractor_sha256=own.sha256)
    save_reference(reference, str(tmp_path / "given.npz"))
    record_folders, drawn = images_job.record_folders, []

    def with_records(folder, digest, shard_rows, protocols):
        listing = open_source(replace(settings.images, split="all", held_out=0.0)).listing()
        folders = record_folders(folder, digest, shard_rows, protocols)
        for each in folders:
            write_records(make_shards(each, split_listing(listing, shard_rows)))
        write_records(RealImages.of(settings).missing_shards())
        drawn.append(folder)
        return folders

    def with_numbers(*arguments):
        numbers.append(arguments[5].tolist())
        return report_pictures(*arguments)

    numbers, report_pictures = [], images_job.report_pictures
    monkeypatch.setattr(images_job, "report_pictures", with_numbers)
    monkeypatch.setattr(images_job, "NUM_SAMPLES", 4)
    monkeypatch.setattr(images_job, "record_folders", with_records)
    reports = []
    for share in (0.3, 0.3, 0.5):
        config = tiny_recipe(tmp_path, f"evaluate.reference={tmp_path / 'given.npz'}", f"images.held_out={share}")
        settings = ScoringSettings.from_recipe(config)
        reports.append(evaluate_images(config.images.path, config=config, context=FakeContext())[0])
        assert reports[-1].held_out_digest == held_out_digest(RealImages.of(settings))
    assert len(drawn) == 2 and reports[0] == reports[1]
    assert numbers == 2 * [[0, 11, 23, 35]]  # the pictured images are named by their positions among all 36
    assert reports[2].protocol == reports[0].protocol and reports[2].real_baseline != reports[0].real_baseline
