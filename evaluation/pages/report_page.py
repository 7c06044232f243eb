"""A report as one self-contained HTML page: no scripts, no network, images and plots inside."""

from collections.abc import Mapping
from html import escape

from evaluation.metric_names import format_count, parse_metric_name
from evaluation.pages.html import number, page, picture, section, table, timings_table
from evaluation.plots.distances import plot_distances
from evaluation.ratios import RatioRow
from evaluation.report import EvaluationReport, group_by_num_samples

_PICTURES = {
    "samples": ("Samples", "The first of the scored samples."),
    "classes": ("Samples of each class", "A row for each class."),
    "neighbours": (
        "Nearest training images",
        "On the left the samples that are nearest to a training image in the extractor's features, with their number "
        "and distance d; to the right of each the training images nearest to it. Copies would show here.",
    ),
}
_PICTURES_OF_GIVEN_IMAGES = {
    "samples": ("Images", "Some of the scored images, evenly spaced in their source."),
    "classes": ("Images of each class", "A row for each class, with some of its scored images."),
    "neighbours": (
        "Nearest training images",
        "On the left the images above that are nearest to a training image in the extractor's features, with their "
        "number in the source, counted from 0, and distance d; to the right of each the training images nearest to it. "
        "Copies would show here, but only the images above were compared.",
    ),
}
"""Titles and captions of pictures of images that raydit did not sample, of which it shows some."""


def render_page(report: EvaluationReport, images: Mapping[str, bytes] | None = None) -> str:
    """Return the report as self-contained HTML that can be opened from disk, mailed or kept as an artifact.

    images: PNG files by name: "samples", "classes", "neighbours", or any other name. All text of the report is escaped,
    and the page's Content-Security-Policy forbids loading anything. Raises ValueError for an image that is not a PNG.
    """
    title = f"{report.checkpoint.rstrip('/').rpartition('/')[2]} · {report.protocol.label}"
    sections = [
        _header(report),
        "".join(f'<p class="warning">{escape(warning)}</p>' for warning in report.all_warnings),
        section("Ratios to real images", _ratios(report)),
        section("Metrics", _metrics(report)),
        *(section(f"Fréchet distance against N{_extractor(report, part)}", _plot(part)) for part in report.parts),
        *(_picture(report, name, content) for name, content in (images or {}).items()),
        *(section(f"Distance of each class{_extractor(report, part)}", _classes(part)) for part in report.parts),
        *(section(f"Protocol{_extractor(report, part)}", _protocol(part)) for part in report.parts),
        section("Timings", timings_table(report.timings)),
    ]
    return page(title, sections)


def _header(report: EvaluationReport) -> str:
    """Show the checkpoint, and the first metric in large type."""
    name, value = next(iter(report.metrics.items()))
    spread = f" <small>± {number(report.errors[name])}</small>" if name in report.errors else ""
    means = "".join(
        f"<br>{_ratio(row)} <code>{escape(row.name)}</code>" for row in report.ratios if row.name in report.averaged
    )
    return (
        f'<header><div><p class="over">Evaluation of</p><h1>{escape(report.checkpoint)}</h1>'
        f"<p>{report.protocol.num_samples:,} samples · protocol <code>{escape(report.protocol_id)}</code> "
        f"({escape(report.protocol.summary)}) · weights "
        f"<code>{escape(report.checkpoint_digest[:12])}</code>"
        f"{f' · code <code>{escape(report.commit)}</code>' if report.commit else ''}</p>{_provenance(report)}</div>"
        f'<div class="headline"><b>{number(value)}</b>{spread}<br><code>{escape(name)}</code>{means}</div></header>'
    )


def _provenance(report: EvaluationReport) -> str:
    """Show what was scored, when and by which version, as far as the report records it."""
    parts = [
        escape(report.date.replace("T", " ").replace("+00:00", " UTC")),
        f"raydit {escape(report.raydit_version)}" if report.raydit_version else "",
        escape(report.model),
        f"latents <code>{escape(report.latents[:12])}</code>" if report.latents else "",
    ]
    return f"<p>{' · '.join(filter(None, parts))}</p>" if any(parts) else ""


def _extractor(report: EvaluationReport, part: EvaluationReport) -> str:
    """Return what the title of a section adds if a report is of several extractors: which one it is about."""
    return f", {part.protocol.extractor}" if report.further else ""


def _ratios(report: EvaluationReport) -> str:
    """Show a bar for each ratio, below that of real images, which is 1; empty if there are no ratios."""
    known = [row for row in report.ratios if row.value is not None]
    missing = [f"{row.title}: no ratio, {row.reason}." for row in report.ratios if row.value is None]
    notes = "".join(f"<p class=note>{escape(text)}</p>" for text in missing)
    if not known:
        return notes
    largest = max(1.0, *(row.value or 0.0 for row in known))
    rows = [["real images", "1", _bar(1 / largest, "real")]]
    for row in known:
        title = f"{escape(row.title)}<br><code>{escape(row.name)}</code>"
        rows.append([title, _ratio(row), _bar((row.value or 0.0) / largest, "accent")])
    notes += (
        "<p class=note>The Fréchet distance of samples over that of as many held-out real images: how many times as "
        "far they are from the reference. Feature spaces share this unit. A model that is optimised for one of them "
        "stands out: its bar is short there and long in the others. ± is the standard error of drawing other samples "
        "and holding out other images.</p>"
    )
    return table(rows, []) + notes


def _ratio(row: RatioRow) -> str:
    spread = f" <small>± {number(row.error)}</small>" if row.error is not None else ""
    return number(row.value or 0.0) + spread


def _bar(share: float, colour: str) -> str:
    return f'<div class="bar" style="width:{100 * share:.1f}%;background:var(--{colour})"></div>'


def _metrics(report: EvaluationReport) -> str:
    """Show a row for each metric, and a column for each N of samples and for each baseline."""
    generated, baselines = group_by_num_samples(report.metrics), report.baselines
    heads = [f"N = {format_count(n)}" for n in generated]
    heads += [f"{escape(each.title)}<br>N = {format_count(each.num_images)}" for each in baselines]
    rows = []
    for stem, name in next(iter(generated.values())).items():
        kind = parse_metric_name(name).kind
        cells = [_value(report, column[stem]) if stem in column else "" for column in generated.values()]
        cells += [number(each.values[stem]) if stem in each.values else "" for each in baselines]
        if report.repeats:
            known = [column[stem] for column in generated.values() if column.get(stem) in report.repeats]
            cells.append(_mean(report, known[0]) if known else "")
        rows.append([f"{escape(kind.label)} {kind.arrow}<br><code>{escape(stem)}</code>", *cells])
    if report.repeats:
        heads.append(f"mean of {max(map(len, report.repeats.values()))} seeds")
    notes = [
        "± is the standard error (Fréchet distances, precision, recall, density, coverage: jackknife over blocks of "
        "samples) or the standard deviation (Inception Score: over splits; kernel distance: over subsets)."
    ]
    if report.real_baseline:
        notes.append(
            "Held-out real images, which the model was not trained on, were scored in the same way as the samples. "
            "Better scores than theirs cannot be expected."
        )
    if report.reconstructions:
        notes.append(
            "Reconstructions are held-out images that the autoencoder has encoded and decoded. They show how much "
            "quality the autoencoder loses, and so the best score that its samples can reach."
        )
    if len(generated.keys() | {each.num_images for each in baselines}) > 1:
        notes.append("Fréchet distance falls as N grows: compare only columns of equal N.")
    notes += map(escape, report.explanations)
    return table(rows, ["metric", *heads], numbers=True) + "".join(f"<p class=note>{note}</p>" for note in notes)


def _value(report: EvaluationReport, name: str) -> str:
    spread = f" <small>± {number(report.errors[name])}</small>" if name in report.errors else ""
    return number(report.metrics[name]) + spread


def _mean(report: EvaluationReport, name: str) -> str:
    mean, error = report.estimate(name)
    return number(mean) + (f" <small>± {number(error)}</small>" if error is not None else "")


def _plot(report: EvaluationReport) -> str:
    """Plot the curve, or without one the distances at several N."""
    points = report.curve or _distances(report.metrics)
    return plot_distances(points, _distances(report.real_baseline)) if len(points) > 1 else ""


def _distances(metrics: Mapping[str, float]) -> list[tuple[int, float]]:
    names = {name: parse_metric_name(name) for name in metrics}
    return sorted((parts.num_samples, metrics[name]) for name, parts in names.items() if parts.kind.name == "fd")


def _classes(report: EvaluationReport) -> str:
    """Show a row for each class, or nothing if they were not measured."""
    if not report.per_class:
        return ""
    rows = [
        [
            escape(each.name),
            f"{each.num_samples:,}",
            f"{each.num_real:,}",
            escape(each.reason) if each.value is None else number(each.value),
            f"<code>{each.metric}</code>" if each.metric else "",
        ]
        for each in report.per_class
    ]
    note = (
        "<p class=note>Samples of a class against its real images among those whose features the reference holds: "
        "<code>fd</code> is the Fréchet distance, <code>kid</code> the kernel distance, where there are too few images "
        "for that. Compare only classes with one metric.</p>"
    )
    return table(rows, ["class", "samples", "real images", "distance", ""], numbers=True) + note


def _picture(report: EvaluationReport, name: str, content: bytes) -> str:
    known = _PICTURES_OF_GIVEN_IMAGES if report.protocol.is_of_given_images else _PICTURES
    title, caption = known.get(name, (name, ""))
    return picture(title, caption, content)


def _protocol(report: EvaluationReport) -> str:
    """Show the protocol, which reports must share to be comparable."""
    rows = [[escape(name), f"<code>{escape(_text(value))}</code>"] for name, value in report.protocol.to_dict().items()]
    note = f"<p class=note>Only reports of protocol <code>{escape(report.protocol_id)}</code> are comparable.</p>"
    return note + table(rows, [])


def _text(value: object) -> str:
    return "-" if value is None else str(value)
