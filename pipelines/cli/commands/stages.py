"""`raydit run`, `raydit autoencoder`, `raydit encode` and `raydit train`: the stages of a recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.options import OK, address_option, dry_run_option, json_option, recipe_argument, set_option
from pipelines.cli.output import print_line, print_report, print_resolved, print_result, shorten_path
from raydit.printable import one_line

if TYPE_CHECKING:
    from dit.schedule import TrainingConfig
    from pipelines.config.recipe import Recipe


def stage_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the argument and the options that every stage has."""
    for option in (json_option, dry_run_option, address_option, set_option, recipe_argument):
        function = option(function)
    return function


STAGES = ("autoencoder", "encode", "train", "evaluate")
"""What `raydit run` runs, in order."""

verify_option = click.option("--verify", is_flag=True, help="Check all latents before training, not only some shards.")


@click.command()
@stage_options
@verify_option
def run(
    recipe: str, overrides: tuple[str, ...], address: str | None, dry_run: bool, as_json: bool, verify: bool
) -> None:
    """Run all stages of RECIPE, and skip those that are finished."""
    config = _load("run", recipe, overrides, dry_run, as_json)
    from cluster import storage
    from pipelines.run import run_pipeline
    from pipelines.scoring.reports.report_files import report_folder
    from pipelines.scoring.settings import EVALUATIONS
    from pipelines.stage import StageContext

    with StageContext(config, address=address) as context:
        report = run_pipeline(config, verify=verify, context=context)
        checkpoint_name = storage.split(report.checkpoint)[1]
        folder = report_folder(config.folder(EVALUATIONS), report.protocol_id, checkpoint_name)
        print_report(report, folder, as_json, context.tracking_uri)


@click.command()
@stage_options
def autoencoder(recipe: str, overrides: tuple[str, ...], address: str | None, dry_run: bool, as_json: bool) -> None:
    """Train the autoencoder of RECIPE.

    Does nothing for a recipe with a pretrained autoencoder.
    """
    config = _load("autoencoder", recipe, overrides, dry_run, as_json)
    handle = _run_job("autoencoder", "train_autoencoder", config, address)
    print_result(as_json, {"id": handle.id, "path": str(handle.folder())})


@click.command()
@stage_options
def encode(recipe: str, overrides: tuple[str, ...], address: str | None, dry_run: bool, as_json: bool) -> None:
    """Encode the images of RECIPE into latents.

    With --dry-run: print how many latents there will be, their size, and the time that encoding takes.
    """
    config = _load("encode", recipe, overrides, False, as_json)
    if dry_run:
        return _print_encode_plan(config, as_json)
    dataset = _run_job("encode", "encode", config, address)
    print_result(
        as_json,
        {
            "path": dataset.path,
            "rows": len(dataset),
            "quarantined": dataset.num_quarantined,
            "fingerprint": dataset.fingerprint,
        },
    )


@click.command()
@stage_options
@verify_option
@click.option(
    "--accept-new-data",
    is_flag=True,
    help="If the latents changed since the checkpoints: start a new training from the newest of these.",
)
def train(
    recipe: str,
    overrides: tuple[str, ...],
    address: str | None,
    dry_run: bool,
    as_json: bool,
    verify: bool,
    accept_new_data: bool,
) -> None:
    """Train the model of RECIPE on its latents."""
    config = _load("train", recipe, overrides, dry_run, as_json)
    checkpoint = _run_job("train", "train", config, address, verify=verify, accept_new_data=accept_new_data)
    print_result(as_json, {"path": str(checkpoint.path), "step": checkpoint.step, "digest": checkpoint.digest})


def _load(stage: str, path: str, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> Recipe:
    """Read a stage's recipe; on a dry run check what needs no images, print the recipe and the plan, and exit."""
    from pipelines.config.reader import load_recipe

    config = load_recipe(path, overrides, stage)
    if dry_run:
        _check_without_images(stage, config)
        print_resolved(config)
        plan = {name: _describe_stage(name, config) for name in (STAGES if stage == "run" else (stage,))}
        for name, text in plan.items():
            # Not to the standard output, which has the recipe alone unless --json adds a line.
            click.echo(f"{name:<12} {one_line(text)}", err=True)
        print_result(as_json, {"plan": plan})
        sys.exit(OK)
    return config


def _check_without_images(stage: str, config: Recipe) -> None:
    """Raise InvalidInput for what the stage would refuse of a recipe alone."""
    from pipelines.planning.networks import check_networks

    check_networks(config)
    if stage == "run":
        from pipelines.scoring.checks import check_num_samples, check_sampling_steps

        check_num_samples(config.evaluate)
        check_sampling_steps(config.evaluate, config.objective.kind)


def _describe_stage(stage: str, config: Recipe) -> str:
    """Return a description of what a stage of a recipe writes, and where; the result may exist already."""
    if stage == "autoencoder" and config.autoencoder.train is None:
        return f"nothing to train: {config.autoencoder.id} is pretrained"
    work, folder = {
        "autoencoder": _autoencoder_plan,
        "encode": _encode_plan,
        "train": _train_plan,
        "evaluate": _evaluate_plan,
    }[stage](config)
    return f"{work}, into {shorten_path(folder)}"


def _autoencoder_plan(config: Recipe) -> tuple[str, str]:
    train = config.autoencoder.train
    assert train is not None, "the caller has looked"
    return _describe_steps(train, train.start), config.folder("autoencoder")


def _encode_plan(config: Recipe) -> tuple[str, str]:
    what = "moments" if config.encode.stores_moments else "digests"
    return f"{what} of the images, in shards of {config.encode.shard_rows:,}", config.latents


def _train_plan(config: Recipe) -> tuple[str, str]:
    start = config.train.start
    return _describe_steps(config.train, start.describe() if start else None), config.folder("checkpoints")


def _describe_steps(train: TrainingConfig, start: str | None) -> str:
    """Return the length of a training in words. start: what it starts from; None: fresh weights."""
    return f"{train.steps:,} steps of {train.global_batch_size:,} images{f' from {start}' if start else ''}"


def _evaluate_plan(config: Recipe) -> tuple[str, str]:
    evaluate = config.evaluate
    extractors = ", ".join(evaluate.extractors or (evaluate.extractor,))
    return f"{evaluate.num_samples:,} samples, scored by {extractors}", config.folder("evaluations")


def _print_encode_plan(config: Recipe, as_json: bool) -> None:
    """Print the resolved recipe and the plan of its encode stage."""
    print_resolved(config)
    from pipelines.planning.encode_plan import encode_plan_lines, make_encode_plan

    plan = make_encode_plan(config)
    for name, text in encode_plan_lines(plan, config.encode):
        print_line(name, text)
    print_result(as_json, {**asdict(plan), "bytes": plan.bytes, "seconds": plan.seconds})


def _run_job(stage: str, function: str, config: Recipe, address: str | None, **options: Any) -> Any:
    """Call a function of the module pipelines.STAGE, which runs that stage, and return its result."""
    from cluster.session import load_ray
    from cluster.threads import run_beside
    from pipelines.stage import StageContext

    def load(ended: object = None) -> Any:
        return import_module(f"pipelines.{stage}")

    with StageContext(config, address=address) as context:
        if _has_clear_work(stage, config):
            # Importing torch takes a second or more, in which Ray can start its processes. Ray itself is imported
            # first, because threads share the interpreter.
            load_ray()
            with run_beside("imports", load):
                context.prepare_work(_workers_of(stage, config), stage)
        return getattr(load(), function)(config, context=context, **options)


def _workers_of(stage: str, config: Recipe) -> Any:
    return {"autoencoder": config.autoencoder.train, "encode": config.encode, "train": config.train}[stage]


def _has_clear_work(stage: str, config: Recipe) -> bool:
    """Return whether a stage's result is missing while its input is there; the stage itself looks more closely.

    Reads and imports little.
    """
    from cluster import storage
    from dit.formats.completion import step_name
    from pipelines.latents.autoencoder import AUTOENCODER_RECORD, TRAINED_AUTOENCODER
    from pipelines.latents.dataset import MANIFEST

    autoencoder = storage.join(config.folder(TRAINED_AUTOENCODER), AUTOENCODER_RECORD)
    latents = storage.join(config.latents, MANIFEST)
    needed, made = {
        "autoencoder": (None, autoencoder),
        "encode": (autoencoder if config.autoencoder.train else None, latents),
        "train": (latents, storage.join(config.folder("checkpoints"), step_name(config.train.steps))),
    }[stage]
    if _workers_of(stage, config) is None or storage.exists(made):
        return False
    return needed is None or storage.exists(needed)
