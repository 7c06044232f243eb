"""`raydit plan`: what stages need and take, by figures that can be checked, and without starting anything."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import RECIPE, place_flags, tiny_recipe

from dit.hardware.accelerators import ACCELERATORS
from dit.macs import forward_macs
from evaluation.extractors import extractor_macs
from pipelines.config.encode import EncodeConfig
from pipelines.config.reader import load_recipe
from pipelines.config.recipe import AutoencoderConfig
from pipelines.latents import schema
from pipelines.planning.hardware import Cluster, fit_workers, parse_cluster
from pipelines.planning.measure import measure_this_machine
from pipelines.planning.networks import autoencoder_config, resolve_networks
from pipelines.planning.plan import Images, count_images, make_plan
from pipelines.planning.render import format_bytes, format_duration, plan_lines
from raydit.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "pipelines" / "recipes"
IMAGENET = Images(training=1_281_167, held_out=0, classes=1000, source="as told")
OF_THE_PAPER = sorted({*RECIPES.glob("imagenet256*.toml")} - {RECIPES / "imagenet256-finetune.toml"})


def planned(recipe, cluster, *overrides, **further):
    keep = frozenset(override.partition("=")[0] for override in overrides)
    return make_plan(load_recipe(recipe, overrides), parse_cluster(cluster), IMAGENET, keep=keep, **further)


def stages(plan):
    return {stage.stage: stage for stage in plan.stages}


@pytest.mark.parametrize("count", [8, 64])
@pytest.mark.parametrize("recipe", OF_THE_PAPER, ids=lambda path: path.stem)
def test_imagenet_is_planned_by_its_closed_forms(recipe, count):
    plan = planned(recipe, f"{count}xH100")
    encode, train, evaluate = stages(plan).values()
    macs = forward_macs(plan.model)
    assert encode.flops == 1_281_167 * 2 * 2 * 136_361_082_880
    assert train.flops == 400_000 * 256 * 6 * macs
    decoding, features = 2 * 311_093_641_216, 2 * extractor_macs("inception")
    assert evaluate.flops == 50_000 * (250 * 2 * macs + decoding) + (50_000 + 1_281_167) * features
    assert plan.latent_bytes == 1_281_167 * 2 * 8 * 32 * 32 * 2
    assert all(stage.fits and stage.workers == count for stage in plan.stages)
    assert plan.seconds == sum(stage.seconds for stage in plan.stages)
    assert plan.dollars == pytest.approx(plan.seconds / 3600 * count * ACCELERATORS["H100"].dollars_per_hour)
    several = [f"{stage}.num_workers=64" for stage in ("encode", "train", "evaluate")]
    assert plan.overrides == (several if count == 64 else [])


def test_more_devices_take_less_time_but_not_in_proportion():
    eight, many = (planned(RECIPES / "imagenet256-dit-xl2.toml", f"{count}xH100") for count in (8, 64))
    assert eight.seconds / 8 < many.seconds < eight.seconds
    assert many.dollars > eight.dollars
    assert stages(many)["train"].limit == "gradient all-reduce"


@pytest.mark.parametrize("flip", [True, False])
def test_a_shard_takes_the_bytes_that_are_planned_for_its_images(tmp_path, flip):
    shape, rows = (8, 8, 8), 400
    config = tiny_recipe(tmp_path, f"encode.flip={str(flip).lower()}")
    plan = make_plan(config, parse_cluster("1xL4"), Images(training=rows, held_out=0, classes=2, source=""))
    description = schema.LatentDescription(
        moments_shape=shape, flip=flip, autoencoder={}, preprocessing={}, class_names=("a", "b")
    )
    keys, moments = [f"{row:08d}" for row in range(rows)], np.zeros((rows, *shape), np.float16)
    table = schema.shard_table(
        schema.latent_schema(description), keys, np.zeros(rows, np.int32), moments, moments if flip else None
    )
    keys_and_labels = sum(len(key) + 4 for key in keys) + 4 * rows  # keys have their lengths before them
    assert 0 < len(schema.parquet_bytes(table)) - plan.latent_bytes - keys_and_labels < 4096


def test_checkpoints_are_counted_as_written_and_as_kept():
    plan = planned(RECIPES / "imagenet256-dit-xl2.toml", "8xH100")
    assert (plan.checkpoints_written, plan.checkpoints_kept) == (40, 9)  # 8 of every 50,000 steps, and one before
    every = planned(RECIPES / "imagenet256.toml", "8xH100", "train.steps=25_000")
    assert (every.checkpoints_written, every.checkpoints_kept) == (3, 3)


def test_the_best_checkpoint_and_the_guide_are_counted_as_kept(tmp_path):
    recipe, few = RECIPES / "imagenet256-dit-xl2.toml", ("train.steps=100_000", "train.keep_last=2")
    plain = planned(recipe, "8xH100", *few)
    best = planned(recipe, "8xH100", *few, "train.keep_best=fid_50k")
    assert best.checkpoints_kept == plain.checkpoints_kept + 1
    guide = f"evaluate.autoguidance={tmp_path}/checkpoints/step_0010000"
    guided = planned(recipe, "8xH100", *few, f"output={tmp_path}", guide, "evaluate.cfg_scale=2")
    assert guided.checkpoints_kept == plain.checkpoints_kept + 1


@pytest.mark.parametrize("cluster", ["4xT4", "8xA10G", "2xV100", "1xL4", "1xH100"])
@pytest.mark.parametrize("recipe", OF_THE_PAPER, ids=lambda path: path.stem)
def test_what_does_not_fit_fits_with_the_change_that_is_advised(recipe, cluster):
    plan = planned(recipe, cluster)
    for stage in plan.stages:
        assert stage.fits == (not stage.advice)
        if not stage.fits:
            changes = re.findall(r"--set (\S+)", stage.advice)
            assert changes and stages(planned(recipe, cluster, *changes))[stage.stage].fits


def test_what_no_setting_fits_is_said():
    huge = planned(RECIPES / "imagenet256.toml", "1xT4", "images.size=4096", "encode.batch_size=4")
    assert "take devices with more memory" in stages(huge)["encode"].advice


def test_workers_share_batches_evenly_and_have_work():
    plan = planned(RECIPES / "imagenet256.toml", "24xA100", "images.size=256")
    assert [stage.workers for stage in plan.stages] == [24, 16, 24]
    few = make_plan(load_recipe(RECIPE), parse_cluster("64xL4"), Images(training=20, held_out=4, classes=3, source=""))
    assert [stage.workers for stage in few.stages] == [8, 3, 8, 6]  # 3 shards of 8 images; (16 + 24 + 4) / 8
    assert "autoencoder.train.gpus_per_worker=1" in few.overrides and "train.num_workers=8" in few.overrides


def test_workers_that_the_user_sets_stay_and_have_accelerators():
    plan = planned(RECIPES / "imagenet256.toml", "64xH100", "train.num_workers=16", "train.gpus_per_worker=0")
    assert [stage.workers for stage in plan.stages] == [64, 16, 64]
    assert "train.gpus_per_worker=1" in plan.overrides and "train.num_workers=64" not in plan.overrides


def test_measured_speeds_replace_computed_ones():
    plan = planned(RECIPES / "imagenet256.toml", "8xH100", speeds={"train": 2000.0})
    assert stages(plan)["train"].seconds == 400_000 * 256 / 2000
    assert "speed        train: given: 2,000 images/s for all 8 workers together" in plan_lines(plan)
    one = planned(RECIPES / "imagenet256.toml", "1xH100", speeds={"train": 250.0})
    assert "speed        train: given: 250 images/s for its one worker" in plan_lines(one)
    assert stages(plan)["encode"] == stages(planned(RECIPES / "imagenet256.toml", "8xH100"))["encode"]


@pytest.mark.parametrize(
    ("overrides", "calls"),
    [(["evaluate.cfg_scale=1.5"], 500), ([], 250), (["evaluate.cfg_scale=4.0", "evaluate.sampling_steps=50"], 100)],
)
def test_guidance_doubles_the_arithmetic_of_sampling(overrides, calls):
    plan, none = (
        planned(RECIPES / "imagenet256.toml", "8xH100", *overrides, f"evaluate.num_samples={count}")
        for count in (1000, 2000)
    )
    decoding, features = 2 * 311_093_641_216, 2 * extractor_macs("inception")
    each = (stages(none)["evaluate"].flops - stages(plan)["evaluate"].flops) / 1000
    assert each == calls * 2 * forward_macs(plan.model) + decoding + features


def test_the_precision_of_samples_is_planned():
    recipe = RECIPES / "imagenet256-dit-xl2.toml"
    settings = (["float32"], ["tf32"], ["bfloat16"], ["bfloat16", "evaluate.compile=true"])
    flags = ([f"evaluate.dtype={dtype}", *more] for dtype, *more in settings)
    exact, tf32, rounded, compiled = (stages(planned(recipe, "8xH100", *overrides))["evaluate"] for overrides in flags)
    assert exact.seconds > tf32.seconds > rounded.seconds > compiled.seconds
    assert exact.memory["tokens"] == tf32.memory["tokens"] > rounded.memory["tokens"] == compiled.memory["tokens"]
    assert exact.basis.endswith("67 TFLOP/s (float32)") and compiled.basis.endswith("989 TFLOP/s (bfloat16)")
    assert exact.flops == compiled.flops


def test_products_in_float8_are_planned_as_bfloat16_and_said_not_to_be_measured():
    recipe, dtype = RECIPES / "imagenet256-dit-xl2.toml", ["train.dtype=bfloat16", "train.gpus_per_worker=1"]
    plain, rounded = (
        stages(planned(recipe, "8xH100", *dtype, *more))["train"] for more in ([], ["train.matmul=float8"])
    )
    assert rounded.seconds == plain.seconds and rounded.flops == plain.flops
    assert rounded.basis == f"{plain.basis}; products in float8 were not measured, and are planned as in bfloat16"
    config = load_recipe(recipe, [*dtype, "train.matmul=float8"])
    with pytest.raises(InvalidInput, match="this machine's CPU cores, expected GPUs.*Set --cluster"):
        make_plan(config, cores(), Images(training=20, held_out=4, classes=3, source=""))


def cores(**further) -> Cluster:
    return Cluster(name="CPU core", count=2, memory_bytes=16 * 2**30, cores=2, core_flops=1e11, **further)


def test_cores_that_are_shared_do_not_add_up(tmp_path):
    config = tiny_recipe(tmp_path)
    speeds = {"train": 1e9}
    plan = make_plan(config, cores(speeds=speeds), Images(training=20, held_out=0, classes=3, source=""))
    train = stages(plan)["train"]
    assert train.seconds == pytest.approx(25 + train.flops / (2 * 0.8 * 1e9))
    assert (plan.dollars, plan.overrides) == (None, [])


def test_a_recipe_for_gpus_is_planned_for_cores_where_there_are_none():
    plan = make_plan(load_recipe(RECIPES / "imagenet256-dit-s2.toml"), cores(), IMAGENET)
    assert plan.overrides == [f"{stage}.gpus_per_worker=0" for stage in ("encode", "train", "evaluate")]
    assert not stages(plan)["evaluate"].fits  # eight workers in 16 GiB


def test_this_machine_is_measured_by_the_recipes_own_networks(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.planning.measure.MEASURED_SECONDS", 0.0)
    config = tiny_recipe(tmp_path)
    images = count_images(config, None, 1000)
    assert (images.training + images.held_out, images.classes) == (37, 3)
    plan = make_plan(config, measure_this_machine(config, resolve_networks(config, 3)), images)
    if plan.cluster.accelerator is None:
        assert plan.cluster.speeds.keys() == {"encode", "train", "evaluate", "features"}
        assert all(speed > 0 for speed in plan.cluster.speeds.values()) and plan.cluster.read_seconds > 0
        assert all(stage.basis.startswith("measured") for stage in plan.stages)
        gains, lines = plan.cluster.bfloat16_gains, list(plan_lines(plan))
        for stage in ("encode", "train", "evaluate"):
            said = f'{stage}.dtype = "bfloat16" is {gains[stage]:.2g} times as fast as float32 on a core (measured)'
            assert f"dtype        {said}" in lines


@pytest.mark.parametrize(
    ("cuda", "known"), [("NVIDIA L4", "L4"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA L40", "")]
)
def test_another_card_of_a_similar_name_is_not_taken_for_a_known_one(tmp_path, monkeypatch, cuda, known):
    def measure(device, dtype):
        raise LookupError("this machine's cores are measured")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: cuda)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(total_memory=40 * 2**30))
    monkeypatch.setattr("pipelines.planning.measure.measured_flops", measure)
    config = tiny_recipe(tmp_path)
    with nullcontext() if known else pytest.raises(LookupError):
        found = measure_this_machine(config, resolve_networks(config, 3))
        assert (found.name, found.count, found.memory_bytes) == (known, 2, 40 * 2**30)


def test_the_command_says_all_of_it_and_ends_with_json(raydit):
    recipe = str(RECIPES / "imagenet256-dit-xl2.toml")
    code, out, err = raydit("plan", recipe, "--cluster", "64xh100", "--images", "1281167", "--json")
    assert (code, err) == (0, "")
    *lines, last = out.splitlines()
    content, said = json.loads(last), "\n".join(lines)
    assert content["stages"][1]["flops"] == stages(planned(recipe, "64xH100"))["train"].flops
    assert content["cluster"]["accelerator"]["memory_gib"] == 80
    for part in (
        "DiT-XL/2, 675.1M parameters",
        "64 x H100 in nodes of 8",
        "39.1 GiB of latents",
        "assumed, as measured on an H200 with DiT-XL/2: 42% of 989",
    ):
        assert part in said
    assert "--set train.num_workers=64" in said and "the price, about an on-demand list price" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "H100"], "--cluster: found 'H100', expected a number and a device, such as 8xH100"),
        (["--cluster", "8xH10"], "did you mean H100?"),
        (["--cluster", "8xH100", "--measured", "train"], "--measured: found 'train', expected STAGE=IMAGES_PER_SECOND"),
        (["--cluster", "8xH100", "--measured", "tarin=3"], "The stages are autoencoder, encode, train, evaluate"),
        *(
            (["--cluster", "8xH100", "--measured", f"train={speed}"], f"--measured: found 'train={speed}', expected")
            for speed in ("inf", "1e999", "nan", "0", "-1", "1e-320")
        ),
        (["--cluster", "8xH100", "--set", "images.path=nowhere"], "give their number: --images"),
        (
            ["--cluster", "8xH100", "--set", 'autoencoder={id="x/y"}'],
            "autoencoder.id: found 'x/y', which is not on this",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(raydit, tmp_path, arguments, message):
    code, out, err = raydit("plan", str(RECIPE), *place_flags(tmp_path), *arguments)
    assert (code, out) == (2, "")
    (line,) = err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("price", "message"),
    [
        ("nan", "nan is not a finite number."),
        ("inf", "inf is not in the range 0<=x<=1000000."),
        ("1e308", "1e+308 is not in the range 0<=x<=1000000."),
    ],
)
def test_a_price_that_is_no_amount_is_refused(raydit, price, message):
    code, out, err = raydit("plan", str(RECIPE), "--cluster", "8xH100", "--images", "100", "--price", price)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith(f"Invalid value for '--price': {message}")


def test_a_git_lfs_pointer_in_place_of_an_autoencoders_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
    with pytest.raises(ValueError, match="config.json is a Git LFS pointer, expected .*git lfs pull"):
        autoencoder_config(AutoencoderConfig(id=str(tmp_path)))


def test_a_plan_for_a_cluster_imports_nothing_heavy():
    script = (
        "import sys; from pipelines.cli.main import cli;"
        f"cli(['plan', {str(RECIPES / 'imagenet256.toml')!r}, '--cluster', '8xH100', '--images', '1000'],"
        " standalone_mode=False);"
        "print([m for m in ('torch', 'ray', 'mlflow', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (273, "4 min 33 s"),
        (7 * 3600 + 720, "7 h 12 min"),
        (3.1 * 86400, "3.1 days"),
    ],
)
def test_durations_read_as_people_say_them(seconds, said):
    assert format_duration(seconds) == said


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 B"), (1536, "1.5 KiB"), (39.1 * 2**30, "39.1 GiB"), (2**41, "2.0 TiB")]
)
def test_bytes_have_the_unit_that_fits(number, said):
    assert format_bytes(number) == said


def test_a_cluster_of_many_spaces_is_refused_at_once():
    with pytest.raises(ValueError, match="found '1xa"):
        parse_cluster("1xa" + " " * 100_000 + "b\n!")
    assert parse_cluster("  8 x H100 ").count == 8


def test_a_plan_names_the_start_and_counts_its_checkpoint():
    plan = planned(RECIPES / "imagenet256-finetune.toml", "8xH100")
    assert "start        train starts from DiT-XL-2-256x256.pt (ema weights)" in list(plan_lines(plan))
    assert plan.checkpoints_written == 1 + 10_000 // 1000
    assert not any(line.startswith("start ") for line in plan_lines(planned(RECIPES / "imagenet256.toml", "8xH100")))


def test_a_plan_counts_what_is_trained_and_refuses_a_pattern_that_matches_nothing():
    frozen = planned(RECIPES / "imagenet256-finetune.toml", "8xH100", "train.start.freeze=['blocks.{0..27}.*']")
    (line,) = (line for line in plan_lines(frozen) if line.startswith("start "))
    # Embeddings of patches, timesteps and labels, and the final layer: 19,584 + 1,624,320 + 1,153,152 + 2,693,408.
    assert "blocks.{0..27}.*: 5,490,464 of 675,129,632 parameters are trained" in line
    with pytest.raises(InvalidInput, match="train.start.freeze: found 'blocks.28.*'.* which matches none"):
        planned(RECIPES / "imagenet256-finetune.toml", "8xH100", "train.start.freeze=['blocks.28.*']")


def test_a_recipe_that_names_accelerators_is_planned_for_cores():
    cluster = Cluster(name="CPU core", count=4, memory_bytes=2**40, cores=4, core_flops=1e11)
    flags = tuple(f"train.{flag}" for flag in ("gpus_per_worker=1", 'accelerator_type="H100"'))
    images = Images(training=100, held_out=10, classes=3, source="given")
    overrides = make_plan(load_recipe(RECIPE, flags), cluster, images).overrides
    assert "train.gpus_per_worker=0" in overrides and "accelerator" not in " ".join(overrides)


@pytest.mark.parametrize(("gpus", "workers"), [(0.5, 16), (1, 8), (2, 4), (3, 2), (16, 1)])
def test_workers_of_several_accelerators_are_no_more_than_there_are(gpus, workers):
    settings = EncodeConfig(gpus_per_worker=gpus, num_workers=5)
    assert fit_workers(settings, parse_cluster("8xH100"), 10**6)["num_workers"] == workers


@pytest.mark.parametrize(
    ("recipe", "cluster", "overrides", "message"),
    [
        ("imagenet256.toml", "8xH100", ["train.num_workers=16"], "train.num_workers: found 16 workers of 1 GPU, {} 8"),
        ("imagenet256.toml", "8xH100", ["encode.num_workers=9"], "encode.num_workers: found 9 workers of 1 GPU, {} 8"),
        (
            "imagenet256.toml",
            "8xH100",
            ["evaluate.num_workers=8", "evaluate.gpus_per_worker=2"],
            "evaluate.num_workers: found 8 workers of 2 GPUs, {} 4 on 8xH100",
        ),
        (
            "imagenet256.toml",
            "8xH100",
            ["train.gpus_per_worker=16"],
            "train.gpus_per_worker: found 1 worker of 16 GPUs, {} 8 on 8xH100",
        ),
        (RECIPE, "2xL4", ["autoencoder.train.num_workers=4"], "autoencoder.train.num_workers: found 4 workers"),
    ],
)
def test_more_workers_than_there_are_accelerators_are_refused(recipe, cluster, overrides, message):
    """A plan for them would count their speed and the price of the accelerators that there are."""
    with pytest.raises(InvalidInput, match=re.escape(message.format("expected at most"))):
        planned(RECIPES / recipe, cluster, *overrides)


def test_workers_that_share_accelerators_have_room():
    plan = planned(RECIPES / "imagenet256.toml", "8xH100", "evaluate.num_workers=16", "evaluate.gpus_per_worker=0.5")
    assert stages(plan)["evaluate"].workers == 16


def test_workers_of_a_training_share_no_accelerator():
    shared = ["train.num_workers=16", "train.gpus_per_worker=0.5"]
    plan = planned(RECIPES / "imagenet256.toml", "8xH100", shared[1])
    assert stages(plan)["train"].workers == 8 and "train.gpus_per_worker=1" in plan.overrides
    with pytest.raises(InvalidInput, match="train.num_workers: found 16 workers of 1 GPU, expected at most 8"):
        planned(RECIPES / "imagenet256.toml", "8xH100", *shared)


def test_a_guide_is_planned_beside_the_model_and_does_not_double_the_batch():
    recipe, flags = RECIPES / "imagenet256.toml", ("evaluate.cfg_scale=2.0", 'evaluate.autoguidance="checkpoint"')
    plain, guided, by_guide = (
        stages(planned(recipe, "8xH100", *given))["evaluate"].memory for given in ((), flags[:1], flags)
    )
    assert (guided["network"], guided["tokens"]) == (plain["network"], 2 * plain["tokens"])
    assert (by_guide["network"], by_guide["tokens"]) == (2 * plain["network"], plain["tokens"])


@pytest.mark.parametrize(
    ("overrides", "given", "classes"),
    [
        ([], None, 1000),
        ([], 10, 10),
        ([], 0, 0),
        (["images.classes=['ring', 'blob']"], None, 2),
        (["images.classes=['ring', 'blob']"], 2, 2),
        (["images.class_names=['blob', 'ring', 'stripe']"], None, 3),
        (["images.class_names=['blob', 'ring', 'stripe']", "images.classes=['blob']"], None, 1),
    ],
)
def test_classes_that_a_recipe_names_are_planned(tmp_path, overrides, given, classes):
    assert count_images(tiny_recipe(tmp_path, *overrides), 100, given).classes == classes


def test_another_number_of_classes_than_the_recipe_names_is_refused(tmp_path):
    config = tiny_recipe(tmp_path, "images.classes=['ring', 'blob']")
    with pytest.raises(InvalidInput, match="--classes: found 10 with images.classes, which names 2, expected 2"):
        count_images(config, 100, 10)


def test_a_plan_says_that_separate_held_out_images_are_not_counted(tmp_path):
    config = tiny_recipe(tmp_path, f"images.validation={tmp_path / 'others'}", "images.held_out=0")
    images = count_images(config, 100)
    plan = make_plan(config, parse_cluster("1xL4"), images)
    (line,) = (line for line in plan_lines(plan) if line.startswith("images "))
    assert line.endswith("as given by --images; the images of images.validation are not counted")
    assert count_images(tiny_recipe(tmp_path), 100).source == "as given by --images"
