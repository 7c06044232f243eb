"""`raydit promote` and `raydit lineage`: registered models and where artifacts come from."""

import sys

import click

from pipelines.cli.options import FAILED, OK, json_option, store_option
from pipelines.cli.output import print_line, print_result


@click.command()
@click.argument("checkpoint", required=False, type=click.Path())
@click.option("--name", help="Registered model that the checkpoint becomes a version of.")
@click.option("--alias", type=click.Choice(["champion", "challenger"]), default="champion", show_default=True)
@click.option("--protocol", help="Id of the one whose report decides, where there are several.")
@click.option("--rollback", metavar="NAME", help="Instead: give the alias of NAME back to who had it before.")
@store_option
@json_option
def promote(checkpoint, name, alias, protocol, rollback, store, as_json) -> None:
    """Register CHECKPOINT as champion, if its report is better than the champion's by more than the error."""
    if (rollback is None) == (checkpoint is None or name is None):
        raise click.UsageError("expected CHECKPOINT --name NAME, or --rollback NAME")
    from pipelines.registry import promotion
    from pipelines.tracking.store import tracking_uri

    if rollback is not None:
        said, given = promotion.rollback(tracking_uri(store), rollback, alias=alias), True
    else:
        said, given = promotion.promote_checkpoint(checkpoint, name, alias=alias, protocol_id=protocol, store=store)
    click.echo(f"promote      {said}")
    print_result(as_json, {"name": rollback or name, "alias": alias, "given": given, "found": said})


@click.command()
@click.argument("target", metavar="MODEL|RUN|LATENTS|CHECKPOINT", type=click.Path())
@click.option("--quick", is_flag=True, help="Compare sizes and what is recorded; read neither shards nor weights.")
@store_option
@json_option
def lineage(target, quick, store, as_json) -> None:
    """Print what TARGET was made from and what was made of it; exit code 1 where a digest no longer matches.

    A folder or URI of latents, any name of a checkpoint, models:/NAME@ALIAS, or an MLflow run by its id or name.
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
    click.echo(f"\nBROKEN in {broken} places" if broken else "\nunbroken: every recorded digest matches")
    print_result(as_json, {"ok": not broken, "chain": [link.to_dict() for link in chain]})
    sys.exit(FAILED if broken else OK)
