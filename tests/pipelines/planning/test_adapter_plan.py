"""`raydit plan` of trainings that change a part of the parameters alone."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_partial_training import ALL_BUT_THE_FINAL_LAYER

from pipelines.config.reader import load_recipe
from pipelines.planning.hardware import parse_cluster
from pipelines.planning.plan import Images, make_plan
from raydit.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "pipelines" / "recipes" / "imagenet256-finetune.toml"
IMAGENET = Images(training=1_281_167, held_out=0, classes=1000, source="as given")
WIDTH = 1152
"""Hidden size of DiT-XL/2."""


def planned(*overrides, cluster="8xH100"):
    return make_plan(load_recipe(RECIPE, overrides), parse_cluster(cluster), IMAGENET)


def train_stage(plan):
    (train,) = (stage for stage in plan.stages if stage.stage == "train")
    return train


@pytest.mark.parametrize(
    ("targets", "widths"),
    [
        ("['blocks.{20..27}.mlp.*']", 8 * 2 * 5 * WIDTH),  # the example of docs/how-to/lora.md
        ("['*.attn.qkv']", 28 * 4 * WIDTH),
        ("['mlp', 'blocks.0.mlp.fc1']", 28 * 2 * 5 * WIDTH),
        ("['final_layer.linear']", WIDTH + 32),
    ],
)
def test_globs_are_planned_as_the_layers_that_they_match(targets, widths):
    plan = planned("train.lora.rank=16", f"train.lora.targets={targets}")
    assert train_stage(plan).memory["gradients"] == 4 * 16 * widths
    assert plan.checkpoint_bytes == 4 * 4 * 16 * widths


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.lora.targets=['blocs.*']",), "train.lora.targets: found 'blocs.*'.* which matches none"),
        (("train.lora.targets=['mlp', 'blocks.{27..28}.mlp.*']",), "found 'blocks.28.mlp.*'.* which matches none"),
        (("train.lora.rank=5000",), "train.lora.rank: found 5000, expected at most 1152"),
        (
            ("train.lora.targets=['modulation']", "model.conditioning='in_context'"),
            "train.lora.targets: found 'modulation', which matches no layer",
        ),
    ],
)
def test_an_adapter_that_training_refuses_is_not_planned(overrides, message):
    with pytest.raises(InvalidInput, match=message):
        planned("train.lora.rank=16", *overrides)


@pytest.mark.parametrize(
    ("override", "least", "most"),
    [
        ("train.lora.rank=16", 0.65, 0.7),  # a backward pass of all layers' inputs, and of no weights
        (f"train.start.freeze={list(ALL_BUT_THE_FINAL_LAYER)}", 0.33, 0.34),  # next to no backward pass
    ],
)
def test_a_partial_training_is_planned_with_its_own_arithmetic(override, least, most):
    """On 64 accelerators the gradients of all parameters would take longer than the arithmetic."""
    multipliers, cluster = "train.lr_multipliers={}", "64xH100"
    full, part = (train_stage(planned(multipliers, *each, cluster=cluster)) for each in ((), (override,)))
    assert full.limit == "gradient all-reduce" and part.limit == "arithmetic"
    assert least < part.flops / full.flops < most
    assert part.seconds < full.seconds / 2


@pytest.mark.parametrize(
    ("override", "share"),
    [
        ("train.lora.rank=16", 0.55),  # 11 instead of 20 vectors of a block's width for each token
        ("train.start.freeze=['blocks.{0..13}.*', 'x_embedder.*', 't_embedder.*', 'y_embedder.*']", 0.5),
        (f"train.start.freeze={list(ALL_BUT_THE_FINAL_LAYER)}", 0.03),
    ],
)
def test_a_partial_training_is_planned_with_what_it_keeps(override, share):
    common = ("train.lr_multipliers={}", "train.dtype='float32'")
    full, part = (train_stage(planned(*common, *each)).memory["activations"] for each in ((), (override,)))
    assert part / full == pytest.approx(share, abs=0.01)


def test_words_are_planned_without_torch():
    flags = "'--set', 'train.lora.rank=16', '--set', 'train.lora.targets=[\"attention\", \"modulation\"]'"
    script = (
        "import sys; from pipelines.cli.main import cli;"
        f"cli(['plan', {str(RECIPE)!r}, {flags}, '--cluster', '8xH100', '--images', '1000'], standalone_mode=False);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False"
