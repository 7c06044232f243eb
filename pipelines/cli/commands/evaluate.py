"""`raydit evaluate`: score checkpoints and images."""

import json

import click

from pipelines.cli.options import (
    address_option,
    dry_run_option,
    json_option,
    model_option,
    open_checkpoint,
    set_option,
)
from pipelines.cli.output import print_report, print_resolved, print_result, shown


@click.command()
@click.argument("checkpoints", metavar="CHECKPOINT...", nargs=-1, type=click.Path())
@click.option(
    "--images", type=click.Path(), help="Score these images instead: a folder, table, archive, or ADM's .npz."
)
@click.option("--watch", is_flag=True, help="CHECKPOINT is a folder that a training fills: score what appears.")
@click.option("--every", type=click.IntRange(min=1), default=1, show_default=True, help="With --watch: each n-th only.")
@click.option("--recipe", type=click.Path(dir_okay=False), help="Take the protocol from here, not from the checkpoint.")
@click.option("--num-samples", type=click.IntRange(min=10), help="Images to sample.")
@click.option("--reference", type=click.Path(), help="Reference statistics (.npz) instead of the training images'.")
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="Seeds, for error bars.")
@click.option("--save-images", metavar="FOLDER", type=click.Path(), help="Write the samples as well.")
@click.option("--save-format", type=click.Choice(["parquet", "png"]), default="parquet", show_default=True)
@click.option("--promote", metavar="NAME", help="Make the better one `champion` of MLflow's registered model NAME.")
@click.option("--force", is_flag=True, help="Evaluate again where there is a report already.")
@model_option
@set_option
@address_option
@dry_run_option
@json_option
def evaluate(checkpoints, images, watch, every, recipe, num_samples, reference, model, overrides, **flags) -> None:
    """Sample from each CHECKPOINT and score the samples.

    A CHECKPOINT is a folder or URI, runs:/RUN_ID, models:/NAME@ALIAS, a diffusers DiT pipeline or an official file.
    """
    if bool(checkpoints) == (images is not None):
        raise click.UsageError("expected one CHECKPOINT or more, or --images FOLDER; found " + _which(images))
    if watch and len(checkpoints) != 1:
        raise click.UsageError(f"--watch follows one folder of checkpoints; found {len(checkpoints)}")
    if num_samples is not None:
        overrides = (*overrides, f"evaluate.num_samples={num_samples}")
    if reference is not None:
        overrides = (*overrides, f"evaluate.reference={json.dumps(reference)}")
    if images is not None:
        return _evaluate_images(images, recipe, reference, overrides, flags)
    _evaluate_checkpoints(checkpoints, watch and every, recipe, model, overrides, flags)


def _which(images: str | None) -> str:
    return "neither" if images is None else "both"


def _evaluate_images(images: str, recipe: str | None, reference: str | None, overrides, flags) -> None:
    """Score images from elsewhere."""
    from pipelines.config.reader import load_recipe
    from pipelines.evaluate_images import evaluate_images, reference_recipe
    from pipelines.scoring.settings import EVALUATIONS
    from pipelines.stage import StageContext

    for name in ("repeats", "save_images", "promote"):
        if flags[name] not in (None, 1):
            raise click.UsageError(f"--{name.replace('_', '-')} is about samples of a checkpoint; leave out --images")
    if recipe is None and reference is None:
        raise click.UsageError("--images needs what to compare with: --reference FILE.npz, or --recipe FILE.toml")
    config = load_recipe(recipe, overrides) if recipe else reference_recipe(str(reference), images, overrides)
    if flags["dry_run"]:
        return _print_images_plan(images, config, flags["as_json"])
    with StageContext(config, address=flags["address"], part=EVALUATIONS) as context:
        report, folder = evaluate_images(images, config=config, context=context, force=flags["force"])
        print_report(report, folder, flags["as_json"], context.tracker.uri)


def _print_images_plan(images: str, config, as_json: bool) -> None:
    from pipelines.evaluate_images import scored_images
    from pipelines.images.open import open_source
    from pipelines.scoring.protocols import images_protocol
    from pipelines.scoring.settings import ScoringSettings

    print_resolved(config)
    settings = ScoringSettings.from_recipe(config)
    count = len(open_source(scored_images(settings, images)).listing())
    protocol = images_protocol(settings, count)
    click.echo(f"plan         {count:,} images of {images}, protocol {protocol.protocol_id}")
    print_result(as_json, {"images": count, "protocol_id": protocol.protocol_id})


def _evaluate_checkpoints(checkpoints, every: int, recipe, model, overrides, flags) -> None:
    """Score checkpoints; every: 0, or the n of --watch."""
    from pipelines.checkpoints.follow import follow_checkpoints
    from pipelines.config.reader import load_recipe
    from pipelines.evaluate import EvaluationOptions, evaluate_each

    fixed = load_recipe(recipe, overrides) if recipe else None  # a mistake in it is told before anything is looked for

    def recipe_of(opened):
        from pipelines.scoring.protocols import checkpoint_recipe

        return fixed or checkpoint_recipe(opened, overrides)

    options = EvaluationOptions(
        repeats=flags["repeats"],
        force=flags["force"],
        save_samples=flags["save_images"],
        save_format=flags["save_format"],
        promote=flags["promote"],
    )
    if every and flags["dry_run"]:
        raise click.UsageError("--dry-run tells of checkpoints that are there: name one instead of --watch")
    if every:
        appearing = ([target] for target in follow_checkpoints(checkpoints[0], every, recipe_of))
        scored = evaluate_each(appearing, options, address=flags["address"])
    else:
        opened = [open_checkpoint(checkpoint, model, overrides) for checkpoint in checkpoints]
        targets = [(each, recipe_of(each)) for each in opened]
        if flags["dry_run"]:
            return _print_plan(targets, options.repeats, flags["as_json"])
        scored = evaluate_each([targets], options, address=flags["address"], series=len(targets) > 1)
    if every or len(scored) > 1:
        _print_series(scored, flags["as_json"])
    else:
        print_report(*scored[0][:2], flags["as_json"], scored[0].tracking_uri)


def _print_plan(targets, repeats: int, as_json: bool) -> None:
    """What would be done for each checkpoint; nothing is."""
    from pipelines.scoring.protocols import evaluation_protocol
    from pipelines.scoring.references import check_scoring_inputs
    from pipelines.scoring.report_files import load_matching_report
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
        known = load_matching_report(folder, opened.digest) is not None
        click.echo(f"checkpoint   {opened.origin} ({opened.digest[:12]})")
        click.echo(
            f"plan         {repeats} x {protocol.num_samples:,} samples in {len(shards):,} shards on "
            f"{config.evaluate.num_workers} workers, protocol {protocol.protocol_id}"
        )
        click.echo(f"report       {folder}{' is there' if known else ''}")
        plans.append({"checkpoint": opened.origin, "protocol_id": protocol.protocol_id, "shards": len(shards)})
        plans[-1] |= {"samples": repeats * protocol.num_samples, "finished": known}
    print_result(as_json, {"plans": plans})


def _print_series(scored, as_json: bool) -> None:
    """A table of all, where their curve is, and the best."""
    from cluster import storage
    from evaluation.compare import compare_reports
    from pipelines.scoring.report_curves import CURVE_FILE

    reports = [each.report for each in scored]
    if len(reports) > 1:
        click.echo(f"\n{compare_reports(reports, allow_unequal=True).table()}")
    best = min(scored, key=lambda each: each.report.estimate(each.report.headline)[0])
    click.echo(f"best         {best.report.checkpoint} by {best.report.headline}")
    places = {storage.join(storage.split(each.folder)[0], CURVE_FILE) for each in scored}
    curves = sorted(place for place in places if storage.exists(place))
    for curve in curves:
        click.echo(f"curve        {shown(curve)}")
    listed = [json.loads(report.to_json()) for report in reports]
    print_result(as_json, {"reports": listed, "best": best.report.checkpoint, "curves": curves})
