"""`raydit evaluate`: score samples of checkpoints, or images from elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.options import (
    FAILED,
    address_option,
    dry_run_option,
    json_option,
    model_option,
    open_checkpoint,
    refuse_given,
    set_option,
)
from pipelines.cli.output import echo, print_line, print_report, print_resolved, print_result, shorten_path
from pipelines.config.toml_text import toml_value
from pipelines.console import counted

if TYPE_CHECKING:
    from pipelines.checkpoints.open import LocatedCheckpoint
    from pipelines.config.recipe import Recipe
    from pipelines.evaluate import FinishedEvaluation
    from pipelines.scoring.samples.saved_samples import SampleFormat


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Options of `raydit evaluate` that say how to evaluate, whatever is scored."""

    repeats: int
    save_images: str | None
    save_format: SampleFormat
    promote: str | None
    force: bool
    address: str | None
    dry_run: bool
    as_json: bool


@click.command()
@click.argument("checkpoints", metavar="CHECKPOINT...", nargs=-1, type=click.Path())
@click.option(
    "--images", type=click.Path(), help="Score these images instead: a folder, table, archive, or ADM's .npz file."
)
@click.option(
    "--watch", is_flag=True, help="Treat CHECKPOINT as the folder of a running training, and score new checkpoints."
)
@click.option(
    "--every",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="With --watch: score only every n-th checkpoint.",
)
@click.option(
    "--recipe",
    type=click.Path(dir_okay=False),
    help="Recipe of the protocol; default: the checkpoint's. The checkpoint's model, objective and autoencoder stay.",
)
@click.option(
    "--protocol",
    metavar="FILE",
    type=click.Path(),
    help="Score by the protocol of this file, which `raydit tune` wrote, or of a report.json.",
)
@click.option("--num-samples", type=click.IntRange(min=10), help="Number of images to sample.")
@click.option(
    "--reference", type=click.Path(), help="Reference statistics (.npz); default: those of the training images."
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="Number of seeds, for error bars."
)
@click.option("--save-images", metavar="FOLDER", type=click.Path(), help="Also write the samples to this folder.")
@click.option(
    "--save-format",
    type=click.Choice(["parquet", "png"]),
    default="parquet",
    show_default=True,
    help="File format for --save-images.",
)
@click.option(
    "--promote", metavar="NAME", help="Make a better checkpoint the champion of the registered MLflow model NAME."
)
@click.option("--force", is_flag=True, help="Evaluate again even if there is a report.")
@model_option
@set_option
@address_option
@dry_run_option
@json_option
def evaluate(
    checkpoints: tuple[str, ...],
    images: str | None,
    watch: bool,
    every: int,
    recipe: str | None,
    protocol: str | None,
    num_samples: int | None,
    reference: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Sample from each CHECKPOINT and score the samples.

    A CHECKPOINT is a folder or URI, runs:/RUN (a run's id or name), models:/NAME@ALIAS, a diffusers DiT pipeline or an
    official .pt file.
    """
    flags = Flags(**options)
    if bool(checkpoints) == (images is not None):
        found = "neither" if images is None else "both"
        raise click.UsageError(f"expected one CHECKPOINT or more, or --images FOLDER; found {found}")
    if watch and len(checkpoints) != 1:
        raise click.UsageError(f"--watch expects one folder of checkpoints; found {len(checkpoints)}")
    _refuse_options_without_effect(images, watch, options["save_images"])
    if protocol is not None and (images is not None or num_samples is not None):
        raise click.UsageError(
            "--protocol sets how samples of checkpoints are drawn; leave out --images and --num-samples"
        )
    if protocol is not None:
        _refuse_fields_of_protocol(protocol, overrides)
    if num_samples is not None:
        overrides = (*overrides, f"evaluate.num_samples={num_samples}")
    if reference is not None:
        overrides = (*overrides, f"evaluate.reference={toml_value(reference)}")
    if images is not None:
        return _evaluate_images(images, recipe, reference, overrides, flags)
    _evaluate_checkpoints(checkpoints, every if watch else 0, recipe, protocol, model, overrides, flags)


def _refuse_options_without_effect(images: str | None, watch: bool, save_images: str | None) -> None:
    """Raise click.UsageError for an option that would be ignored beside the others."""
    if images is not None:
        of_samples = ("num_samples", "repeats", "save_images", "save_format", "promote", "model")
        refuse_given("is only for samples of checkpoints; leave out --images", *of_samples)
    if watch:
        refuse_given("is only for official .pt files; leave out --watch", "model")
    else:
        refuse_given("is only for --watch", "every")
    if save_images is None:
        refuse_given("is only for --save-images FOLDER", "save_format")


def _refuse_fields_of_protocol(protocol: str, overrides: Sequence[str]) -> None:
    """Raise click.UsageError for --set of a field to which --protocol gives another value."""
    from pipelines.scoring.protocols.protocol_file import overruled_fields

    for field, value in overruled_fields(protocol, overrides).items():
        known = "nothing" if value is None else repr(value)
        raise click.UsageError(f"--set {field}: --protocol sets it to {known}; leave out one of the two")


def _evaluate_images(
    images: str, recipe: str | None, reference: str | None, overrides: tuple[str, ...], flags: Flags
) -> None:
    """Score images that raydit did not sample."""
    from pipelines.config.reader import load_recipe
    from pipelines.evaluate_images import evaluate_images, reference_recipe
    from pipelines.scoring.settings import EVALUATIONS
    from pipelines.stage import StageContext

    if recipe is None and reference is None:
        raise click.UsageError("--images needs real images: --reference FILE.npz, or --recipe FILE.toml")
    config = (
        load_recipe(recipe, overrides, "evaluate") if recipe else reference_recipe(str(reference), images, overrides)
    )
    if flags.dry_run:
        return _print_images_plan(images, config, flags.as_json)
    with StageContext(config, address=flags.address, part=EVALUATIONS) as context:
        report, folder = evaluate_images(images, config=config, context=context, force=flags.force)
        print_report(report, folder, flags.as_json, context.tracking_uri)


def _print_images_plan(images: str, config: Recipe, as_json: bool) -> None:
    from pipelines.evaluate_images import ImagesEvaluation
    from pipelines.scoring.class_distances import check_class_distances
    from pipelines.scoring.settings import ScoringSettings

    print_resolved(config)
    planned = ImagesEvaluation.plan(images, ScoringSettings.from_recipe(config))
    check_class_distances(planned.settings, planned.listing.class_names, images)
    count, protocol = len(planned.listing), planned.protocol
    print_line("plan", f"{counted(count, 'image')} of {images}, protocol {protocol.label}")
    print_result(as_json, {"images": count, "protocol_id": protocol.protocol_id})


def _evaluate_checkpoints(
    checkpoints: tuple[str, ...],
    every: int,
    recipe: str | None,
    protocol: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    flags: Flags,
) -> None:
    """Score checkpoints. every: 0 for those that are named, n for every n-th that appears in the folder named."""
    from pipelines.checkpoints.follow import follow_checkpoints
    from pipelines.evaluate import EvaluationOptions, evaluate_each
    from pipelines.scoring.protocols.build_protocol import checkpoint_recipe
    from pipelines.scoring.protocols.given_recipe import load_given_recipe
    from pipelines.scoring.real_images.real_listing import listed_once

    # Mistakes in a recipe are found before any checkpoint is looked for.
    recipe_of = load_given_recipe(recipe, overrides) if recipe else partial(checkpoint_recipe, overrides=overrides)
    if protocol is not None:
        from pipelines.scoring.protocols.protocol_file import by_protocol_file

        recipe_of = by_protocol_file(protocol, recipe_of, overrides)
    options = EvaluationOptions(
        repeats=flags.repeats,
        force=flags.force,
        save_samples=flags.save_images,
        save_format=flags.save_format,
        promote=flags.promote,
        skip_removed=bool(every),
    )
    if every and flags.dry_run:
        raise click.UsageError("--dry-run plans existing checkpoints; name one instead of --watch")
    if every:
        appearing = ([target] for target in follow_checkpoints(checkpoints[0], every, recipe_of))
        scored = evaluate_each(appearing, options, address=flags.address)
    else:
        opened = [open_checkpoint(checkpoint, model, overrides) for checkpoint in checkpoints]
        targets = [(each, recipe_of(each)) for each in opened]
        if flags.dry_run:
            with listed_once():
                return _print_plan(targets, options.repeats, flags.as_json)
        scored = evaluate_each([targets], options, address=flags.address, series=len(targets) > 1)
    if every or len(scored) > 1:
        _print_series(scored, flags.as_json)
    else:
        print_report(scored[0].report, scored[0].folder, flags.as_json, scored[0].tracking_uri)
    if any(each.is_promotion_due for each in scored):
        sys.exit(FAILED)


def _print_plan(targets: Sequence[tuple[LocatedCheckpoint, Recipe]], repeats: int, as_json: bool) -> None:
    """Print what evaluating each checkpoint would do."""
    from pipelines.scoring.checks import check_scoring_inputs
    from pipelines.scoring.protocols.build_protocol import evaluation_protocol
    from pipelines.scoring.samples.precision import check_precision
    from pipelines.scoring.score_checkpoint import CheckpointEvaluation
    from pipelines.scoring.settings import ScoringSettings

    plans = []
    for opened, config in targets:
        print_resolved(config)
        settings = ScoringSettings.from_recipe(config)
        protocol = evaluation_protocol(settings, opened)
        check_scoring_inputs(settings, protocol)
        evaluation = CheckpointEvaluation(opened, protocol, settings)
        shards, folder = evaluation.shards(), evaluation.folder
        known = evaluation.find_report() is not None
        if not known:
            check_precision(settings.evaluate, protocol)
        print_line("checkpoint", f"{opened.origin} ({opened.digest[:12]})")
        print_line(
            "plan",
            f"{repeats} x {protocol.num_samples:,} samples in {len(shards):,} shards on "
            f"{config.evaluate.num_workers} workers, protocol {protocol.label}",
        )
        for each in evaluation.protocols[1:]:
            print_line("plan", f"also scored by protocol {each.label}")
        further = [each.protocol_id for each in evaluation.protocols[1:]]
        print_line("report", f"{folder}{' (exists)' if known else ''}")
        plans.append(
            {
                "checkpoint": opened.origin,
                "protocol_id": protocol.protocol_id,
                "shards": len(shards),
                "samples": repeats * protocol.num_samples,
                "finished": known,
                **({"further_protocol_ids": further} if further else {}),
            }
        )
    print_result(as_json, {"plans": plans})


def _print_series(scored: Sequence[FinishedEvaluation], as_json: bool) -> None:
    """Print a table of several evaluations, the best checkpoint, and the paths of their curves."""
    from cluster import storage
    from evaluation.compare import compare_reports, find_best
    from pipelines.scoring.reports.report_curves import CURVE_FILE

    reports = [each.report for each in scored]
    if len(reports) > 1:
        echo(f"\n{compare_reports(reports, allow_unequal=True).table()}")
    best, reason = find_best(reports)
    for report in reports:
        if report.disqualified:
            print_line("defective", f"{report.checkpoint}: {report.disqualified}")
    print_line("best", f"{best.checkpoint} by {best.headline}" if best else f"none: {reason}")
    paths = {storage.join(storage.split(each.folder)[0], CURVE_FILE) for each in scored}
    curves = sorted(path for path in paths if storage.exists(path))
    for curve in curves:
        print_line("curve", shorten_path(curve))
    listed = [json.loads(report.to_json()) for report in reports]
    print_result(as_json, {"reports": listed, "best": best and best.checkpoint, "curves": curves})
