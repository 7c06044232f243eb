"""Reports on storage: where they are, how they are written, and how they are found again.

A report lies in output/evaluations/<protocol_id>/<name of the checkpoint>, next to its page and pictures.
"""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from cluster import storage
from evaluation.card import CARD_FILE
from evaluation.card import FORMAT as CARD_FORMAT
from evaluation.pages.report_page import render_page
from evaluation.report import REPORT_FILE, EvaluationReport
from pipelines.checkpoints.open import IN_TRACKING, open_checkpoint
from pipelines.scoring.reports.unlogged import mark_unlogged
from pipelines.scoring.settings import EVALUATIONS
from pipelines.tracking.provenance import code_record
from raydit import __version__
from raydit.errors import InvalidInput, NotFound

PAGE_FILE = "report.html"


def report_folder(evaluations: str, protocol_id: str, name: str) -> str:
    """Return the path or URI of a report's folder. name: of the checkpoint, or of images from another source."""
    return storage.join(evaluations, protocol_id, name)


def write_report(
    report: EvaluationReport, folder: str, pictures: dict[str, bytes], timings: dict[str, float]
) -> EvaluationReport:
    """Write pictures (PNG files by name) and page, then the report; return it with timings, files, date and code.

    The report is marked as not yet logged; see pipelines.scoring.reports.unlogged.
    """
    files = {name: f"{name}.png" for name in pictures}
    for name, content in pictures.items():
        storage.write_atomically(storage.join(folder, files[name]), content)
    report = replace(
        report,
        timings=timings,
        artifacts={**files, "page": PAGE_FILE},
        code=code_record(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        raydit_version=__version__,
    )
    _write_page(report, folder, pictures)
    mark_unlogged(folder, report.to_json().encode(), report.checkpoint_digest)
    save_report(report, folder)
    return report


def rewrite_report(report: EvaluationReport, folder: str) -> None:
    """Write the page and the file of a report whose pictures are in its folder already."""
    files = {name: file for name, file in report.artifacts.items() if file.endswith(".png")}
    _write_page(report, folder, {name: storage.read_bytes(storage.join(folder, file)) for name, file in files.items()})
    save_report(report, folder)


def _write_page(report: EvaluationReport, folder: str, pictures: dict[str, bytes]) -> None:
    storage.write_atomically(storage.join(folder, PAGE_FILE), render_page(report, pictures).encode())


def save_report(report: EvaluationReport, folder: str) -> None:
    """Write report.json into a folder, atomically."""
    storage.write_atomically(storage.join(folder, REPORT_FILE), report.to_json().encode())


def read_report(file: str) -> EvaluationReport:
    """Read a report from the path or URI of its file."""
    return EvaluationReport.from_json(storage.read_bytes(file), file)


def read_report_of(file: str, digest: str) -> EvaluationReport | None:
    """Return the report in a JSON file, if it is one of the checkpoint with this digest, or else None.

    The file may be a report of another checkpoint, or a protocol file. Raises NotFound and InvalidInput.
    """
    if not storage.exists(file):
        raise NotFound(f"no report at {file}", "a report.json, or a protocol file", "correct the path")
    try:
        is_of_checkpoint = json.loads(storage.read_bytes(file)).get("checkpoint_digest") == digest
    except (ValueError, AttributeError, RecursionError):
        return None
    return read_report(file) if is_of_checkpoint else None


def load_report(folder: str) -> EvaluationReport | None:
    """Return the report in a folder, or None if it has none."""
    file = storage.join(folder, REPORT_FILE)
    return read_report(file) if storage.exists(file) else None


def load_matching_report(folder: str, digest: str) -> EvaluationReport | None:
    """Return the report in a folder that is of the checkpoint (or images) with this digest; None if there is none.

    It may have been set aside for that of another checkpoint.
    """
    report = load_report(folder)
    if report is not None and report.checkpoint_digest == digest:
        return report
    aside = storage.join(folder, _aside(digest, REPORT_FILE))
    return read_report(aside) if storage.exists(aside) else None


def set_aside_other_report(folder: str, digest: str) -> None:
    """Rename a report of another checkpoint than the one with this digest, and its files, so that they are kept."""
    report = load_report(folder)
    if report is None or report.checkpoint_digest == digest:
        return
    other = report.checkpoint_digest
    for file in (*report.artifacts.values(), REPORT_FILE):
        if storage.exists(path := storage.join(folder, file)):
            storage.move_file(path, storage.join(folder, _aside(other, file)))


def take_back_report(folder: str, digest: str) -> None:
    """Put the report of the checkpoint with this digest into its place, if it was set aside for that of another one."""
    aside = storage.join(folder, _aside(digest, REPORT_FILE))
    report = load_report(folder)
    if not storage.exists(aside) or (report is not None and report.checkpoint_digest == digest):
        return
    set_aside_other_report(folder, digest)
    report = read_report(aside)
    kept = {}
    for name, file in report.artifacts.items():
        if storage.exists(path := storage.join(folder, _aside(digest, file))):
            storage.move_file(path, storage.join(folder, file))
            kept[name] = file
    storage.move_file(aside, storage.join(folder, REPORT_FILE))
    if kept != report.artifacts:  # earlier versions of raydit did not keep pictures
        rewrite_report(replace(report, artifacts={**kept, "page": PAGE_FILE}), folder)


def _aside(digest: str, file: str) -> str:
    """Return the name of a file of a checkpoint's report while the folder holds that of another one."""
    stem, dot, suffix = file.partition(".")
    return f"{stem}-{digest[:12]}{dot}{suffix}"


def find_report_files(folder: str, *subfolders: str | None, file: str = REPORT_FILE) -> list[str]:
    """Return sorted paths or URIs of the reports below a folder.

    subfolders: names of the folders between `folder` and the file, one for each level; None stands for any name.
    """
    pattern = "/".join(re.escape(name) if name else "[^/]+" for name in (*subfolders, file))
    names = storage.list_files(folder, recursive=True)
    return [storage.join(folder, name) for name in names if re.fullmatch(pattern, name)]


def read_reports(files: Sequence[str]) -> Iterator[EvaluationReport]:
    """Read several reports, in order; from an object store, several requests ahead."""
    for name, file in zip(files, storage.open_in_order(files), strict=True):
        with file:
            yield EvaluationReport.from_json(file.read(), name)


def find_reports(
    names: Sequence[str], *, protocol_id: str | None = None, tracking_uri: str = ""
) -> list[EvaluationReport]:
    """Return one report for each name of a report file, of its folder, or of a checkpoint.

    Checkpoints may have reports by several protocols: then the only one that all names have in common is taken, or
    that of protocol_id; of a report by several extractors, the part by a protocol that is not its first.
    tracking_uri: MLflow's, where runs and models are looked up, as in a recipe. Raises NotFound if there is no report,
    InvalidInput if the names do not settle the protocol.
    """
    found = [_reports_of(name, protocol_id, tracking_uri) for name in names]
    if all(len(reports) == 1 for reports in found):
        return [reports[0] for reports in found]
    ids = [{each.protocol_id for report in reports for each in report.protocols} for reports in found]
    first_ids = [{report.protocol_id for report in reports} for reports in found]
    common = set.intersection(*first_ids) or set.intersection(*ids)
    if len(common) != 1:
        ambiguous = next(index for index, reports in enumerate(found) if len(reports) > 1)
        labels = {report.protocol.label for report in found[ambiguous]}
        raise InvalidInput(
            f"{names[ambiguous]} has reports of several protocols: found {', '.join(sorted(labels))}",
            "exactly one that all names have in common",
            "Choose by --protocol ID",
        )
    chosen = common.pop()
    return [_by_protocol(reports, chosen)[0] for reports in found]


def _by_protocol(reports: Sequence[EvaluationReport], protocol_id: str) -> list[EvaluationReport]:
    """Return the report whose first protocol has an id, or else what others have by it; empty if there is nothing."""
    leading = [report for report in reports if report.protocol_id == protocol_id]
    return (leading or [part for each in reports for part in each.parts if part.protocol_id == protocol_id])[:1]


def _reports_of(name: str, protocol_id: str | None, tracking_uri: str) -> list[EvaluationReport]:
    """Return all reports that a name may mean, without those whose numbers are in another report as repeats."""
    if not name.startswith(IN_TRACKING):
        is_file = name.partition("?")[0].endswith(".json") and storage.exists(name)
        if is_file:
            _refuse_card(name, name)
        if (report := read_report(name) if is_file else load_report(name)) is not None:
            return _of_protocol([report], protocol_id, name) if protocol_id else [report]
    try:
        opened = open_checkpoint(name, tracking_uri=tracking_uri)
    except (NotFound, InvalidInput):
        if not name.startswith(IN_TRACKING):
            _refuse_card(name, storage.join(name, CARD_FILE))
        raise
    evaluations = storage.join(opened.output, EVALUATIONS)
    files = find_report_files(evaluations, None, opened.name)
    files += find_report_files(evaluations, None, opened.name, file=_aside(opened.digest, REPORT_FILE))
    reports = [report for report in read_reports(files) if report.checkpoint_digest == opened.digest]
    if not reports:
        recipe = " --recipe RECIPE" if opened.record.recipe is None else ""
        do = (
            f"make one: raydit evaluate {shlex.quote(name)}{recipe}; or name the report.json that an evaluation by "
            "another recipe wrote into the output of that recipe (for `raydit promote`: --protocol REPORT.json)"
        )
        raise NotFound(f"{name}: no report in {evaluations}", "", do)
    if protocol_id:
        return _of_protocol(reports, protocol_id, name)
    return [report for report in reports if not any(_repeats(other, report) for other in reports)]


def _refuse_card(name: str, file: str) -> None:
    """Raise InvalidInput if a file holds an evaluation card. name: of it or of its folder, as the user has given it."""
    try:
        is_card = storage.exists(file) and json.loads(storage.read_bytes(file)).get("format") == CARD_FORMAT
    except (ValueError, AttributeError, RecursionError):
        return
    if is_card:
        raise InvalidInput(
            f"{name}: found an evaluation card, which is not a report",
            "a checkpoint, a report.json, or the folder of one",
            f"name the report that the card was published from; or let `raydit verify {shlex.quote(name)}` compare the "
            "card with scores that it computes again",
        )


def _of_protocol(reports: Sequence[EvaluationReport], protocol_id: str, name: str) -> list[EvaluationReport]:
    """Return what _by_protocol does. name: of the reports. Raises NotFound if there is nothing by the protocol."""
    if found := _by_protocol(reports, protocol_id):
        return found
    labels = dict.fromkeys(each.label for report in reports for each in report.protocols)
    raise NotFound(
        f"{name}: no report of protocol {protocol_id}",
        f"one of {', '.join(labels)}",
        "correct --protocol, or evaluate the checkpoint by this protocol",
    )


def _repeats(report: EvaluationReport, other: EvaluationReport) -> bool:
    """Return whether a report's repeats include the other report: equal protocols but for the seed."""
    seeds = len(report.repeats.get(report.headline, ()))
    further = range(report.protocol.seed + 1, report.protocol.seed + seeds)
    return other.protocol.seed in further and other.protocol == replace(report.protocol, seed=other.protocol.seed)
