"""A report as one self-contained HTML page: no scripts, no network, images and plots inside."""

import base64
from collections.abc import Iterable, Mapping
from html import escape

from evaluation.metric_names import format_count, parse_metric_name
from evaluation.plots.distances import plot_distances
from evaluation.plots.style import COLOURS
from evaluation.report import EvaluationReport, group_by_num_samples

_PNG = b"\x89PNG\r\n\x1a\n"

_PICTURES = {
    "samples": ("Samples", "The first of the scored samples."),
    "classes": ("Samples of each class", "A row for each class."),
    "neighbours": (
        "Nearest training images",
        "On the left the samples that are nearest to a training image in the extractor's features, with their number "
        "and distance d; to the right of each the training images nearest to it. Copies would show here.",
    ),
}


def render_page(report: EvaluationReport, images: Mapping[str, bytes] | None = None) -> str:
    """Return the report as self-contained HTML that can be opened from disk, mailed or kept as an artifact.

    images: PNG files by name: "samples", "classes", "neighbours", or any other name. All text of the report is escaped,
    and the page's Content-Security-Policy forbids loading anything. Raises ValueError for an image that is not a PNG.
    """
    title = f"{report.checkpoint.rstrip('/').rpartition('/')[2]} · {report.protocol.label}"
    sections = [
        _header(report),
        "".join(f'<p class="warning">{escape(warning)}</p>' for warning in report.all_warnings),
        _section("Metrics", _metrics(report)),
        *(_section(f"Fréchet distance against N{_extractor(report, part)}", _plot(part)) for part in report.parts),
        *(_picture(name, content) for name, content in (images or {}).items()),
        *(_section(f"Protocol{_extractor(report, part)}", _protocol(part)) for part in report.parts),
        _section("Timings", _timings(report.timings)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(section for section in sections if section)}\n</main></body></html>\n"
    )


def _header(report: EvaluationReport) -> str:
    """Show the checkpoint, and the first metric in large type."""
    name, value = next(iter(report.metrics.items()))
    spread = f" <small>± {_number(report.errors[name])}</small>" if name in report.errors else ""
    return (
        f'<header><div><p class="over">Evaluation of</p><h1>{escape(report.checkpoint)}</h1>'
        f"<p>{report.protocol.num_samples:,} samples · protocol <code>{escape(report.protocol_id)}</code> "
        f"({escape(report.protocol.summary)}) · weights "
        f"<code>{escape(report.checkpoint_digest[:12])}</code>"
        f"{f' · code <code>{escape(report.commit)}</code>' if report.commit else ''}</p>{_provenance(report)}</div>"
        f'<div class="headline"><b>{_number(value)}</b>{spread}<br><code>{escape(name)}</code></div></header>'
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


def _metrics(report: EvaluationReport) -> str:
    """Show a row for each metric, and a column for each N of samples and for each baseline."""
    generated, baselines = group_by_num_samples(report.metrics), report.baselines
    heads = [f"N = {format_count(n)}" for n in generated]
    heads += [f"{escape(each.title)}<br>N = {format_count(each.num_images)}" for each in baselines]
    rows = []
    for stem, name in next(iter(generated.values())).items():
        kind = parse_metric_name(name).kind
        cells = [_value(report, column[stem]) if stem in column else "" for column in generated.values()]
        cells += [_number(each.values[stem]) if stem in each.values else "" for each in baselines]
        if report.repeats:
            known = [column[stem] for column in generated.values() if column.get(stem) in report.repeats]
            cells.append(_mean(report, known[0]) if known else "")
        rows.append([f"{escape(kind.label)} {kind.arrow}<br><code>{escape(stem)}</code>", *cells])
    if report.repeats:
        heads.append(f"mean of {max(map(len, report.repeats.values()))} seeds")
    notes = [
        "± is the standard error (Fréchet distances: jackknife over blocks of samples) or the standard deviation "
        "(Inception Score: over splits; kernel distance: over subsets)."
    ]
    if report.real_baseline:
        notes.append(
            "Real images were held out of the reference and scored like samples: no better scores can be expected."
        )
    if report.reconstructions:
        notes.append(
            "Reconstructions are held-out images that the autoencoder has encoded and decoded: what it costs, and the "
            "best that samples through it can be."
        )
    if len(generated.keys() | {each.num_images for each in baselines}) > 1:
        notes.append("Fréchet distance falls as N grows: compare only columns of equal N.")
    notes += map(escape, report.explanations)
    return _table(rows, ["metric", *heads], numbers=True) + "".join(f"<p class=note>{note}</p>" for note in notes)


def _value(report: EvaluationReport, name: str) -> str:
    spread = f" <small>± {_number(report.errors[name])}</small>" if name in report.errors else ""
    return _number(report.metrics[name]) + spread


def _mean(report: EvaluationReport, name: str) -> str:
    mean, error = report.estimate(name)
    return _number(mean) + (f" <small>± {_number(error)}</small>" if error is not None else "")


def _plot(report: EvaluationReport) -> str:
    """Plot the curve, or without one the distances at several N."""
    points = report.curve or _distances(report.metrics)
    return plot_distances(points, _distances(report.real_baseline)) if len(points) > 1 else ""


def _distances(metrics: Mapping[str, float]) -> list[tuple[int, float]]:
    names = {name: parse_metric_name(name) for name in metrics}
    return sorted((parts.num_samples, metrics[name]) for name, parts in names.items() if parts.kind.name == "fd")


def _picture(name: str, content: bytes) -> str:
    if not content.startswith(_PNG):
        raise ValueError(f"Found image {name!r} that begins with {content[:8]!r}, expected a PNG. Encode it as PNG.")
    title, caption = _PICTURES.get(name, (name, ""))
    data = base64.b64encode(content).decode()
    return _section(
        title,
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>",
    )


def _protocol(report: EvaluationReport) -> str:
    """Show the protocol, which reports must share to be comparable."""
    rows = [[escape(name), f"<code>{escape(_text(value))}</code>"] for name, value in report.protocol.to_dict().items()]
    note = f"<p class=note>Only reports of protocol <code>{escape(report.protocol_id)}</code> are comparable.</p>"
    return note + _table(rows, [])


def _timings(timings: Mapping[str, float]) -> str:
    longest = max(timings.values(), default=0.0) or 1.0
    rows = []
    for name, seconds in timings.items():
        bar = f'<div class="bar" style="width:{100 * seconds / longest:.1f}%"></div>'
        rows.append([escape(name.removesuffix("_seconds").replace("_", " ")), f"{seconds:,.1f} s", bar])
    return _table(rows, []) if rows else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _table(rows: Iterable[list[str]], heads: list[str], numbers: bool = False) -> str:
    """Return an HTML table. rows, heads: cells of HTML."""
    head = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in heads)}</tr></thead>" if heads else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table{" class=numbers" if numbers else ""}>{head}<tbody>{body}</tbody></table></div>'


def _number(value: float) -> str:
    return f"{value:.4g}"


def _text(value: object) -> str:
    return "-" if value is None else str(value)


_STYLE = f":root {{ {' '.join(f'--{name}: {colour};' for name, colour in COLOURS.items())} }}"
_STYLE += """
:root { --paper: #fff; --back: #f4f6f9; --warn: #8a5a00; --warn-back: #fff6df; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --line: #323a48; --paper: #1b2029;
  --back: #12151b; --accent: #7fa7ff; --real: #5fcf9c; --warn: #f3cf7a; --warn-back: #3a2f14; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
section, header { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.4rem; margin-top: 1rem; }
header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 1rem 2rem; align-items: center; }
header p { margin: .2rem 0; color: var(--soft); }
h1 { font-size: 1.25rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 .7rem; }
code { font: .86em ui-monospace, monospace; overflow-wrap: anywhere; }
td code { color: var(--soft); }
.headline { text-align: right; } .headline b { font-size: 2.2rem; color: var(--accent); font-weight: 650; }
small { color: var(--soft); white-space: nowrap; }
.warning { background: var(--warn-back); color: var(--warn); border-radius: 8px; padding: .6rem 1rem;
  margin: 1rem 0 0; }
.note { color: var(--soft); font-size: .88rem; margin: .6rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .88rem; }
tr:last-child td { border-bottom: 0; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right;
  font-variant-numeric: tabular-nums; }
.bar { background: var(--accent); height: .6rem; border-radius: 3px; margin-top: .45rem; min-width: 2px; }
td:has(.bar) { width: 60%; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .88rem; margin-top: .5rem; }
img { max-width: 100%; border-radius: 4px; }
svg { width: 100%; height: auto; max-width: 44rem; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
"""
