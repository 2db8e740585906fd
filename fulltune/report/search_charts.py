"""Charts of a search as SVG text: the course of the trials, parallel coordinates, a range test.

As in `charts.py`, colours are CSS variables of the page, and nothing is averaged away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fulltune.config import written_value
from fulltune.report.charts import nice_ticks, shorten, tick_text
from fulltune.report.search_record import RangeTest, Scale, SearchRecord, TrialRecord
from fulltune.report.words import metric_text
from fulltune.tracking import format_number, name_of

_WIDTH, _HEIGHT = 520, 276
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 28, 42
_AXIS_GAP = 190
"""Between two axes of the parallel coordinates."""


def history_chart(record: SearchRecord) -> str:
    """The result of each trial in their order, and the best so far; empty without results."""
    shown = [
        trial for trial in record.trials
        if trial.result is not None and math.isfinite(trial.result)
    ]  # fmt: skip
    if not shown:
        return ""
    low, high = _range([trial.result or 0.0 for trial in shown])
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    last = max(1, max(trial.number for trial in record.trials))

    def x(number: float) -> float:
        return _LEFT + 8 + number / last * (_WIDTH - _LEFT - _RIGHT - 16)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = _grid([(y(tick), tick_text(tick, ticks[1] - ticks[0])) for tick in ticks])
    for tick in nice_ticks(0, last):
        if tick == int(tick) and 0 <= tick <= last:
            parts.append(_x_tick(x(tick), f"{tick:g}"))
    parts.append(_axis_names("trial", name_of(record.metric)))
    sign = 1 if record.better == "higher" else -1
    path, best = "", None
    for trial in shown:
        result = trial.result or 0.0
        if trial.state == "finished" and (best is None or sign * result > sign * best):
            path += (
                f"M{x(trial.number):.1f} {y(result):.1f}"
                if best is None
                else (f"H{x(trial.number):.1f}V{y(result):.1f}")
            )
            best = result
    if path:
        parts.append(f'<path class="line series-1" d="{path}H{x(last):.1f}"/>')
    for trial in shown:
        parts.append(
            f'<circle class="dot series-0 {_style(record, trial)}" cx="{x(trial.number):.1f}" '
            f'cy="{y(trial.result or 0.0):.1f}" r="{5 if trial.number == record.best else 3.5}">'
            f"<title>{escape(_said(record, trial))}</title></circle>"
        )
    return _svg(parts, "The trials in their order", _WIDTH, _HEIGHT, "line-chart")


def parallel_chart(record: SearchRecord) -> str:
    """One line for each trial over an axis for each setting and one for the result."""
    shown = [
        trial for trial in record.trials
        if trial.result is not None and math.isfinite(trial.result)
    ]  # fmt: skip
    if len(shown) < 2:
        return ""
    names = list(record.scales)
    low, high = _range([trial.result or 0.0 for trial in shown])
    scales = [*record.scales.values(), Scale(low, high)]
    top, bottom, left = 44, 300, 70
    width = left * 2 + _AXIS_GAP * len(names)

    def y(share: float) -> float:
        return bottom - share * (bottom - top)

    parts = []
    for index, name in enumerate([*names, name_of(record.metric)]):
        x = left + index * _AXIS_GAP
        parts.append(
            f'<line class="grid strong" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>'
            f'<text class="axis" x="{x}" y="{18}" text-anchor="middle">'
            f"{escape(shorten(name, 22))}<title>{escape(name)}</title></text>"
        )
        for share, text in _ticks(scales[index]):
            parts.append(
                f'<text class="tick" x="{x + 6}" y="{y(share) + 4:.1f}">'
                f"{escape(shorten(text, 16))}<title>{escape(text)}</title></text>"
            )
    ordered = sorted(shown, key=lambda trial: trial.number == record.best)
    for trial in ordered:
        result = trial.result or 0.0
        shares = [
            *(_share(record.scales[name], trial.values.get(name)) for name in names),
            _share(scales[-1], result),
        ]
        path = "".join(
            f"{'M' if index == 0 else 'L'}{left + index * _AXIS_GAP} {y(share):.1f}"
            for index, share in enumerate(shares)
        )
        quality = (shares[-1] if record.better == "higher" else 1 - shares[-1]) ** 2
        is_best = trial.number == record.best
        opacity = 1.0 if is_best else 0.12 + 0.7 * quality
        parts.append(
            f'<path class="line trial {"series-1" if is_best else "series-0"} '
            f'{_style(record, trial)}" d="{path}" style="opacity:{opacity:.2f}">'
            f"<title>{escape(_said(record, trial))}</title></path>"
        )
    style = f"max-width: {1.2 * width:.0f}px"
    return _svg(parts, "Parallel coordinates", width, bottom + 14, "parallel", style)


def range_chart(test: RangeTest) -> str:
    """The loss over the rising learning rate, and the range that follows from it."""
    if len(test.losses) < 2:
        return ""
    low, high = _range(test.smoothed)
    high += 0.25 * (high - low)  # single steps above it are drawn at the edge
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = math.log10(test.rates[0]), math.log10(test.rates[-1])

    def x(rate: float) -> float:
        share = (math.log10(rate) - first) / (last - first)
        return _LEFT + min(max(share, 0.0), 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = _grid([(y(tick), tick_text(tick, ticks[1] - ticks[0])) for tick in ticks])
    for power in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1):
        parts.append(_x_tick(x(10.0**power), f"1e{power}"))
    parts.append(_axis_names("learning rate", "loss, nats per target"))
    parts.append(
        f'<rect class="band" x="{x(test.low):.1f}" y="{_TOP}" '
        f'width="{x(test.high) - x(test.low):.1f}" height="{_HEIGHT - _TOP - _BOTTOM}">'
        f"<title>searched: {format_number(test.low)} to {format_number(test.high)}</title></rect>"
    )
    for losses, style in ((test.losses, "series-0 faint"), (test.smoothed, "series-0")):
        path = "".join(
            f"{'L' if index else 'M'}{x(rate):.1f} {y(loss):.1f}"
            for index, (rate, loss) in enumerate(zip(test.rates, losses, strict=True))
        )
        parts.append(f'<path class="line {style}" d="{path}"/>')
    return _svg(parts, "Range test of the learning rate", _WIDTH, _HEIGHT, "line-chart")


def value_text(value: object) -> str:
    """A setting's value as a table has it."""
    return format_number(value) if isinstance(value, float) else written_value(value)


def _style(record: SearchRecord, trial: TrialRecord) -> str:
    return "best" if trial.number == record.best else trial.state.replace(" ", "-")


def _said(record: SearchRecord, trial: TrialRecord) -> str:
    result = metric_text(record.metric, trial.result if trial.result is not None else math.nan)
    values = ", ".join(f"{name} {value_text(value)}" for name, value in trial.values.items())
    return f"trial {trial.number}, {trial.state}: {name_of(record.metric)} {result}; {values}"


def _share(scale: Scale, value: object) -> float:
    """Where a value stands on its axis, from 0 to 1."""
    if scale.choices:
        text = written_value(value)
        place = scale.choices.index(text) if text in scale.choices else 0
        return (place + 0.5) / len(scale.choices)
    number = float(str(value).split()[0].rstrip("%"))
    low, high = scale.low, scale.high
    if scale.log:
        number, low, high = math.log(number), math.log(low), math.log(high)
    return (number - low) / (high - low) if high > low else 0.5


def _ticks(scale: Scale) -> list[tuple[float, str]]:
    if scale.choices:
        return [(_share(scale, text), text) for text in scale.choices]
    if scale.log and scale.high / scale.low >= 10:
        powers = range(
            math.ceil(math.log10(scale.low) - 1e-9), math.floor(math.log10(scale.high) + 1e-9) + 1
        )
        marks = [10.0**power for power in powers]
        inner = [mark for mark in marks if 0.07 < _share(scale, mark) < 0.93]
        return [(_share(scale, mark), f"{mark:.3g}") for mark in (scale.low, *inner, scale.high)]
    marks = [mark for mark in nice_ticks(scale.low, scale.high) if scale.low <= mark <= scale.high]
    return [(_share(scale, mark), f"{mark:.4g}") for mark in marks]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _grid(ticks: Sequence[tuple[float, str]]) -> list[str]:
    return [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        for y, text in ticks
    ]


def _x_tick(x: float, text: str) -> str:
    return (
        f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">'
        f"{escape(text)}</text>"
    )


def _axis_names(x_name: str, y_name: str) -> str:
    return (
        f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">'
        f'{escape(x_name)}</text><text class="axis" x="4" y="12">{escape(y_name)}</text>'
    )


def _svg(
    parts: Sequence[str], title: str, width: float, height: float, kind: str, style: str = ""
) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" style="{style}" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
