"""What `raydit plan` counts for held-out images: validation of a training, and reconstructions of an evaluation."""

from pathlib import Path

import pytest

from dit.macs import forward_macs
from evaluation.extractors import extractor_macs
from pipelines.config.reader import load_recipe
from pipelines.config.training import TrainConfig
from pipelines.planning.hardware import parse_cluster
from pipelines.planning.networks import resolve_networks
from pipelines.planning.plan import Images, make_plan
from pipelines.planning.render import plan_lines

RECIPE = Path(__file__).resolve().parents[3] / "pipelines" / "recipes" / "imagenet256-dit-xl2.toml"


def stages(plan):
    return {stage.stage: stage for stage in plan.stages}


def test_validation_is_planned_by_its_closed_form():
    """All held-out images by the averaged and the raw weights, forward passes only; also after the last step."""
    images = Images(training=1_153_050, held_out=128_117, classes=1000, source="")

    def train_stage(every, **further):
        overrides = [f"train.validate_every={every}", "train.steps=399_000"] if every else []
        return make_plan(load_recipe(RECIPE, overrides), parse_cluster("8xH100"), images, **further)

    plan, plain = train_stage(2000), train_stage(None)
    train, without = stages(plan)["train"], stages(plain)["train"]
    macs = forward_macs(plan.model)
    training = 399_000 * 256 * 6 * macs
    assert train.flops == training + 200 * 2 * 128_117 * 2 * macs
    assert train.work == "399,000 steps of 256 images, 200 validations of 128,117 images"
    assert without.flops == 400_000 * 256 * 6 * macs and "validation" not in without.work
    # 2002 batches of 64 images, which 8 workers share: 251 each.
    speed, _ = plan.cluster.speed("train", TrainConfig(num_workers=8, gpus_per_worker=1), "bfloat16", True, 1152)
    padded = 200 * 2 * 8 * 251 * 64 * 2 * macs / speed
    assert train.seconds == pytest.approx((without.seconds - 25) * 399 / 400 + 25 + padded)
    # The images per second of a training do not include it.
    given = stages(train_stage(2000, speeds={"train": 2000.0}))["train"]
    assert given.seconds == pytest.approx(399_000 * 256 / 2000 + padded)


@pytest.mark.parametrize(
    ("held_out", "overrides", "real", "reconstructed"),
    [
        (500, [], 500, 500),
        (500, ["evaluate.num_samples=60"], 500, 60),
        (500, ["evaluate.reconstructions=false"], 500, 0),
        (1, [], 1, 0),
        (128_117, [], 50_000, 50_000),  # of more than 100,000 the real baseline has as many as there are samples
    ],
)
def test_reconstructions_are_planned_by_their_closed_form(held_out, overrides, real, reconstructed):
    images = Images(training=10_000, held_out=held_out, classes=1000, source="")
    config = load_recipe(RECIPE, overrides)
    evaluate = stages(make_plan(config, parse_cluster("8xH100"), images))["evaluate"]
    samples, encoder, decoder = config.evaluate.num_samples, 136_361_082_880, 311_093_641_216
    scored = samples + 10_000 + real + reconstructed
    network = samples * 250 * 2 * forward_macs(resolve_networks(config, 1000).model)
    autoencoder = (samples + reconstructed) * 2 * decoder + reconstructed * 2 * encoder
    assert evaluate.images == scored
    assert evaluate.flops == network + autoencoder + scored * 2 * extractor_macs("inception")
    said = f", {10_000 + real:,} real images" + (f", {reconstructed:,} reconstructions" if reconstructed else "")
    assert evaluate.work == f"{samples:,} samples of 250 steps{said}"


def test_a_plan_says_what_it_leaves_out():
    images = Images(training=1000, held_out=50, classes=10, source="")
    digits = RECIPE.with_name("digits.toml")
    for recipe, more in ((RECIPE, ""), (digits, "measurements of the trained autoencoder, ")):
        *_, last = plan_lines(make_plan(load_recipe(recipe), parse_cluster("1xL4"), images))
        started = "not counted  waiting for machines, compilation, previews, "
        assert last == f"{started}{more}arithmetic of the metrics, MLflow"
