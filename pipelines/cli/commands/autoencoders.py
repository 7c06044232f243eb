"""`raydit autoencoders`: judge autoencoders before a diffusion model is trained on their latents."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli.options import address_option, dry_run_option, json_option, set_option
from pipelines.cli.output import echo, print_line, print_resolved, print_result, shorten_path
from pipelines.config.toml_text import toml_value

if TYPE_CHECKING:
    from pipelines.config.recipe import Recipe
    from pipelines.evaluate_autoencoder import JudgedAutoencoder
    from pipelines.scoring.autoencoders.autoencoder_evaluation import AutoencoderEvaluation

Command = Callable[..., Any]


@click.group()
def autoencoders() -> None:
    """Judge autoencoders before a model is trained on their latents."""


def _options(function: Command) -> Command:
    """Add the options that both commands have."""
    images = click.option(
        "--images", required=True, type=click.Path(), help='Images to encode: any source of a recipe, or "digits".'
    )
    size = click.option(
        "--size",
        type=click.IntRange(min=1),
        help="Side that images are resized and cropped to, in pixels; default: the size that the (first) autoencoder "
        "is for, else 256.",
    )
    num = click.option(
        "--num",
        type=click.IntRange(min=10),
        help="Number of images, evenly spaced over the source; default: all, at most 50,000.",
    )
    extractors = click.option(
        "--extractor",
        "extractors",
        multiple=True,
        help="Feature extractor, repeatable; default: EfficientNet-Lite0, and Inception and DINOv2 where their weights "
        "are on this machine.",
    )
    out = click.option("--out", type=click.Path(), help="Folder or URI of reports; default: outputs/autoencoders.")
    force = click.option("--force", is_flag=True, help="Evaluate again even if there is a report.")
    shared = (images, size, num, extractors, out, force, set_option, address_option, dry_run_option, json_option)
    for option in reversed(shared):
        function = option(function)
    return function


@autoencoders.command()
@click.argument("autoencoder", metavar="ID|FOLDER", type=click.Path())
@_options
def evaluate(autoencoder: str, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Measure an autoencoder's reconstruction quality, its cost, and the statistics of its latents.

    ID|FOLDER is an id on the hub, a folder that diffusers wrote, or the output of a recipe that trained one. Precision
    and workers are settings of recipes: --set encode.dtype=bfloat16, --set evaluate.num_workers=8. Run it again to
    resume.
    """
    evaluations = _plan([autoencoder], **_without(options, "address", "force"))
    if dry_run:
        return _print_plan(evaluations, as_json)
    (judged,) = _evaluate(evaluations, options["address"], options["force"])
    echo(f"\n{judged.report.table()}")
    _print_notes([judged])
    print_result(as_json, json.loads(judged.report.to_json()))


@autoencoders.command()
@click.argument("autoencoders", metavar="ID|FOLDER...", nargs=-1, required=True, type=click.Path())
@_options
def compare(autoencoders: tuple[str, ...], as_json: bool, dry_run: bool, **options: Any) -> None:
    """Evaluate several autoencoders on the same images, and print them side by side with the best values marked.

    Arguments and options are those of `raydit autoencoders evaluate`; finished evaluations are reused.
    """
    from evaluation.autoencoder_report import compare_autoencoders
    from pipelines.evaluate_autoencoder import write_comparison

    evaluations = _plan(autoencoders, **_without(options, "address", "force"))
    if dry_run:
        return _print_plan(evaluations, as_json)
    judged = _evaluate(evaluations, options["address"], options["force"])
    page = write_comparison(judged, evaluations[0].settings.output)
    echo(f"\n{compare_autoencoders([each.report for each in judged])}")
    _print_notes(judged)
    print_line("comparison", shorten_path(page))
    reports = [json.loads(each.report.to_json()) for each in judged]
    print_result(as_json, {"reports": reports, "page": page})


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def _plan(
    names: Sequence[str],
    images: str,
    size: int | None,
    num: int | None,
    extractors: tuple[str, ...],
    out: str | None,
    overrides: tuple[str, ...],
) -> list[AutoencoderEvaluation]:
    """Return what is to be done. Raises NotFound or InvalidInput if something is missing or does not fit."""
    from pipelines.images.ad_hoc_recipe import image_recipe
    from pipelines.scoring.autoencoders.autoencoder_evaluation import (
        AutoencoderEvaluation,
        cached_extractors,
        chosen_images,
        default_size,
        find_handle,
    )

    handles = [find_handle(name) for name in names]
    given = any(override.startswith("images.size=") for override in overrides)
    if size is not None or not given:
        overrides = (f"images.size={size or default_size(handles[0])}", *overrides)
    if extractors or not any(override.startswith("evaluate.extractor") for override in overrides):
        overrides = (f"evaluate.extractors={toml_value(list(extractors) or cached_extractors())}", *overrides)
    config: Recipe = image_recipe(images, out or "outputs/autoencoders", overrides)
    source, listing = chosen_images(config.images, num)
    planned = [AutoencoderEvaluation(handle, config, source, listing) for handle in handles]
    for evaluation in planned:
        _ = evaluation.protocol  # raises
    return planned


def _evaluate(
    evaluations: Sequence[AutoencoderEvaluation], address: str | None, force: bool
) -> list[JudgedAutoencoder]:
    from pipelines.evaluate_autoencoder import evaluate_autoencoder
    from pipelines.stage import StageContext

    with StageContext(evaluations[0].config, address=address) as context:
        return [evaluate_autoencoder(each, context=context, force=force) for each in evaluations]


def _print_plan(evaluations: Sequence[AutoencoderEvaluation], as_json: bool) -> None:
    """Print what would be done."""
    print_resolved(evaluations[0].config)
    for each in evaluations:
        print_line("plan", f"{each.name} on {len(each.listing):,} images, protocol {each.protocol.protocol_id}")
    plans = [{"autoencoder": each.name, "protocol_id": each.protocol.protocol_id} for each in evaluations]
    print_result(as_json, {"images": len(evaluations[0].listing), "plans": plans})


def _print_notes(judged: Sequence[JudgedAutoencoder]) -> None:
    """Print the reports' warnings, each once, and where the files are."""
    from cluster import storage

    for warning in dict.fromkeys(warning for each in judged for warning in each.report.warnings):
        echo(f"note: {warning}")
    for each in judged:
        print_line("report", shorten_path(storage.join(each.folder, each.report.artifacts["page"])))
