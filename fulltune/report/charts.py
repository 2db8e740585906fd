"""Charts as SVG text: lines over steps, bars, and a heat map.

Colours are CSS variables of the page (`--series-0` ...), so that one chart serves light and dark.
Nothing is averaged away: a value off the scale or not finite is marked at the edge with its number.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from fulltune.tracking import format_number

NUM_COLOURS = 6
MAX_POINTS = 600
"""Points drawn of one line; of more, the lowest and highest of each stretch are kept."""

_ENOUGH_TO_CLIP = 50
"""Values of which two in a hundred are an exception; of fewer, all are drawn to scale."""

_WIDTH, _HEIGHT = 520, 276
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 28, 42


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False
    """A background line, such as the raw values behind their smoothed course."""
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step, drawn as an upright line with a short label."""

    x: float
    label: str
    kind: str = "note"
    """A CSS class: `spike`, `resume`, `interrupted`, `best`, `note`."""


@dataclass(frozen=True)
class Whisker:
    """A value between the ends of its interval, which are the value itself where there is none."""

    name: str
    value: float
    low: float
    high: float
    shown: str
    """The value as text, beside its line."""
    tip: str
    """The value and its interval as text."""


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    y_label: str,
    x_label: str = "step",
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
) -> str:
    """Lines over a common axis; empty text where no series has a finite point."""
    finite = [point for one in series for point in one.points if math.isfinite(point[1])]
    if not finite:
        return ""
    x_low, x_high = _widen(min(x for x, _ in finite), max(x for x, _ in finite))
    y_low, y_high = _y_range([y for _, y in finite], from_zero=from_zero)
    y_ticks = nice_ticks(y_low, y_high)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def place_x(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def place_y(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = _axes(nice_ticks(x_low, x_high), y_ticks, place_x, place_y, (x_low, x_high))
    parts.append(_axis_labels(x_label, y_label))
    for mark in marks:
        if x_low <= mark.x <= x_high:
            parts.append(_draw_mark(mark, place_x(mark.x)))
    hover: list[dict[str, object]] = []
    for one in series:
        points = thin(one.points, MAX_POINTS)
        parts.extend(_draw_line(one, points, place_x, place_y, (y_low, y_high)))
        if not one.faint:
            hover.append(
                {
                    "name": one.name,
                    "colour": one.colour % NUM_COLOURS,
                    "points": [[round(place_x(x), 1), x, format_number(y)] for x, y in points],
                }
            )
    return svg(
        parts, title, _summary(series, y_label), f"{_WIDTH} {_HEIGHT}", "line-chart", hover=hover
    )


def bar_chart(
    bars: Sequence[tuple[str, float]],
    *,
    title: str,
    show: Callable[[float], str] = format_number,
) -> str:
    """Horizontal bars from zero, each with its number; empty text where there are none."""
    bars = [(label, value) for label, value in bars if math.isfinite(value)]
    if not bars:
        return ""
    row_height, label_width, number_width = 24, 150, 76
    longest = max((abs(value) for _, value in bars), default=0.0) or 1.0
    room = _WIDTH - label_width - number_width
    parts = []
    for row, (label, value) in enumerate(bars):
        top = row * row_height + 4
        length = max(1.0, abs(value) / longest * room)
        middle = top + 13
        parts.append(
            f'<text class="tick" x="{label_width - 8}" y="{middle}" text-anchor="end">'
            f"{escape(shorten(label, 22))}<title>{escape(label)}</title></text>"
            f'<rect class="bar" x="{label_width}" y="{top}" width="{length:.1f}" height="17">'
            f"<title>{escape(label)}: {escape(show(value))}</title></rect>"
            f'<text class="tick" x="{label_width + length + 6:.1f}" y="{middle}">'
            f"{escape(show(value))}</text>"
        )
    summary = "; ".join(f"{label} {show(value)}" for label, value in bars[:12])
    return svg(parts, title, summary, f"{_WIDTH} {len(bars) * row_height + 8}", "bar-chart")


def interval_chart(rows: Sequence[Whisker], *, title: str) -> str:
    """Values with their intervals below one another, on one scale that need not begin at zero."""
    rows = [row for row in rows if math.isfinite(row.value)]
    if not rows:
        return ""
    low, high = _widen(min(row.low for row in rows), max(row.high for row in rows))
    row_height, left, right, top = 30, 150, 90, 26

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (_WIDTH - left - right)

    parts = [f'<text class="axis" x="4" y="14">{escape(title)}</text>']
    for number, row in enumerate(rows):
        y = top + row_height * number + 14
        parts.append(
            f'<text class="tick" x="{left - 12}" y="{y + 4}" text-anchor="end">'
            f"{escape(shorten(row.name, 22))}</text>"
            f'<line class="grid" x1="{left}" x2="{_WIDTH - right}" y1="{y}" y2="{y}"/>'
            f'<g class="series-0"><path class="line series-0" '
            f'd="M{place(row.low):.1f} {y}H{place(row.high):.1f}"/>'
            f'<circle class="dot series-0" cx="{place(row.value):.1f}" cy="{y}" r="5">'
            f"<title>{escape(row.name)}: {escape(row.tip)}</title></circle></g>"
            f'<text class="tick" x="{_WIDTH - right + 8}" y="{y + 4}">{escape(row.shown)}</text>'
        )
    summary = "; ".join(f"{row.name} {row.tip}" for row in rows)
    height = top + row_height * len(rows) + 6
    return svg(parts, title, summary, f"{_WIDTH} {height}", "interval-chart")


def heat_map(labels: Sequence[str], rows: Sequence[Sequence[float]], *, title: str) -> str:
    """A confusion matrix: true label down, predicted label across, shaded by the share of a row."""
    if not labels:
        return ""
    left, top, size = 130, 96, 460
    cell = max(16.0, min(58.0, (size - left) / len(labels)))
    width, height = left + cell * len(labels) + 44, top + cell * len(labels) + 8
    parts = [
        f'<text class="axis" x="{left}" y="14">predicted →</text>',
        f'<text class="axis" x="{left - 8}" y="{top - 8}" text-anchor="end">true ↓</text>',
    ]
    for index, label in enumerate(labels):
        centre = index * cell + cell / 2
        name = escape(shorten(label, 15))
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{top + centre + 4:.1f}" text-anchor="end">'
            f"{name}<title>{escape(label)}</title></text>"
            f'<text class="tick" transform="translate({left + centre + 4:.1f} {top - 8}) '
            f'rotate(-45)">{escape(shorten(label, 12))}<title>{escape(label)}</title></text>'
        )
    for row, counts in enumerate(rows):
        total = sum(counts)
        for column, count in enumerate(counts):
            share = count / total if total else 0.0
            tip = f"true {labels[row]}, predicted {labels[column]}: {count:g} ({share:.1%})"
            x, y = left + column * cell, top + row * cell
            kind = "hit" if row == column else "miss"
            parts.append(
                f'<g><title>{escape(tip)}</title><rect class="cell-back" x="{x:.1f}" y="{y:.1f}" '
                f'width="{cell - 2:.1f}" height="{cell - 2:.1f}"/>'
                f'<rect class="cell {kind}" x="{x:.1f}" y="{y:.1f}" width="{cell - 2:.1f}" '
                f'height="{cell - 2:.1f}" fill-opacity="{share**0.7:.3f}"/>'
            )
            if cell >= 24:
                strong = " strong" if share > 0.45 else ""
                parts.append(
                    f'<text class="count{strong}" x="{x + cell / 2 - 1:.1f}" '
                    f'y="{y + cell / 2 + 3:.1f}" text-anchor="middle">{count:g}</text>'
                )
            parts.append("</g>")
    right = sum(row[index] for index, row in enumerate(rows))
    summary = f"{right:g} of {sum(map(sum, rows)):g} on the diagonal"
    return svg(parts, title, summary, f"{width:.0f} {height:.0f}", "heat-map")


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Median of the `window` values around each; without values that are not finite.

    A median, for a mean would draw a single spike as a slow decay that never was.
    """
    finite = [point for point in points if math.isfinite(point[1])]
    half = window // 2
    ordered: list[float] = sorted(y for _, y in finite[:half])
    result = []
    for index, (x, _) in enumerate(finite):
        if index + half < len(finite):
            insort(ordered, finite[index + half][1])
        if index - half > 0:
            del ordered[bisect_left(ordered, finite[index - half - 1][1])]
        middle = len(ordered) // 2
        low = ordered[middle] if len(ordered) % 2 else ordered[middle - 1]
        result.append((x, (low + ordered[middle]) / 2))
    return result


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers at equal distance that span `low` to `high`."""
    low, high = _widen(low, high)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [index * distance for index in range(first, last + 1)]


def thin(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most about `limit` points, with the lowest and highest of every stretch among them."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(len(points) / (limit // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        odd = [point for point in part if not math.isfinite(point[1])]
        finite = [point for point in part if math.isfinite(point[1])]
        ends = (min(finite, key=_y_of), max(finite, key=_y_of)) if finite else ()
        kept.extend(sorted({*odd[:1], *ends}, key=lambda point: point[0]))
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def shorten(text: str, length: int) -> str:
    """The text, or its beginning with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _y_of(point: tuple[float, float]) -> float:
    return point[1]


def _widen(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _y_range(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    """The range of the values, but a few that tower over the rest do not flatten the others."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual_low = ordered[int(0.02 * (len(ordered) - 1))]
    usual_high = ordered[int(0.98 * (len(ordered) - 1))]
    spread = usual_high - usual_low
    if len(ordered) >= _ENOUGH_TO_CLIP and spread > 0 and high > usual_high + 2 * spread:
        high = usual_high + 0.3 * spread
    if from_zero:
        low = min(0.0, low)
    return _widen(low, high)


def _axes(
    x_ticks: Iterable[float],
    y_ticks: Sequence[float],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    x_range: tuple[float, float],
) -> list[str]:
    parts = []
    distance = y_ticks[1] - y_ticks[0]
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{tick_text(tick, distance)}</text>"
        )
    inside = [tick for tick in x_ticks if x_range[0] <= tick <= x_range[1] and tick == int(tick)]
    for tick in inside:
        parts.append(
            f'<text class="tick" x="{place_x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 17}" '
            f'text-anchor="middle">{tick_text(tick, 1)}</text>'
        )
    return parts


def tick_text(tick: float, distance: float) -> str:
    """A tick with as many decimals as the distance between ticks asks for."""
    if tick == 0:
        return "0"
    if abs(distance) < 0.0005 or abs(tick) >= 1e7:
        mantissa, exponent = f"{tick:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    decimals = max(0, -math.floor(math.log10(abs(distance)) + 1e-9))
    if abs(distance * 10**decimals - round(distance * 10**decimals)) > 1e-6:
        decimals += 1  # a distance of 0.25
    return f"{tick:,.{decimals}f}"


def _axis_labels(x_label: str, y_label: str) -> str:
    return (
        f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" x="{4}" y="12">{escape(y_label)}</text>'
    )


def _draw_mark(mark: Mark, x: float) -> str:
    return (
        f'<g class="mark {escape(mark.kind)}">'
        f"<title>{escape(mark.label)} at step {mark.x:g}</title>"
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        f'<circle cx="{x:.1f}" cy="{_TOP}" r="4"/></g>'
    )


def _draw_line(
    series: Series,
    points: Sequence[tuple[float, float]],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    y_range: tuple[float, float],
) -> list[str]:
    """The line, broken where a value is not finite, and a mark where one lies off the scale."""
    colour = f"series-{series.colour % NUM_COLOURS}"
    style = f"{colour} faint" if series.faint else colour
    parts, path, pen_down = [], [], False
    for x, y in points:
        if not math.isfinite(y):
            pen_down = False
            parts.append(_off_scale(place_x(x), _TOP, f"{series.name}: {format_number(y)}", x))
            continue
        if y > y_range[1]:
            parts.append(_off_scale(place_x(x), _TOP, f"{series.name}: {format_number(y)}", x))
        clamped = min(max(y, y_range[0]), y_range[1])
        path.append(f"{'L' if pen_down else 'M'}{place_x(x):.1f} {place_y(clamped):.1f}")
        pen_down = True
    parts.insert(0, f'<path class="line {style}" d="{"".join(path)}"/>')
    if series.dots or len(points) == 1:
        for x, y in points:
            if math.isfinite(y) and y <= y_range[1]:
                parts.append(
                    f'<circle class="dot {colour}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" '
                    f'r="3.5"><title>{escape(series.name)} {escape(format_number(y))} at step {x:g}'
                    "</title></circle>"
                )
    return parts


def _off_scale(x: float, y: float, label: str, step: float) -> str:
    return (
        f'<path class="off-scale" d="M{x - 4:.1f} {y + 9:.1f}L{x:.1f} {y + 2:.1f}'
        f'L{x + 4:.1f} {y + 9:.1f}Z"><title>{escape(label)} at step {step:g}</title></path>'
    )


def _summary(series: Sequence[Series], y_label: str) -> str:
    """What the chart shows, for a reader who cannot see it."""
    parts = []
    for one in series:
        finite = [y for _, y in one.points if math.isfinite(y)]
        if finite and not one.faint:
            first, last = format_number(finite[0]), format_number(finite[-1])
            parts.append(f"{one.name} from {first} to {last} {y_label}")
    return "; ".join(parts)


def svg(
    parts: Sequence[str],
    title: str,
    summary: str,
    size: str,
    kind: str,
    *,
    hover: Sequence[dict[str, object]] = (),
) -> str:
    """A picture with its title, and with what it shows in words for a reader who cannot see it."""
    data = f' data-hover="{escape(json.dumps(hover, ensure_ascii=False))}"' if hover else ""
    label = f"{title}: {summary}" if summary else title
    return (
        f'<svg class="{kind}" viewBox="0 0 {size}" role="img" aria-label="{escape(label)}"{data}>'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
