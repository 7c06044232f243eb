"""`raydit compare`: reports side by side."""

import json

import click

from pipelines.cli.options import json_option
from pipelines.cli.output import print_result


@click.command()
@click.argument("reports", metavar="A B...", nargs=-1, required=True, type=click.Path())
@click.option("--protocol", help="Id of the protocol, where checkpoints have reports of several.")
@click.option("--allow-unequal", is_flag=True, help="Set reports of unequal protocols side by side all the same.")
@json_option
def compare(reports, protocol, allow_unequal, as_json) -> None:
    """Set reports side by side: of checkpoints, or by their files or folders. Refuses unequal protocols."""
    from evaluation.compare import compare_reports
    from pipelines.scoring.report_files import find_reports

    found = find_reports(reports, protocol_id=protocol)
    comparison = compare_reports(found, allow_unequal=allow_unequal)
    click.echo(comparison.table(), nl=False)
    listed = [json.loads(report.to_json()) for report in found]
    print_result(as_json, {"names": comparison.names, "differing": comparison.differing, "reports": listed})
