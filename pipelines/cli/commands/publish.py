"""`raydit publish`: the card of an evaluation, with its scores and everything needed to reproduce them."""

from __future__ import annotations

import click

from pipelines.cli.options import json_option, model_option, set_option
from pipelines.cli.output import print_line, print_result, shorten_path


@click.command()
@click.argument("report", type=click.Path())
@click.option(
    "--out", metavar="FOLDER", type=click.Path(), help="Folder or URI of the card; default: card/ beside the report."
)
@click.option("--protocol", help="Protocol id of the report, for a checkpoint with several.")
@click.option(
    "--recipe",
    type=click.Path(dir_okay=False),
    help="Recipe that the checkpoint was evaluated by, if it was not its own.",
)
@model_option
@set_option
@json_option
def publish(
    report: str,
    out: str | None,
    protocol: str | None,
    recipe: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a card of an evaluation: its scores, and all that is needed to compute them again.

    REPORT is a report, its folder, or a checkpoint that was evaluated. The card is card.json for `raydit verify`, and
    card.md for people. Where the evaluation was called with a reference, other images or a guide, pass them again with
    --recipe and --set; everything else follows from the report's protocols.
    """
    from cluster import storage
    from pipelines.config.overrides import given_tracking_uri
    from pipelines.scoring.cards import make_card, write_card
    from pipelines.scoring.reports.report_files import find_reports, report_folder
    from pipelines.scoring.settings import EVALUATIONS

    (found,) = find_reports([report], protocol_id=protocol, tracking_uri=given_tracking_uri(overrides, recipe))
    card = make_card(found, recipe=recipe, overrides=overrides, model=model)
    if out is None:
        evaluations = storage.join(card.recipe["output"], EVALUATIONS)
        name = storage.split(card.checkpoint.uri)[1]
        out = storage.join(report_folder(evaluations, found.protocol_id, name), "card")
    paths = write_card(card, out)
    for name, path in paths.items():
        print_line(name, shorten_path(path))
    print_result(
        as_json, {**paths, "digest": card.digest, "protocol_ids": [each.protocol_id for each in found.protocols]}
    )
