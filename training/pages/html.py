"""Parts of a page that needs nothing but itself: a frame for light and dark, tables, charts."""

import html
import math
from collections.abc import Sequence

# seen on white and on black
COLOURS = ("#2f81f7", "#e0701c", "#2a9d4f", "#a855c7", "#d9483f", "#0f98a6", "#9a8700", "#7d7d85")
WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 84, 14, 12, 30  # margins around a chart's field
STYLE = """
:root{color-scheme:light dark;--ink:#1c1c1e;--dim:#666;--ground:#fff;--card:#f5f5f7;--line:#d8d8dc;
--good:#118a3c;--bad:#b3261e;--warn:#b36b00}
@media (prefers-color-scheme:dark){:root{--ink:#e8e8ea;--dim:#a0a0a6;--ground:#161618;
--card:#232326;--line:#3c3c40;--good:#4cc27a;--bad:#ff7b72;--warn:#e0a040}}
body{font:16px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--ground);
max-width:64rem;margin:1.5rem auto;padding:0 1rem}
h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin-top:2rem}
h3{font-size:1rem;margin-bottom:.3rem}
@media (max-width:600px){svg text{font-size:19px}}
@media (min-width:1000px){.chart{display:inline-block;width:49.5%;vertical-align:top}
svg text{font-size:17px}}
.facts{display:flex;flex-wrap:wrap;gap:.5rem}
.facts div{background:var(--card);border-radius:.5rem;padding:.4rem .8rem}
.facts b{display:block;font-size:1.15rem}.facts span,.dim{color:var(--dim);font-size:.85rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem}
td,th{border-bottom:1px solid var(--line);padding:.3rem .6rem;text-align:left;vertical-align:top}
td:nth-child(n+3):last-child{min-width:13rem}
svg{display:block;width:100%;height:auto;max-width:44rem;font:12px system-ui,sans-serif}
svg text{fill:var(--dim)}svg .grid{stroke:var(--line)}svg .axis{stroke:var(--dim)}
pre{background:var(--card);padding:.8rem;border-radius:.5rem;overflow-x:auto;font-size:.85rem}
summary{cursor:pointer}audio{max-width:16rem;width:100%}
ins{color:#d35400}del{color:var(--bad)}mark{background:none;color:var(--bad);text-decoration:underline}
.same{color:var(--dim)}.changed{color:var(--warn)}.new{color:var(--good)}.dangerous{color:var(--bad)}
.pass{color:var(--good)}.fail{color:var(--bad);font-weight:600}
"""


def escape(value) -> str:
    return html.escape(str(value))


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style>'
    )
    body = "\n".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def table(header: Sequence, rows: Sequence[Sequence]) -> str:
    """Cells are text, unless they are `Markup`."""
    head = "".join(f"<th>{_cell(cell)}</th>" for cell in header)
    lines = ["<tr>" + "".join(f"<td>{_cell(c)}</td>" for c in row) + "</tr>" for row in rows]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


class Markup(str):
    """HTML that is put into a page as it stands."""


def _cell(value) -> str:
    return value if isinstance(value, Markup) else escape(value)


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Cards of (what, value)."""
    cards = "".join(f"<div><span>{escape(n)}</span><b>{escape(v)}</b></div>" for n, v in pairs)
    return f'<div class="facts">{cards}</div>'


def folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


# --- charts -------------------------------------------------------------------------------------


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str,
    series: dict[str, list[tuple[float, float]]],
    marks: dict[str, float] | None = None,
    unit: str = "",
    dots: bool = True,
) -> str:
    """Lines over steps, with axes that fit them; empty where there is nothing to draw.

    Args:
        series: {name: [(step, value), ...]}; hovering over a point tells both.
        marks: {name: value} of dashed lines across, such as a baseline; they are on the scale.
        dots: whether points are seen, or only felt.
    """
    series, marks = {n: p for n, p in series.items() if p}, marks or {}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points] + list(marks.values())
    x0, x1 = min(xs), max(xs)
    x1 = x1 if x1 > x0 else x0 + 1
    margin = (max(ys) - min(ys)) * 0.06 or abs(max(ys)) * 0.06 or 1.0
    y0, y1 = min(ys) - margin, max(ys) + margin
    if min(ys) >= 0:
        y0 = max(0.0, y0)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        field = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + across * field[0], HEIGHT - BOTTOM - up * field[1]

    parts = [
        f'<div class="chart"><h3>{escape(title)}</h3>',
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
    ]
    for value in ticks(y0, y1):
        y = at(x0, value)[1]
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}{unit}</text>'
        )
    for value in ticks(x0, x1):
        x = at(value, y0)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{value:g}</text>')
    parts.append(
        f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
    )
    for name, value in marks.items():
        y = at(x0, value)[1]
        parts.append(
            f'<line class="axis" stroke-dasharray="5 4" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
            f'y1="{y:.1f}" y2="{y:.1f}"><title>{escape(name)}: {value:.4g}{unit}</title></line>'
            f'<text x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [at(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (step, value) in zip(places, points, strict=True):
            look = f'r="3.5" fill="{colour}"' if dots else 'r="6" fill="transparent"'
            told = f"{escape(name)}, step {step:g}: {value:.4g}{unit}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}><title>{told}</title></circle>')
    legend = " &nbsp; ".join(
        f'<span style="color:{COLOURS[n % len(COLOURS)]}">&#9679;</span> {escape(name)}'
        for n, name in enumerate(series)
    )
    return "".join([*parts, "</svg>", f'<p class="dim">{legend} &nbsp; by step</p></div>'])


def smoothed(points: list[tuple[float, float]], most: int = 150) -> list[tuple[float, float]]:
    """Means over equal stretches, at most `most` of them, each at its last step."""
    size = max(1, -(-len(points) // most))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
