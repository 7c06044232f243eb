"""What is refused before images are scored."""

import os
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_recipe
from tiny_encode import encode_here
from tiny_encode import recipe as encoded_recipe
from tiny_latents import make_moments, write_dataset

from dit.diffusion import GaussianDiffusion
from dit.samplers import SAMPLERS
from evaluation.reference import ReferenceStatistics
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.reader import resolved
from pipelines.latents.shards import recorded_keys
from pipelines.run import run_pipeline
from pipelines.scoring import checks
from pipelines.scoring.checks import (
    check_sampling_steps,
    check_scoring_inputs,
    check_scoring_settings,
    refuse_larger_share,
    refuse_seen_images,
)
from pipelines.scoring.class_distances import check_class_distances
from pipelines.scoring.protocols.build_protocol import evaluation_protocol, images_protocol
from pipelines.scoring.real_images.references import reference_overrides, save_reference
from pipelines.scoring.settings import ScoringSettings
from raydit.errors import InvalidInput, NotFound

SOURCE = """
import torch

def means(images):
    return images.float().mean(dim=(2, 3))

def noisy(images):
    return torch.rand(len(images), 3)
"""


def settings_of(folder, *overrides):
    return ScoringSettings.from_recipe(tiny_recipe(folder, "images.held_out=0", *overrides))


@pytest.fixture
def validation(tmp_path):
    """Images of their own, with the names of training images."""
    other = tmp_path / "other"
    rng = np.random.default_rng(7)
    for name in ("blob", "ring"):
        (other / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(other / name / f"{index:03d}.png")
    return other


def test_other_images_of_the_same_names_are_no_training_images(tmp_path, validation):
    refuse_seen_images(settings_of(tmp_path, f"images.validation={validation}"))


def test_copies_of_training_images_are_refused(tmp_path, validation):
    settings = settings_of(tmp_path, f"images.validation={validation}")
    shutil.copy(tmp_path / "images" / "ring" / "002.png", validation / "ring" / "002.png")
    with pytest.raises(InvalidInput, match="images.validation: found 'ring/002.png' in .*one of 1 images"):
        check_scoring_settings(settings)


def test_images_that_were_moved_away_after_encoding_are_refused(tmp_path, validation, monkeypatch):
    settings = settings_of(tmp_path, f"images.validation={validation}")
    seen = {"ring/001.png", "blob/001.png"}
    write_dataset(tmp_path / "output" / "latents", [make_moments(4)])
    monkeypatch.setattr(checks, "recorded_keys", lambda dataset: seen | recorded_keys(dataset))
    refuse_seen_images(settings)
    (tmp_path / "images" / "ring" / "001.png").unlink()
    with pytest.raises(InvalidInput, match="found 'ring/001.png'.*rename them"):
        refuse_seen_images(settings)


def test_a_larger_share_of_held_out_images_than_training_had_is_refused(tmp_path, monkeypatch):
    config = encoded_recipe(tmp_path, "images.held_out=0.3")
    encode_here(config, monkeypatch)
    for share in (0.0, 0.2, 0.3):
        refuse_larger_share(ScoringSettings.from_recipe(replace(config, images=replace(config.images, held_out=share))))
    larger = ScoringSettings.from_recipe(replace(config, images=replace(config.images, held_out=0.7)))
    with pytest.raises(
        InvalidInput, match=r"images.held_out: found 0.7, which holds out '.*\.png', one of \d+ .*most 0.3"
    ):
        check_scoring_inputs(larger, images_protocol(larger, 20))
    shutil.rmtree(tmp_path / "output" / "latents")
    refuse_larger_share(larger)


def test_a_reference_by_other_weights_is_refused_with_what_to_do(tmp_path):
    real = np.random.default_rng(0).normal(size=(20, 1280))
    reference = ReferenceStatistics(
        n=20, mu=real.mean(axis=0), sigma=np.cov(real.T), extractor="efficientnet-lite0", extractor_sha256="ab" * 32
    )
    save_reference(reference, str(tmp_path / "r.npz"))
    settings = settings_of(tmp_path, f"evaluate.reference={tmp_path / 'r.npz'}")
    with pytest.raises(InvalidInput, match="extractor_sha256 'abab.*weights that it was made with"):
        check_scoring_settings(settings)
    other = replace(reference, extractor="timm:resnet50.a1_in1k", extractor_preprocessing="scale 1")
    save_reference(other, str(tmp_path / "t.npz"))
    assert reference_overrides(str(tmp_path / "t.npz")) == ["evaluate.extractor=timm:resnet50.a1_in1k"]
    with pytest.raises(InvalidInput, match="extractor 'timm:resnet50.a1_in1k', expected 'efficientnet-lite0'"):
        check_scoring_settings(settings_of(tmp_path, f"evaluate.reference={tmp_path / 't.npz'}"))
    loaded = ReferenceStatistics.load(open(tmp_path / "t.npz", "rb"), "t.npz")
    assert loaded.extractor_preprocessing == "scale 1" and loaded.digest == other.digest
    with pytest.raises(InvalidInput, match="extractor_preprocessing 'scale 1', expected 'scale 2'"):
        other.check_compatible(other.extractor, other.extractor_sha256, 16, "adm", "scale 2")


def test_functions_are_tried_before_the_work_where_workers_have_no_other_device(tmp_path, monkeypatch):
    module = f"tried_{os.getpid()}"
    (tmp_path / f"{module}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    check_scoring_settings(settings_of(tmp_path, f"evaluate.extractor={module}:means"))
    noisy = f"evaluate.extractor={module}:noisy"
    with pytest.raises(InvalidInput, match="a deterministic function"):
        check_scoring_settings(settings_of(tmp_path, noisy))
    check_scoring_settings(settings_of(tmp_path, noisy, "evaluate.gpus_per_worker=1"))  # workers try it
    with pytest.raises(NotFound, match="no module 'absent_module'"):
        check_scoring_settings(settings_of(tmp_path, "evaluate.extractor=absent_module:f"))


def test_class_distances_need_classes_that_real_images_have(tmp_path):
    settings = settings_of(tmp_path, "evaluate.per_class=true")
    with pytest.raises(InvalidInput, match="evaluate.per_class: found true, and x has no classes"):
        check_class_distances(settings, (), "x")
    with pytest.raises(InvalidInput, match=r"none of the classes of x \(cat, dog\) among .*\(blob, ring, stripe\)"):
        check_class_distances(settings, ("cat", "dog"), "x")
    check_class_distances(settings, ("cat", "ring"), "x")
    check_class_distances(settings_of(tmp_path), (), "x")


REFUSED_SAMPLING = {
    "fewer samples than a protocol has": (("evaluate.num_samples=5",), "evaluate.num_samples: found 5, expected at"),
    "more steps than timesteps": (
        ("objective.kind=diffusion", "evaluate.sampler=ddpm", "evaluate.sampling_steps=1001"),
        "evaluate.sampling_steps: found 1001 with the sampler 'ddpm', expected at most 1000",
    ),
}


@pytest.mark.parametrize("case", REFUSED_SAMPLING)
def test_a_pipeline_refuses_what_sampling_would_refuse_after_the_training(tmp_path, case):
    overrides, message = REFUSED_SAMPLING[case]
    with pytest.raises(InvalidInput, match=message):
        run_pipeline(tiny_recipe(tmp_path, *overrides))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"]


@pytest.mark.parametrize(("sampler", "most"), [("ddpm", 1000), ("ddim", 1000), ("dpmpp_2m", 999)])
def test_the_most_steps_are_those_that_samplers_take(sampler, most):
    noise = torch.zeros(1, 1, 2, 2)
    draw = partial(SAMPLERS[sampler], lambda x, t, y: torch.zeros_like(x), noise, torch.zeros(1, dtype=torch.int64))
    process = GaussianDiffusion(variance="fixed_small")
    draw(process=process, steps=most)
    with pytest.raises(InvalidInput):
        draw(process=process, steps=most + 1)
    check_sampling_steps(EvaluateConfig(sampler=sampler, sampling_steps=most), "diffusion")
    with pytest.raises(InvalidInput, match=f"found {most + 1} with the sampler '{sampler}', expected at most {most}"):
        check_sampling_steps(EvaluateConfig(sampler=sampler, sampling_steps=most + 1), "diffusion")
    check_sampling_steps(EvaluateConfig(sampler=sampler, sampling_steps=5000), "flow")


def test_an_evaluation_refuses_too_many_steps_before_it_looks_at_images(tmp_path):
    settings = settings_of(
        tmp_path, "objective.kind=diffusion", "evaluate.sampler=ddim", "evaluate.sampling_steps=2000"
    )
    latents = SimpleNamespace(latent_size=(8, 8))
    record = SimpleNamespace(process_kind="diffusion", model_config=latents, autoencoder=SimpleNamespace(downsample=2))
    with pytest.raises(InvalidInput, match="evaluate.sampling_steps: found 2000"):
        evaluation_protocol(settings, SimpleNamespace(record=record))


def test_new_settings_are_recorded_only_where_they_are_set(tmp_path):
    config = tiny_recipe(tmp_path)
    assert not {"metrics", "per_class"} & resolved(config)["evaluate"].keys()
    config = tiny_recipe(tmp_path, 'evaluate.metrics=["cmmd"]', "evaluate.per_class=true")
    assert resolved(config)["evaluate"]["metrics"] == ("cmmd",)


def test_too_few_images_to_score_are_refused_by_their_number(tmp_path):
    settings = ScoringSettings.from_recipe(tiny_recipe(tmp_path))
    assert images_protocol(settings, 10).num_samples == 10
    with pytest.raises(InvalidInput, match=r"found 5 images to score, expected at least 10, .*Add images$"):
        images_protocol(settings, 5)
