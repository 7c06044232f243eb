"""Real images that cannot be read: a few are left out of what samples are compared with, and many are refused."""

from dataclasses import replace

import numpy as np
import pytest
from drawn_records import DIM, write_records
from tiny import tiny_recipe

from evaluation.extractors import Features
from evaluation.merge_reports import merge_reports
from evaluation.protocol import EvaluationProtocol
from evaluation.report import EvaluationReport
from pipelines.scoring.real_images.real_records import read_real_results
from pipelines.scoring.real_images.reconstructions import Reconstructions
from pipelines.scoring.real_images.references import RealImages, load_real_features
from pipelines.scoring.score_extractors import count_unreadable, with_unreadable
from pipelines.scoring.settings import ScoringSettings
from pipelines.scoring.workers.records import ShardResult
from pipelines.scoring.workers.shards import find_unfinished
from raydit.errors import InvalidInput


@pytest.fixture
def real_images(tmp_path):
    """List the tiny images, of which about half are held out."""

    def call(*overrides):
        return RealImages.of(ScoringSettings.from_recipe(tiny_recipe(tmp_path, "images.held_out=0.4", *overrides)))

    return call


def finish(shards, unreadable):
    """Write the records of shards in which images with some keys could not be read."""
    for shard in shards:
        missing = sorted({*shard.images.keys} & {*unreadable})
        count = len(shard.images) - len(missing)
        ShardResult(
            features=np.random.default_rng(0).normal(size=(count, DIM)).astype(np.float32) if count else None,
            unreadable=np.array(missing, dtype=str),
        ).write(shard.file)


def test_a_reference_that_would_lack_many_images_is_refused_until_they_are_repaired(real_images, capsys):
    real = real_images()
    lost = real.training.keys[8:19]
    finish(real.missing_shards(), lost)
    with pytest.raises(InvalidInput) as refused:
        load_real_features(real)
    total = len(real.training)
    assert refused.value.found == f"images.path: 11 of {total} images cannot be read, such as {lost[0]}"
    assert refused.value.expected == "at most 10 (encode.max_quarantined = 0.05, and 2 readable)"
    again = find_unfinished(real.missing_shards())
    assert [shard.images.keys[0] for shard in again] == [real.training.keys[8], real.training.keys[16]]
    write_records(again)  # the images were repaired
    assert load_real_features(real)[0].n == total and capsys.readouterr().out == ""


def test_a_reference_says_which_images_it_lacks(real_images, capsys):
    real = real_images()
    lost = real.training.keys[5:8]
    finish(real.missing_shards(), lost)
    assert load_real_features(real)[0].n == len(real.training) - 3
    said = f"3 of {len(real.training)} images cannot be read and are left out of the features by efficientnet-lite0"
    assert f"{said}, such as {lost[0]}" in capsys.readouterr().out
    real = real_images("encode.max_quarantined=0")  # a reference that is there stays valid
    assert real.missing == [] and load_real_features(real)[0].n == len(real.training) - 3


def test_one_unreadable_image_is_too_many_if_none_may_be_quarantined(real_images):
    real = real_images("encode.max_quarantined=0")
    finish(real.missing_shards(), real.training.keys[:1])
    with pytest.raises(InvalidInput, match=r"1 of .* expected at most 0 \(encode.max_quarantined = 0"):
        load_real_features(real)


def test_held_out_images_are_read_again_with_their_reconstructions(real_images):
    real = real_images()
    lost = real.held_out.keys[:11]
    reconstructions = Reconstructions(real, num_samples=8, decoder="aa")
    finish([*real.missing_shards(), *reconstructions.missing_shards()], lost)
    with pytest.raises(InvalidInput, match=rf"11 of {len(real.held_out)} held-out images cannot be read"):
        load_real_features(real)
    assert len(find_unfinished(shards := reconstructions.missing_shards())) == len(shards)
    write_records(find_unfinished([*real.missing_shards(), *reconstructions.missing_shards()]))
    reference, held_out = load_real_features(real)
    assert reference.n == len(real.training) and len(held_out.features) == len(real.held_out)
    assert len(reconstructions.load().features) == 8


def test_a_set_without_enough_readable_images_is_refused(real_images):
    real = real_images()
    shards = real.shards(real.training)[:1]
    finish(shards, shards[0].images.keys[1:])
    with pytest.raises(InvalidInput, match=r"7 of 8 images .* expected at most 6 "):
        list(read_real_results(real.settings, shards, 2))


def test_a_report_says_how_many_real_images_could_not_be_read(real_images, capsys):
    """The protocol does not: its digest is of the listing."""
    real = real_images()
    finish(real.missing_shards(), [*real.training.keys[5:8], real.held_out.keys[0]])
    found = count_unreadable(real, *load_real_features(real))
    training, held_out = len(real.training), len(real.held_out)
    assert found == {"reference": (3, training), "held_out": (1, held_out)}
    capsys.readouterr()
    load_real_features(real)  # as the next evaluation does
    said = capsys.readouterr().out
    assert f"{real.path(real.training)} is of {training - 3} of {training} images; if the others were repaired" in said
    given = {"extractor": "e", "extractor_sha256": "s", "reference_digest": "r", "decoder": "d"}
    plain = EvaluationReport(
        protocol=EvaluationProtocol(**given), checkpoint="c", checkpoint_digest="a", metrics={"fd_e_50k": 1.0}
    )
    report = EvaluationReport.from_json(with_unreadable(plain, found).to_json())
    assert report.unreadable == {"reference": 3, "held_out": 1}
    assert f"The reference is without 3 of {training} images: they could not be read." in report.all_warnings
    assert f"1 of {held_out} held-out images are missing: they could not be read." in report.all_warnings
    other = replace(plain, protocol=replace(plain.protocol, extractor="f"), metrics={"fd_f_50k": 1.0})
    assert merge_reports([plain, with_unreadable(other, found)]).unreadable == report.unreadable
    assert with_unreadable(plain, {}) == plain and "unreadable" not in plain.to_json()


def test_a_complete_or_a_given_reference_lacks_nothing_that_is_known(real_images, capsys):
    real = real_images()
    write_records(real.missing_shards())
    reference, held_out = load_real_features(real)
    assert count_unreadable(real, reference, held_out) == count_unreadable(real, reference, None) == {}
    given = replace(real, settings=real_images("evaluate.reference=r.npz").settings)
    assert count_unreadable(given, replace(reference, n=0), held_out) == {}
    assert count_unreadable(real, reference, Features(held_out.features[1:]))["held_out"] == (1, len(real.held_out))
    assert capsys.readouterr().out == ""
