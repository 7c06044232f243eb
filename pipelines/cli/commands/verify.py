"""`raydit verify`: check the scores of a card by computing them again."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from pipelines.cli.options import FAILED, OK, address_option, json_option, model_option, set_option
from pipelines.cli.output import echo, print_line, print_result, shorten_path


@click.command()
@click.argument("card", type=click.Path())
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(),
    help="Folder or URI for the evaluation; default: verify-DIGEST in the working directory.",
)
@click.option("--checkpoint", type=click.Path(), help="Where the checkpoint lies now, if not where the card says.")
@click.option("--force", is_flag=True, help="Evaluate again even if this folder has a report.")
@model_option
@set_option
@address_option
@json_option
def verify(
    card: str,
    out: str | None,
    checkpoint: str | None,
    force: bool,
    model: str | None,
    overrides: tuple[str, ...],
    address: str | None,
    as_json: bool,
) -> None:
    """Compute the scores of CARD again, and report for each whether it holds.

    CARD is a card.json, its folder or its URI. Scores are equal to the bit, within the rounding of another device,
    within their errors, or they differ: exit code 1. A checkpoint, reference or extractor with another digest than the
    card's is refused. --set names paths and workers of this machine, such as images.path and evaluate.gpus_per_worker.
    """
    from evaluation.verification import check_scores, verification_table
    from pipelines.evaluate import EvaluationOptions, evaluate_each
    from pipelines.scoring.cards import plan_verification, read_card

    published = read_card(card)
    folder = out or f"verify-{published.digest[:12]}"
    opened, config = plan_verification(published, folder, checkpoint=checkpoint, model=model, overrides=overrides)
    options = EvaluationOptions(repeats=published.num_seeds, force=force)
    (finished,) = evaluate_each([[(opened, config)]], options, address=address, series=False)
    checks = check_scores(published.report, finished.report)
    holds = all(check.holds for check in checks)
    echo(f"\n{verification_table(checks)}\n")
    print_line("report", shorten_path(finished.folder))
    failed = [check.name for check in checks if not check.holds]
    print_line(
        "verified" if holds else "NOT VERIFIED", f"{len(checks)} scores hold" if holds else f"{', '.join(failed)}"
    )
    listed = [{**asdict(check), "holds": check.holds} for check in checks]
    print_result(as_json, {"holds": holds, "card": published.digest, "report": finished.folder, "scores": listed})
    sys.exit(OK if holds else FAILED)
