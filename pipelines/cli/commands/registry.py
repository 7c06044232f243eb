"""`raydit promote` and `raydit lineage`: registered models, and the artifacts that they were made from."""

import sys

import click

from pipelines.cli.options import FAILED, OK, json_option, refuse_given, store_option
from pipelines.cli.output import print_line, print_result


@click.command()
@click.argument("checkpoint", required=False, type=click.Path())
@click.option("--name", help="Name of the registered MLflow model.")
@click.option(
    "--alias",
    type=click.Choice(["champion", "challenger"]),
    default="champion",
    show_default=True,
    help="Alias to give to the checkpoint.",
)
@click.option(
    "--protocol",
    metavar="ID|FILE",
    help="Protocol of the report, if there are several; or the checkpoint's report.json itself, wherever it lies.",
)
@click.option(
    "--rollback", metavar="NAME", help="Instead: move the alias of model NAME back to the version that held it before."
)
@store_option
@json_option
def promote(
    checkpoint: str | None,
    name: str | None,
    alias: str,
    protocol: str | None,
    rollback: str | None,
    store: str,
    as_json: bool,
) -> None:
    """Register CHECKPOINT, and make it champion if it is better.

    The checkpoint becomes a version of the model NAME. It is better if its score beats the champion's by more than the
    error.
    """
    is_complete = (checkpoint is None) if rollback is not None else None not in (checkpoint, name)
    if not is_complete:
        raise click.UsageError("expected CHECKPOINT --name NAME, or --rollback NAME")
    if rollback is not None:
        refuse_given("is only for CHECKPOINT; leave out --rollback", "name", "protocol")
    from pipelines.registry import promotion
    from pipelines.tracking.store import tracking_uri

    if rollback is not None:
        said, given = promotion.rollback(tracking_uri(store), rollback, alias=alias), True
    else:
        assert checkpoint is not None and name is not None, "checked above"
        said, given = promotion.promote_checkpoint(checkpoint, name, alias=alias, protocol=protocol, store=store)
    print_line("promote", said)
    print_result(as_json, {"name": rollback or name, "alias": alias, "given": given, "found": said})


@click.command()
@click.argument("target", metavar="MODEL|RUN|LATENTS|CHECKPOINT", type=click.Path())
@click.option("--quick", is_flag=True, help="Compare sizes and records only, without reading shards and weights.")
@store_option
@json_option
def lineage(target: str, quick: bool, store: str, as_json: bool) -> None:
    """Print what an artifact was made from, and verify its digests.

    Also prints what was made from it. The artifact is a folder or URI of latents, a checkpoint in any form,
    models:/NAME@ALIAS, or an MLflow run by its id or name. Exit code 1 if a digest no longer matches.
    """
    from pipelines.registry.lineage import lineage as chain_of

    chain = chain_of(target, store=store, quick=quick)
    for link in chain:
        digest = f" ({link.digest[:12]})" if link.digest else ""
        print_line(link.kind, ", ".join([f"{link.name}{digest}", *link.facts]))
        for text in link.unknown:
            print_line("", f"not compared: {text}")
        for text in link.broken:
            print_line("", f"BROKEN: {text}")
    broken = sum(len(link.broken) for link in chain)
    matches = "sizes and records match; files were not read" if quick else "every recorded digest matches"
    click.echo(f"\nBROKEN: {broken} mismatch{'es' * (broken > 1)}" if broken else f"\nunbroken: {matches}")
    print_result(as_json, {"ok": not broken, "chain": [link.to_dict() for link in chain]})
    sys.exit(FAILED if broken else OK)
