"""`raydit reference`: statistics of real images."""

import click

from pipelines.cli.options import address_option, dry_run_option, json_option, set_option
from pipelines.cli.output import print_line, print_resolved, print_result
from pipelines.console import counted


@click.group()
def reference() -> None:
    """Build statistics of real images to compare samples with."""


@reference.command()
@click.argument("images", metavar="IMAGES", type=click.Path())
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="The .npz file to write.")
@click.option(
    "--size", type=click.IntRange(min=1), help="Side that images are resized and cropped to, in pixels; default: 256."
)
@click.option(
    "--extractor", help="Feature extractor: efficientnet-lite0, inception, dinov2-vit-l-14, ...; default: inception."
)
@set_option
@address_option
@dry_run_option
@json_option
def build(
    images: str,
    out: str,
    size: int | None,
    extractor: str | None,
    overrides: tuple[str, ...],
    address: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Extract features of IMAGES and write their statistics.

    Run it again to resume. IMAGES is any source that a recipe takes. Further settings are fields of recipes: --set
    images.crop=resize, --set evaluate.num_workers=8.
    """
    shorthands = {"images.size": size, "evaluate.extractor": extractor}
    overrides = (*(f"{key}={value}" for key, value in shorthands.items() if value is not None), *overrides)
    from dataclasses import replace

    from pipelines.build_reference import build_reference, work_folder
    from pipelines.images.ad_hoc_recipe import image_recipe
    from pipelines.scoring.real_images.references import RealImages, given_reference_digest
    from pipelines.scoring.settings import ScoringSettings

    config = image_recipe(images, "work", overrides)
    config = replace(config, output=work_folder(config, out))
    if dry_run:
        print_resolved(config)
        count = len(RealImages.of(ScoringSettings.from_recipe(config)).training)
        print_line("plan", f"{counted(count, 'image')} on {config.evaluate.num_workers} workers, into {out}")
        return print_result(as_json, {"images": count, "path": str(out)})
    built = build_reference(config, out, address=address)
    digest = given_reference_digest(out)
    images = counted(built.n, "image")
    print_line("reference", f"{out}: {images}, {built.extractor}, {built.size} px, digest {digest[:12]}")
    print_result(as_json, {"path": str(out), "n": built.n, "extractor": built.extractor, "digest": digest})
