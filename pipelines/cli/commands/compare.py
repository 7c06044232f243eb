"""`raydit compare`: evaluation reports side by side."""

import json
from dataclasses import asdict

import click

from pipelines.cli.options import json_option, store_option
from pipelines.cli.output import echo, print_line, print_result


@click.command()
@click.argument("reports", metavar="A B...", nargs=-1, required=True, type=click.Path())
@click.option("--protocol", help="Protocol id of the reports to compare, for checkpoints with several reports.")
@click.option("--allow-unequal", is_flag=True, help="Also compare reports of different protocols.")
@store_option
@json_option
def compare(reports: tuple[str, ...], protocol: str | None, allow_unequal: bool, store: str, as_json: bool) -> None:
    """Print evaluation reports side by side.

    Each of A B... is a checkpoint, a report or its folder. Reports of different protocols are refused, because their
    metrics are not comparable; of reports by several extractors, each extractor's protocol is compared. Where feature
    spaces rank a checkpoint above and below the first one, by more than the errors, a line says so. The errors
    after +- are standard errors; the kernel distance has one only where samples were drawn repeatedly (--repeats).
    """
    from evaluation.compare import compare_reports
    from pipelines.scoring.reports.report_files import find_reports

    found = find_reports(reports, protocol_id=protocol, tracking_uri=store)
    comparison = compare_reports(found, allow_unequal=allow_unequal)
    echo(comparison.table().rstrip("\n"))
    for label in dict.fromkeys(protocol.label for report in found for protocol in report.protocols):
        print_line("protocol", label)
    listed = [json.loads(report.to_json()) for report in found]
    result = {"names": comparison.names, "differing": comparison.differing, "reports": listed}
    print_result(as_json, result | {"disagreements": [asdict(each) for each in comparison.disagreements]})
