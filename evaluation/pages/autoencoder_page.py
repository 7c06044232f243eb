"""Reports on autoencoders as one self-contained HTML page, of one autoencoder or of several side by side."""

from collections.abc import Mapping, Sequence
from html import escape

from evaluation.autoencoder_report import (
    AutoencoderReport,
    best_positions,
    describe_metric,
    require_comparable,
    short_names,
)
from evaluation.pages.html import number, page, picture, section, table, timings_table

PICTURE = "reconstructions"
_CAPTION = (
    "Images as they are, encoded and decoded, and four times the absolute difference of both, which is black where "
    "nothing was lost."
)
_MAX_CHANNELS = 32
"""Channels of a table; latents of representation autoencoders have hundreds."""
_NOTES = (
    "PSNR is that of the mean squared error over all images. Structural similarity: Wang et al. 2004.",
    "The Fréchet distance of reconstructions is that of the decoded images from the same images as they are; it falls "
    "as N grows, and is comparable only in one extractor's features.",
    "Denoising: the velocity loss on held-out latents of a tiny DiT after a small, fixed training, and that of the "
    "best prediction from each value alone. A ratio near 1 says that the tiny DiT found little structure to learn.",
    "Speeds are those of one worker.",
)


def render_autoencoder_page(reports: Sequence[AutoencoderReport], image: bytes | None = None) -> str:
    """Return reports on one autoencoder or on several as self-contained HTML; all text of the reports is escaped.

    image: a PNG file of reconstructions. Raises InvalidInput if the reports are not comparable, ValueError for an image
    that is not a PNG.
    """
    require_comparable(reports)
    names = short_names(reports)
    warnings = dict.fromkeys(warning for report in reports for warning in report.warnings)
    sections = [
        _header(reports, names),
        "".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings),
        section("Measurements", _metrics(reports, names)),
        picture("Reconstructions", _CAPTION, image) if image is not None else "",
        *(section(f"Channels of the latents{_of(reports, name)}", _channels(each)) for each, name in _named(reports)),
        *(section(f"Protocol{_of(reports, name)}", _protocol(each)) for each, name in _named(reports)),
        *(section(f"Timings{_of(reports, name)}", timings_table(each.timings)) for each, name in _named(reports)),
    ]
    return page(f"{' · '.join(names)} · {reports[0].protocol.summary}", sections)


def _named(reports: Sequence[AutoencoderReport]) -> list[tuple[AutoencoderReport, str]]:
    return list(zip(reports, short_names(reports), strict=True))


def _of(reports: Sequence[AutoencoderReport], name: str) -> str:
    """Return what the title of a section adds if there are several autoencoders."""
    return f", {name}" if len(reports) > 1 else ""


def _header(reports: Sequence[AutoencoderReport], names: Sequence[str]) -> str:
    """Show what was judged, and the PSNR of the best in large type."""
    first = reports[0]
    about = "Autoencoder" if len(reports) == 1 else f"{len(reports)} autoencoders"
    date = first.date.replace("T", " ").replace("+00:00", " UTC")
    best = max(report.metrics["psnr"] for report in reports)
    return (
        f'<header><div><p class="over">{about}</p><h1>{escape(", ".join(names))}</h1>'
        f"<p>{first.protocol.num_images:,} images of {escape(first.images)} · {escape(first.protocol.summary)}</p>"
        f"<p>{escape(' · '.join(filter(None, [date, f'raydit {first.raydit_version}'])))}</p></div>"
        f'<div class="headline"><b>{number(best)}</b> <small>dB</small><br><code>psnr</code></div></header>'
    )


def _metrics(reports: Sequence[AutoencoderReport], names: Sequence[str]) -> str:
    """Show a row for each metric and a column for each autoencoder, the best values in bold."""
    rows = []
    for metric in dict.fromkeys(name for report in reports for name in report.metrics):
        label, best = describe_metric(metric), best_positions(reports, metric)
        cells = []
        for index, report in enumerate(reports):
            text = number(report.metrics[metric]) if metric in report.metrics else ""
            cells.append(f"<strong>{text}</strong>" if index in best else text)
        rows.append([f"{escape(label.text)} {label.arrow}<br><code>{escape(metric)}</code>", *cells])
    rows.append(["moments as stored", *(" x ".join(map(str, report.moments_shape)) for report in reports)])
    rows.append(["class", *(escape(report.kind) for report in reports)])
    rows.append(["device of the speeds", *(escape(report.device) for report in reports)])
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in _NOTES)
    return table(rows, ["", *map(escape, names)], numbers=True) + notes


def _channels(report: AutoencoderReport) -> str:
    """Show mean, standard deviation and kurtosis of the first channels of the scaled latents."""
    columns: Mapping[str, list[float]] = report.channels
    count = len(columns["mean"])
    rows = [[str(index), *(number(columns[name][index]) for name in columns)] for index in range(count)]
    note = "Of the latents that a diffusion model sees, which are scaled and drawn from the posterior."
    note += f" The first {_MAX_CHANNELS} of {count} channels." if count > _MAX_CHANNELS else ""
    return table(rows[:_MAX_CHANNELS], ["channel", *columns], numbers=True) + f"<p class=note>{note}</p>"


def _protocol(report: AutoencoderReport) -> str:
    """Show the protocol."""
    protocol = report.protocol
    rows = [[escape(name), f"<code>{escape(str(value))}</code>"] for name, value in vars(protocol).items()]
    note = (
        f"<p class=note>Protocol <code>{protocol.protocol_id}</code>. Reports whose protocols differ only in the "
        f"autoencoder and its precision are comparable: <code>{protocol.comparable_id}</code>.</p>"
    )
    return note + table(rows, [])
