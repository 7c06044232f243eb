"""Training of an autoencoder in this process: resumed to the bit, against a discriminator, and of a decoder alone."""

import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_recipe
from tiny_encode import Context
from tiny_images import image_rows

from cluster import storage
from dit.autoencoder import Autoencoder, LatentScale, create_autoencoder, describe_autoencoder, save_autoencoder
from pipelines.autoencoder import require_measurable, train_autoencoder
from pipelines.checkpoints.folder import CheckpointFolder
from pipelines.config.autoencoder_training import AutoencoderTrainConfig, measured_at_once
from pipelines.images.open import open_source
from pipelines.training.autoencoder import autoencoder_quality, autoencoder_result
from pipelines.training.autoencoder.autoencoder_quality import (
    ExtractorChoice,
    ReconstructionQuality,
    measured_positions,
    reconstruct,
)
from pipelines.training.autoencoder.autoencoder_result import finish_autoencoder
from pipelines.training.autoencoder.autoencoder_start import require_start
from pipelines.training.autoencoder.autoencoder_worker import AutoencoderWorkerSettings, train_on_images
from pipelines.training.group.messages import InLoop, Notice, Report, Saved, Validated
from pipelines.training.group.worker import Worker
from raydit.errors import Diverged, InvalidInput

SETTINGS = {
    "steps": 4, "global_batch_size": 4, "warmup_steps": 0, "downsample": 2, "width": 8, "checkpoint_every": 2,
    "log_every": 1,
}  # fmt: skip
TRAIN = AutoencoderTrainConfig(**SETTINGS)
ADVERSARIAL = replace(
    TRAIN, adversarial_weight=0.5, adversarial_start=1, crop=12, dtype="bfloat16", reconstruction="l1"
)

FIGURES = {"psnr", "ssim", "rfd_efficientnet_lite0_10"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    return image_rows(tmp_path_factory.mktemp("images"), pixels[:7], pixels[7:])


def run(folder, images, train, stop_after=None, extractor=None, held_out=None, scored_by=None):
    """Train in this process, until the driver asks to stop after a step, and return the messages."""
    messages = []
    settings = AutoencoderWorkerSettings(
        train=train, seed=3, random="counter", image_size=16, folder=str(folder), images=[], held_out=[],
        max_quarantined=0.05, extractor=extractor, scored_by=scored_by,
    )  # fmt: skip

    def stop():
        return any(isinstance(message, Report) and message.step == stop_after for message in messages)

    worker = Worker(0, 1, torch.device("cpu"), messages.append, stop)
    train_on_images(worker, settings, images, held_out or image_rows(folder / "none"))
    return messages


def reports(messages):
    """Losses by step."""
    return {message.step: message.metrics["loss"] for message in messages if isinstance(message, Report)}


def assert_same_files(folder, expected):
    names = sorted(path.name for path in expected.iterdir() if path.is_file())
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == names
    assert {"config.json", "report.json", "raydit.json", "reconstructions.png"} <= {*names}
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("train", [TRAIN, ADVERSARIAL], ids=["alone", "adversarial"])
def test_a_training_that_was_stopped_between_checkpoints_resumes_to_the_bit(tmp_path, images, train, monkeypatch):
    monkeypatch.setattr("pipelines.training.group.stop.EXCHANGE_SECONDS", 0)
    unbroken = run(tmp_path / "unbroken", images, train)
    first = run(tmp_path / "broken", images, train, stop_after=3)
    second = run(tmp_path / "broken", images, train)
    assert max(reports(first)) == 3 and min(reports(second)) == 4
    assert {**reports(first), **reports(second)} == reports(unbroken)
    assert_same_files(tmp_path / "broken", tmp_path / "unbroken")
    checkpoints = [tmp_path / name / "training" / "step_0000004" for name in ("broken", "unbroken")]
    for name in ("model.safetensors", "ema.safetensors", "trainer/optimizer.safetensors"):
        broken, expected = (load_file(folder / name) for folder in checkpoints)
        assert broken.keys() == expected.keys() and all(torch.equal(broken[key], expected[key]) for key in broken)
        own = any("discriminator" in key for key in expected)
        assert own == (train is ADVERSARIAL)
    # The discriminator has taken a step less, because it starts with the second batch.
    steps = {float(value) for key, value in expected.items() if key.startswith("step/")}
    assert steps == ({4.0, 3.0} if train is ADVERSARIAL else {4.0})


def test_a_training_goes_on_from_the_newest_checkpoint_that_is_not_damaged(tmp_path, images, monkeypatch):
    """Found by the job before it does anything else; what it sets aside goes with the files of the training."""
    monkeypatch.setattr("pipelines.training.group.stop.EXCHANGE_SECONDS", 0)
    config = tiny_recipe(tmp_path, *(f"autoencoder.train.{name}={value}" for name, value in SETTINGS.items()))
    folder, said = tmp_path / "output" / "autoencoder", []

    class Interrupted(Context):
        def say(self, stage, text):
            said.append(text)

        def prepare_work(self, workers, stage):
            raise KeyboardInterrupt

    def start_job():
        with pytest.raises(KeyboardInterrupt):
            train_autoencoder(config, context=Interrupted())

    start_job()
    run(folder, images, TRAIN, stop_after=3)
    weights = folder / "training" / "step_0000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    start_job()
    kept = folder / "training" / "superseded" / "training-1" / "damaged_step_0000003"
    assert kept.is_dir() and "step 3 is damaged" in said[-1] and f"it is kept in {kept}" in said[-1]
    assert min(reports(run(folder, images, TRAIN))) == 3
    run(tmp_path / "unbroken", images, TRAIN)
    (folder / "plan.json").unlink()
    assert_same_files(folder, tmp_path / "unbroken")


def test_workers_leave_the_loop_when_its_last_checkpoint_is_complete(tmp_path, images, monkeypatch):
    """A driver that was asked to stop ends the workers as soon as they have left the loop."""
    write = CheckpointFolder.write

    def write_slowly(checkpoints, step, save):
        time.sleep(0.2)
        write(checkpoints, step, save)

    monkeypatch.setattr(CheckpointFolder, "write", write_slowly)
    monkeypatch.setattr("pipelines.training.group.stop.EXCHANGE_SECONDS", 0)
    messages = run(tmp_path / "stopped", images, replace(TRAIN, checkpoint_every=4), stop_after=1)
    loop = [message for message in messages if isinstance(message, InLoop | Saved)]
    assert loop == [InLoop(True), Saved(1, interrupted=True), InLoop(False)]


def test_validation_changes_nothing_and_ends_with_the_figures_of_the_report(tmp_path, images):
    run(tmp_path / "plain", images, TRAIN, held_out=images)
    extractor = ExtractorChoice("efficientnet-lite0", None)
    validated = replace(TRAIN, validate_every=2)
    messages = run(tmp_path / "validated", images, validated, extractor=extractor, held_out=images)
    steps = {message.step: message.metrics for message in messages if isinstance(message, Validated)}
    report, plain = (storage.read_json(str(tmp_path / name / "report.json")) for name in ("validated", "plain"))
    name = "rfd_efficientnet_lite0_10"
    assert {*steps} == {2, 4} and steps[4].keys() == {"psnr", "ssim", name}
    assert steps[4] == {key: report[key] for key in steps[4]} and report[name] > 0 and report["psnr"] == plain["psnr"]
    assert report["images"] == "10 held-out images" and report["extractor"]["name"] == "efficientnet-lite0"
    assert len(report["latents"]["std"]) == 4
    weights = [tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("plain", "validated")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_few_large_images_are_computed_at_once():
    assert [measured_at_once(size) for size in (16, 64, 65, 128, 512, 4096)] == [64, 64, 62, 16, 1, 1]


def test_reconstructions_are_compared_where_they_are_computed():
    """The similarity of an image takes a core longer than a GPU takes to reconstruct it."""
    module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8).to("meta")
    decoded = reconstruct(module, torch.zeros(3, 16, 16, 3, dtype=torch.uint8))
    assert (decoded.device.type, decoded.dtype, decoded.shape) == ("meta", torch.uint8, (3, 16, 16, 3))


def test_figures_do_not_depend_on_how_many_images_are_computed_at_once(tmp_path, images, monkeypatch):
    measured, calls = [], []
    for at_once in (10, 3, 1):
        monkeypatch.setattr("pipelines.config.autoencoder_training.MEASURED_PIXELS", at_once * 16**2 + 100)
        torch.manual_seed(0)
        module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
        for half in (module.encoder, module.decoder):
            half.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
        worker = Worker(0, 1, torch.device("cpu"), print, lambda: False)
        quality = ReconstructionQuality(worker, images, ExtractorChoice("efficientnet-lite0", None))
        folder = tmp_path / str(at_once)
        finish_autoencoder(module, str(folder), images, quality, True, TRAIN)
        assert max(calls) == at_once
        measured.append(storage.read_json(str(folder / "report.json")))
        calls.clear()
    for other in measured[1:]:
        figures = {name: pytest.approx(value, rel=1e-3) for name, value in measured[0].items() if name in FIGURES}
        assert figures.keys() == FIGURES and {name: other[name] for name in FIGURES} == figures
        for name in ("mean", "std"):
            assert other["latents"][name] == pytest.approx(measured[0]["latents"][name], rel=1e-5)


def test_few_images_are_all_measured_and_many_by_one_of_each_equal_stretch():
    for count in (1, 2, 1797, 4096):
        np.testing.assert_array_equal(measured_positions(count), np.arange(count))
    for count in (4097, 50_000, 1_281_167):
        positions = measured_positions(count)
        assert len(positions) == 4096
        np.testing.assert_array_equal((positions * 4096 + 4095) // count, np.arange(4096))


def test_classes_in_a_row_are_measured_alike(monkeypatch, tmp_path):
    """The scale that the first images alone give is that of their classes, and normalises the latents of all."""
    monkeypatch.setattr(autoencoder_quality, "MEASURED_IMAGES", 8)
    dark, bright = (np.full((30, 16, 16, 3), value, np.uint8) for value in (0, 255))
    images, decoded = image_rows(tmp_path, dark, bright), []
    mean = autoencoder_result.latent_statistics(lambda pixels: pixels.repeat(1, 2, 1, 1), images).mean
    assert mean == (0.0, 0.0, 0.0)

    def reconstruct(module, originals):
        decoded.extend(originals[:, 0, 0, 0].tolist())
        return originals

    monkeypatch.setattr(autoencoder_quality, "reconstruct", reconstruct)
    quality = ReconstructionQuality(Worker(0, 1, torch.device("cpu"), print), images, None)
    assert quality.measure(None)["ssim"] == pytest.approx(1) and decoded[: quality.num_images] == [0] * 4 + [255] * 4


class Encoder:
    """Stands in for an autoencoder: gives each image moments of its own, and counts the values that are still held."""

    def __init__(self):
        self.moments, self.held, self.most_held = [], [], 0

    def encode(self, images):
        generator = torch.Generator().manual_seed(len(self.moments))
        batch = 3 + torch.randn((len(images), 6, 4, 4), generator=generator)
        self.moments.append(batch.clone())
        self.held = [each for each in self.held if each() is not None] + [weakref.ref(batch)]
        self.most_held = max(self.most_held, sum(each().numel() for each in self.held))
        return batch


@pytest.mark.parametrize("num_batches", [1, 2, 100])
def test_statistics_of_latents_hold_few_moments_and_are_those_of_all_at_once(monkeypatch, num_batches, tmp_path):
    """Moments of all images at once exceed the memory of a worker after its last step, again at every attempt."""
    monkeypatch.setattr(autoencoder_result, "measured_at_once", lambda size: 3)
    monkeypatch.setattr(autoencoder_result, "CHUNK_VALUES", num_batches * 3 * 6 * 16)
    images, encoder = image_rows(tmp_path, np.zeros((20, 16, 16, 3), np.uint8)), Encoder()
    found = autoencoder_result.latent_statistics(encoder.encode, images)
    mean, log_variance = torch.cat(encoder.moments)[:20].double().chunk(2, dim=1)
    variance = mean.var(dim=(0, 2, 3), correction=0) + log_variance.exp().mean(dim=(0, 2, 3))
    expected = LatentScale(tuple(mean.mean(dim=(0, 2, 3)).tolist()), tuple(variance.sqrt().tolist()))
    assert found.mean == pytest.approx(expected.mean, rel=1e-14)
    assert found.std == pytest.approx(expected.std, rel=1e-14)
    if num_batches == 100:  # as many as there are: equal to the bit
        assert found == expected
    else:
        assert encoder.most_held <= (num_batches + 1) * 3 * 6 * 16


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Folder of an autoencoder with a scale that no measurement would give."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("pretrained")
    module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
    save_autoencoder(module, folder, LatentScale((0.5,) * 4, (3.0,) * 4))
    return folder


def test_a_decoder_that_is_trained_alone_leaves_latents_as_they_were(tmp_path, images, pretrained):
    train = replace(ADVERSARIAL, start=str(pretrained), decoder_only=True, perceptual_network="efficientnet-lite0")
    run(tmp_path / "decoder", images, train, extractor=ExtractorChoice("efficientnet-lite0", None))
    before, after = Autoencoder.load(pretrained), Autoencoder.load(tmp_path / "decoder")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(before.encode(pixels), after.encode(pixels)) and before.scale == after.scale
    assert not torch.equal(before.module.decoder.conv_out.weight, after.module.decoder.conv_out.weight)
    assert "the same network" in storage.read_json(str(tmp_path / "decoder" / "report.json"))["perceptual"]["relation"]
    optimizer = load_file(tmp_path / "decoder" / "training" / "step_0000004" / "trainer" / "optimizer.safetensors")
    assert not any("autoencoder.encoder" in key or "perceptual" in key for key in optimizer)


def test_the_report_relates_the_losses_to_the_scores_though_nothing_is_measured_by_them(tmp_path, images):
    train = replace(TRAIN, steps=1, perceptual_network="efficientnet-lite2")
    run(tmp_path, images, train, scored_by="efficientnet-lite0")
    perceptual = storage.read_json(str(tmp_path / "report.json"))["perceptual"]
    assert perceptual["scores"] == "efficientnet-lite0" and "one family" in perceptual["relation"]


def test_a_training_that_starts_from_a_pretrained_one_first_has_its_error(tmp_path, images, pretrained):
    slow = replace(TRAIN, start=str(pretrained), learning_rate=1e-12, kl_weight=0)
    run(tmp_path / "slow", images, slow)
    before, after = Autoencoder.load(pretrained), Autoencoder.load(tmp_path / "slow")
    for name, weight in before.module.state_dict().items():
        torch.testing.assert_close(after.module.state_dict()[name], weight, rtol=1e-6, atol=1e-8)
    assert after.scale != before.scale  # as measured


def test_a_start_of_another_shape_or_class_is_refused(pretrained, tiny_autoencoder_folder):
    with pytest.raises(InvalidInput, match="downsample: found 4, expected 2, that of .* Set autoencoder.train"):
        require_start(AutoencoderTrainConfig(start=str(pretrained)))
    assert require_start(replace(TRAIN, start=str(pretrained))) == describe_autoencoder(pretrained)
    with pytest.raises(InvalidInput, match="found class AutoencoderTiny, expected AutoencoderKL"):
        require_start(replace(TRAIN, start=str(tiny_autoencoder_folder)))


@pytest.fixture
def tiny_autoencoder_folder(tmp_path):
    from diffusers import AutoencoderTiny

    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**widths, **blocks).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_batches_that_are_not_finite_are_skipped_or_end_the_training(tmp_path, images, monkeypatch):
    """A rate of 1e30 makes the second step's loss overflow; the last checkpoint is that of the first step."""
    wild = replace(TRAIN, learning_rate=1e30, checkpoint_every=1, grad_clip=0)
    with pytest.raises(Diverged, match="step 2: loss .*whose 4 images are finite.*autoencoder.train.on_nonfinite"):
        run(tmp_path / "stop", images, wild)
    with pytest.raises(Diverged, match="rolling back to step 1 did not help"):
        run(tmp_path / "skip", images, replace(wild, on_nonfinite="skip", max_skipped=1))
    messages = run(tmp_path / "fine", images, replace(TRAIN, on_nonfinite="skip", dtype="tf32"))
    assert [message.text for message in messages if isinstance(message, Notice)] == [
        "autoencoder.train.dtype = 'tf32': this CPU has no TF32, so training continues in float32"
    ]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"perceptual_weight": 1.0}, "perceptual_weight: found 1.0 without perceptual_network"),
        ({"adversarial_start": 5}, "adversarial_start: found 5 without adversarial_weight"),
        ({"adversarial_weight": 0.5, "accumulation_steps": 2}, "accumulation_steps: found 2 with adversarial_weight"),
        ({"decoder_only": True}, "decoder_only: found true without start"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, error):
    with pytest.raises(InvalidInput, match=error):
        replace(TRAIN, **settings)


@pytest.mark.parametrize(("count", "found"), [(0, "without held-out images"), (1, "with 1 held-out image")])
def test_validation_on_fewer_images_than_a_covariance_needs_is_refused(tmp_path, count, found):
    config, train = tiny_recipe(tmp_path), replace(TRAIN, validate_every=2)
    held_out = open_source(config.images).listing().take(range(count))
    with pytest.raises(InvalidInput, match=f"autoencoder.train.validate_every: found 2 {found}, expected at least 2"):
        require_measurable(config, train, held_out)
    assert require_measurable(config, TRAIN, held_out) is None


def test_crops_must_fit_the_images_and_the_latents():
    replace(TRAIN, crop=12).check_image_size(16)
    with pytest.raises(InvalidInput, match="crop: found 18, expected at most images.size = 16"):
        replace(TRAIN, crop=18).check_image_size(16)
    with pytest.raises(InvalidInput, match="crop: found 9, expected a multiple of .*downsample = 2"):
        replace(TRAIN, crop=9).check_image_size(16)
