"""Line charts as SVG text, for docs/; no plotting package is needed."""

import html
import math

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d6a9f", "#c58f00")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 320, 64, 16, 40, 84


def line_charts(charts: list[dict]) -> str:
    """Charts side by side, as one SVG.

    Each chart: {"title", "x", "y" (axis labels), "series": {name: [(x, y), ...]}, "log": True for
    logarithmic axes}.
    """
    parts = [_chart(chart, i * WIDTH) for i, chart in enumerate(charts)]
    size = f'width="{WIDTH * len(charts)}" height="{HEIGHT}"'
    view = f'viewBox="0 0 {WIDTH * len(charts)} {HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _chart(chart: dict, shift: float) -> str:
    log = chart.get("log", False)
    points = [point for line in chart["series"].values() for point in line]
    xs, ys = ([p[i] for p in points] for i in (0, 1))
    x_at = _axis(min(xs), max(xs), shift + LEFT, shift + WIDTH - RIGHT, log)
    low = min(ys) if log else 0
    y_at = _axis(low, max(ys), HEIGHT - BOTTOM, TOP, log)
    out = [_text(shift + WIDTH / 2, 20, chart["title"], "middle", bold=True)]
    for value in _ticks(min(xs), max(xs), log):
        x = x_at(value)
        out.append(_line(x, TOP, x, HEIGHT - BOTTOM))
        out.append(_text(x, HEIGHT - BOTTOM + 15, _short(value), "middle"))
    for value in _ticks(low, max(ys), log):
        y = y_at(value)
        out.append(_line(shift + LEFT, y, shift + WIDTH - RIGHT, y))
        out.append(_text(shift + LEFT - 6, y + 4, _short(value), "end"))
    out.append(_text(shift + WIDTH / 2, HEIGHT - BOTTOM + 32, chart["x"], "middle"))
    out.append(_text(shift + LEFT, TOP - 6, chart["y"], "start"))
    for i, (name, line) in enumerate(chart["series"].items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [
            f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3" fill="{colour}"/>'
            for x, y in line
        ]
        y = HEIGHT - BOTTOM + 50 + 14 * (i // 2)
        x = shift + LEFT + 190 * (i % 2)
        out.append(f'<rect x="{x}" y="{y - 8}" width="10" height="8" fill="{colour}"/>')
        out.append(_text(x + 15, y, name, "start"))
    return "\n".join(out)


def _axis(low: float, high: float, first: float, last: float, log: bool):
    if log:
        low, high = math.log10(low), math.log10(high)
        if high - low < 0.3:  # a flat line in the middle, not at an edge
            low, high = low - 0.5, high + 0.5
    high = high if high > low else low + 1
    return lambda v: first + (last - first) * ((math.log10(v) if log else v) - low) / (high - low)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        return [
            digit * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for digit in (1, 3)
            if low <= digit * 10.0**power <= high
        ]
    step = 10.0 ** math.floor(math.log10((high - low) or 1))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 8)
    first = math.ceil(low / step)
    return [step * i for i in range(first, int(high / step) + 1)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _line(x1, y1, x2, y2) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _text(x, y, text: str, anchor: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{html.escape(text)}</text>'
    )
