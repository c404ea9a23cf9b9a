"""Charts of the run's page as inline SVG: plain numbers in, text out; colours follow the page's light or dark style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from coreg.webpage import text

WIDTH, HEIGHT = 400, 220  # of a chart's own coordinates: near the pixels it gets on a phone and in a row of two
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 26
COLOURS = "abcdef"  # of the page's style
MOST_POINTS = 240  # of a line; more cannot be seen
BINS = 50
LONGEST_NAME = 20  # beside an interval, in letters
STYLE = """
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1.6rem 2rem;margin:1rem 0}
.chart h3{margin:0 0 .1rem}.chart svg{display:block;width:100%;height:auto}
.chart .keys{display:flex;flex-wrap:wrap;gap:0 1rem;font-size:.8125rem;color:var(--muted);min-height:1.4rem}
.key::before{content:"";display:inline-block;width:.9rem;height:.2rem;margin-right:.35rem;vertical-align:.22rem;
background:var(--k)}
.key.block::before{height:.7rem;width:.7rem;vertical-align:-.06rem;opacity:.75}
.key b{color:var(--ink);font-weight:600}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--muted)}
.grid{stroke:var(--rule);stroke-width:1}.phase{fill:var(--panel)}
.line{fill:none;stroke:var(--k);stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.line.thin{stroke-width:1.5;opacity:.8}.line.dashed{stroke-dasharray:5 4;stroke-width:1.5}
svg .name{fill:var(--ink);font-weight:600;font-size:12px}
.dot{fill:var(--k)}.block{fill:var(--k);opacity:.75}
"""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    values: np.ndarray  # a value for every epoch, NaN where there is none
    colour: str  # one of `COLOURS`, or `muted`
    kind: str = ""  # thin or dashed


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high], at most `most` of them, at steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    for step in (m * power for m in (1, 2, 5, 10, 20, 50)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [number * step for number in range(first, last + 1)]


def _frame(title: str, keys: str, description: str, drawn: str) -> str:
    return (
        f'<figure class="chart"><h3>{text(title)}</h3><div class="keys">{keys}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(description)}">{drawn}</svg></figure>'
    )


def _axis_y(ticks: Sequence[float], place: Callable[[float], float], form: Callable[[float], str]) -> str:
    lines = []
    for tick in ticks:
        y = place(tick)
        lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text(form(tick))}</text>')
    return "".join(lines)


def _axis_x(ticks: Sequence[float], place: Callable[[float], float], unit: str) -> str:
    lines = [f'<text x="{LEFT - 12}" y="{HEIGHT - 8}" text-anchor="end">{text(unit)}</text>']
    for tick in ticks:
        lines.append(f'<text x="{place(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{tick:g}</text>')
    return "".join(lines)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def line_chart(title: str, lines: Sequence[Line], shares: bool, since: int = 0) -> str:
    """Lines over epochs, with what they end at as their legend; empty where no line has a value.

    Args:
        shares: values are in [0, 1] and written in percent. since: epochs before the first division, shaded; 0 for none.
    """
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return ""
    every = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    low, high = float(every.min()), float(every.max())
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = (low if low == 0 else low - margin), high + margin
    epochs = max(len(line.values) for line in lines)
    x, y = _scale(1, epochs, LEFT, WIDTH - RIGHT), _scale(low, high, HEIGHT - BOTTOM, TOP)
    form = (lambda value: f"{value:.1%}") if shares else (lambda value: f"{value:.3g}")
    drawn, keys, description = [], [], []
    if since:
        width = min(x(since + 0.5), WIDTH - RIGHT) - LEFT
        drawn.append(f'<path class="phase" d="M{LEFT} {TOP}h{width:.1f}V{HEIGHT - BOTTOM}H{LEFT}z"/>')
    ticks = [tick for tick in nice_ticks(low, high) if not shares or tick <= 1]
    drawn.append(_axis_y(ticks, y, (lambda tick: f"{100 * tick:g}%") if shares else (lambda tick: f"{tick:g}")))
    drawn.append(_axis_x([tick for tick in nice_ticks(0, epochs, 7) if tick >= 1 and tick == int(tick)], x, "epoch"))
    for line in reversed(lines):  # the first lies on top
        rows = np.flatnonzero(np.isfinite(line.values))
        first, last = line.values[rows[0]], line.values[rows[-1]]
        shown = np.unique(np.concatenate([rows[:: max(1, len(rows) // MOST_POINTS)], rows[-1:]]))
        points = " ".join(f"{x(row + 1):.1f},{y(line.values[row]):.1f}" for row in shown)
        style = f'style="--k:var(--{line.colour})"'
        drawn.append(f'<polyline class="line {line.kind}" {style} points="{points}"/>')
        if line.kind != "dashed":
            drawn.append(f'<circle class="dot" {style} cx="{x(rows[-1] + 1):.1f}" cy="{y(last):.1f}" r="3"/>')
        keys.append(f'<span class="key" {style}>{text(line.name)} <b>{form(last)}</b></span>')
        description.append(f"{line.name} from {form(first)} in epoch {rows[0] + 1} to {form(last)} in epoch {rows[-1] + 1}")
    return _frame(title, "".join(keys[::-1]), f"{title}: {'; '.join(description[::-1])}", "".join(drawn))


def mixture_chart(title: str, losses: np.ndarray, trusted: np.ndarray, parts: Sequence[tuple[float, float, float]]) -> str:
    """Histogram of division losses, P and U on top of each other, and the two normal distributions fitted to them.

    The height is the root of the count, because a few hard images are of interest beside thousands of easy ones.

    Args:
        losses: (N,) in [0, 1], NaN for images that were left out. trusted: bool (N,).
        parts: mean, standard deviation and share of each component; empty where nothing was fitted.
    """
    fitted = np.isfinite(losses)
    edges = np.linspace(0, max(1e-6, float(losses[fitted].max(initial=0))), BINS + 1)
    p, u = (np.histogram(losses[fitted & rows], edges)[0] for rows in (trusted, ~trusted))
    highest = max(1, int((p + u).max()))
    middle, wide = np.linspace(edges[0], edges[-1], 161), edges[1] - edges[0]
    curves = []
    for mean, deviation, share in parts:
        density = np.exp(-0.5 * ((middle - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
        curves.append(share * fitted.sum() * wide * density)
    top = max([highest, *(curve.max() for curve in curves)])
    x, root = _scale(0, edges[-1], LEFT, WIDTH - RIGHT), _scale(0, math.sqrt(top) * 1.04, HEIGHT - BOTTOM, TOP)

    def y(count: float) -> float:
        return root(math.sqrt(count))

    ticks = [round(tick**2) for tick in nice_ticks(0, math.sqrt(top), 5)]
    drawn = [_axis_y(ticks, y, lambda n: f"{n:,.0f}"), _axis_x(nice_ticks(0, edges[-1], 6), x, "loss")]
    for below, counts, colour in ((0 * p, p, "a"), (p, u, "b")):
        for left, lower, count in zip(edges, below, counts):
            if count:
                high, box = y(lower + count), x(left + wide) - x(left) - 0.8
                drawn.append(
                    f'<rect class="block" style="--k:var(--{colour})" x="{x(left):.1f}" y="{high:.1f}" '
                    f'width="{box:.1f}" height="{y(lower) - high:.1f}"/>'
                )
    for curve in curves:
        points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in zip(middle, curve))
        drawn.append(f'<polyline class="line thin" style="--k:var(--ink)" points="{points}"/>')
    named = (("a", "trusted, P", fitted & trusted), ("b", "distrusted, U", fitted & ~trusted))
    keys = "".join(
        f'<span class="key block" style="--k:var(--{k})">{name} <b>{rows.sum():,}</b></span>' for k, name, rows in named
    )
    if parts:
        keys += '<span class="key" style="--k:var(--ink)">mixture</span>'
    description = "; ".join(f"{rows.sum()} images {name}" for _, name, rows in named)
    description += "".join(f"; component of share {share:.0%} around {mean:.2f}" for mean, _, share in parts)
    return _frame(title, keys, f"{title}: {description}", "".join(drawn))


@dataclass(frozen=True)
class Interval:
    """An accuracy with its interval."""

    name: str
    share: float  # this and the bounds in [0, 1]
    low: float
    high: float
    colour: str  # as of `Line`


def interval_chart(rows: Sequence[Interval]) -> str:
    """Accuracies below each other on one axis."""
    names = [row.name if len(row.name) <= LONGEST_NAME else row.name[: LONGEST_NAME - 1] + "…" for row in rows]
    line, left, right = 26, max(map(len, names)) * 8 + 16, 52
    height = line * len(rows) + 24
    low = max(0.0, math.floor(10 * min(row.low for row in rows)) / 10)
    high = min(1.0, math.ceil(10 * max(row.high for row in rows)) / 10)
    x = _scale(low, high, left, WIDTH - right)
    drawn = []
    for tick in nice_ticks(low, high, 6):
        drawn.append(f'<path class="grid" d="M{x(tick):.1f} 2V{height - 22}"/>')
        drawn.append(f'<text x="{x(tick):.1f}" y="{height - 7}" text-anchor="middle">{tick:.0%}</text>')
    for number, (name, row) in enumerate(zip(names, rows)):
        y, style = line * (number + 0.5) + 1, f'style="--k:var(--{row.colour})"'
        drawn.append(f'<text class="name" x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{text(name)}</text>')
        drawn.append(f'<path class="line" {style} d="M{x(row.low):.1f} {y:.1f}H{x(row.high):.1f}"/>')
        drawn.append(f'<circle class="dot" {style} cx="{x(row.share):.1f}" cy="{y:.1f}" r="5"/>')
        drawn.append(f'<text class="name" x="{WIDTH}" y="{y + 4:.1f}" text-anchor="end">{row.share:.1%}</text>')
    description = "; ".join(f"{row.name} {row.share:.1%}, from {row.low:.1%} to {row.high:.1%}" for row in rows)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text(description)}">{"".join(drawn)}</svg>'


@dataclass(frozen=True)
class Curve:
    """Precision at each recall."""

    recall: np.ndarray  # (m,) in [0, 1], increasing
    precision: np.ndarray  # (m,) in [0, 1]
    colour: str  # as of `Line`
    kind: str = ""  # as of `Line`


def precision_chart(title: str, curves: Sequence[Curve], at: tuple[float, float] | None) -> str:
    """Precision over recall in a small square chart with half steps.

    Args:
        at: recall and precision where the threshold stands; None for none.
    """
    side, left, right, bottom = 150, 26, 10, 18  # half of the number below stands out on the right
    x, y = _scale(0, 1, left, side - right), _scale(0, 1, side - bottom, 6)
    drawn = []
    for tick in (0.0, 0.5, 1.0):
        drawn.append(f'<path class="grid" d="M{left} {y(tick):.1f}H{side - right}M{x(tick):.1f} 6V{side - bottom}"/>')
        drawn.append(f'<text x="{left - 4}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:g}</text>')
        drawn.append(f'<text x="{x(tick):.1f}" y="{side - 4}" text-anchor="middle">{100 * tick:g}</text>')
    for curve in reversed(curves):  # the first lies on top
        shown = np.unique(np.linspace(0, len(curve.recall) - 1, MOST_POINTS).astype(int))
        points = " ".join(f"{x(curve.recall[i]):.1f},{y(curve.precision[i]):.1f}" for i in shown)
        drawn.append(f'<polyline class="line {curve.kind}" style="--k:var(--{curve.colour})" points="{points}"/>')
    if at is not None:
        drawn.append(f'<circle class="dot" style="--k:var(--ink)" cx="{x(at[0]):.1f}" cy="{y(at[1]):.1f}" r="3.5"/>')
    where = "" if at is None else f"; at the threshold precision {at[1]:.0%} and recall {at[0]:.0%}"
    return (
        f'<figure class="pr"><figcaption>{text(title)}</figcaption><svg viewBox="0 0 {side} {side}" role="img" '
        f'aria-label="{text(f"precision over recall of {title}{where}")}">{"".join(drawn)}</svg></figure>'
    )
