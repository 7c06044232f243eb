"""An evaluation card as Markdown: scores beside those of real images, protocols in full, and how to repeat it."""

from collections.abc import Iterable, Iterator, Sequence

from evaluation.card import CARD_FILE, EvaluationCard
from evaluation.protocol import EvaluationProtocol
from raydit.printable import one_line


def render_card(card: EvaluationCard) -> str:
    """Return a card as Markdown."""
    report, checkpoint = card.report, card.checkpoint
    lines = [f"# Scores of {_text(checkpoint.model)}", ""]
    if report.disqualified:
        lines += [f"**Defective:** {_text(report.disqualified)}.", ""]
    lines += [*_scores(card), ""]
    lines += [f"- {name} is missing: {_text(reason)}" for name, reason in report.missing.items()]
    lines += [f"- {_text(warning)}" for warning in report.all_warnings]
    lines += ["", "## Repeat it", "", *_block(f"raydit verify {CARD_FILE}"), ""]
    lines += [
        "computes the scores again in a folder of its own, and compares them. The evaluation alone, by the recipe"
    ]
    lines += ["beside this card:", "", *_block(card.command), ""]
    lines += ["## Checkpoint", "", *_table(["", ""], _checkpoint(card)), ""]
    for protocol in report.protocols:
        lines += [f"## Protocol {protocol.protocol_id}", "", f"{_text(protocol.summary)}.", ""]
        lines += [*_table(["field", "value"], _fields(protocol)), ""]
    lines += ["## Code and environment", "", *_table(["", ""], _environment(card))]
    return "\n".join(lines) + "\n"


def _scores(card: EvaluationCard) -> Iterator[str]:
    """Yield the table of metrics, each with its error, its mean over seeds, and the same score of real images."""
    report, seeds = card.report, card.num_seeds
    names = dict.fromkeys([*report.metrics, *report.real_baseline, *report.reconstructions])
    columns = ["metric", "samples", *([f"mean of {seeds} seeds"] if seeds > 1 else []), "real images"]
    rows = []
    for name in names:
        row = [name, _value(report.metrics.get(name), report.errors.get(name))]
        if seeds > 1:
            row.append(_value(*report.estimate(name)) if name in report.repeats else "")
        row.append(_value(report.real_baseline.get(name)))
        if report.reconstructions:
            row.append(_value(report.reconstructions.get(name)))
        rows.append(row)
    yield from _table([*columns, *(["reconstructions"] if report.reconstructions else [])], rows)


def _value(value: float | None, error: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" + ("" if error is None else f" ± {error:.3g}")


def _checkpoint(card: EvaluationCard) -> Iterator[tuple[str, str]]:
    checkpoint, latents = card.checkpoint, card.latents
    yield "location", checkpoint.uri
    yield "digest (sha256)", checkpoint.digest
    if checkpoint.source is not None:
        yield "imported from", ", ".join(str(value) for value in checkpoint.source.values() if value)
    else:
        yield "trained for", f"{checkpoint.step:,} steps"
    yield "parameters", f"{checkpoint.parameters:,}"
    yield "weights", f"{checkpoint.bytes:,} bytes"
    if latents is not None:
        yield "trained on latents", latents.path
        yield "their fingerprint", latents.fingerprint
        if latents.images is not None:
            yield "their images", f"{latents.images:,}, and {latents.quarantined or 0:,} quarantined"
        if latents.autoencoder:
            yield "their autoencoder", latents.autoencoder


def _fields(protocol: EvaluationProtocol) -> Iterator[tuple[str, str]]:
    """Yield all fields of a protocol, also those that its id leaves out because they are not set."""
    for name, value in vars(protocol).items():
        yield name, "not set" if value is None else str(value)


def _environment(card: EvaluationCard) -> Iterator[tuple[str, str]]:
    report = card.report
    yield "scored by", " ".join(filter(None, ["raydit", report.raydit_version]))
    yield "commit", report.commit or "unknown"
    yield "scored at", report.date or "unknown"
    yield "published at", card.date
    yield from card.environment.items()


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(map(_text, row))} |"


def _text(text: str) -> str:
    """Return a text in one line, in which nothing is Markdown or HTML."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return one_line(text)


def _block(command: str) -> list[str]:
    return [f"    {one_line(command)}"]
