"""The parts of self-contained HTML pages: no scripts, no network, images and plots inside."""

import base64
from collections.abc import Iterable, Mapping
from html import escape

from evaluation.plots.style import COLOURS

_PNG = b"\x89PNG\r\n\x1a\n"


def page(title: str, sections: Iterable[str]) -> str:
    """Return a page that can be opened from disk, mailed or kept as an artifact.

    sections: HTML; empty ones are left out. The page's Content-Security-Policy forbids loading anything.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(section for section in sections if section)}\n</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """Return a section of HTML content; empty without content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def picture(title: str, caption: str, content: bytes) -> str:
    """Return a section with a PNG file's content. Raises ValueError for an image that is not a PNG."""
    if not content.startswith(_PNG):
        raise ValueError(f"Found image {title!r} that begins with {content[:8]!r}, expected a PNG. Encode it as PNG.")
    data = base64.b64encode(content).decode()
    return section(
        title,
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>",
    )


def table(rows: Iterable[list[str]], heads: list[str], numbers: bool = False) -> str:
    """Return an HTML table. rows, heads: cells of HTML."""
    head = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in heads)}</tr></thead>" if heads else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table{" class=numbers" if numbers else ""}>{head}<tbody>{body}</tbody></table></div>'


def timings_table(timings: Mapping[str, float]) -> str:
    """Return a table of durations in seconds with bars; empty without timings."""
    longest = max(timings.values(), default=0.0) or 1.0
    rows = []
    for name, seconds in timings.items():
        bar = f'<div class="bar" style="width:{100 * seconds / longest:.1f}%"></div>'
        rows.append([escape(name.removesuffix("_seconds").replace("_", " ")), f"{seconds:,.1f} s", bar])
    return table(rows, []) if rows else ""


def number(value: float) -> str:
    """Return a value with four significant digits."""
    return f"{value:.4g}"


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
