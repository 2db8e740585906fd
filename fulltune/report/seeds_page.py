"""What several seeds of one run gave: its records, and the page about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from markupsafe import Markup

from fulltune.report.charts import nice_ticks, tick_text
from fulltune.report.report import write_page
from fulltune.report.words import is_share, metric_text, title_of, words_of
from fulltune.tracking import format_duration, format_number


@dataclass(frozen=True)
class SeedRun:
    """A finished run of one seed."""

    seed: int
    run_dir: str
    metrics: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Spread:
    """How a metric spreads over the seeds."""

    mean: float
    deviation: float
    """Standard deviation of a sample (divided by the number of runs less one); NaN for one run."""
    low: float
    high: float
    better: Literal["lower", "higher"] | None


@dataclass(frozen=True)
class SeedsRecord:
    """The runs of several seeds so far."""

    run_dir: str
    metric: str
    """That the best weights of each run were chosen by."""
    count: int
    """Seeds that were asked for."""
    runs: Sequence[SeedRun]
    spreads: Mapping[str, Spread]

    def rows(self) -> list[tuple[str, ...]]:
        """Metric, mean, standard deviation, lowest and highest, as text."""
        return [
            (
                words_of(name),
                metric_text(name, spread.mean),
                deviation_text(name, spread.deviation),
                metric_text(name, spread.low),
                metric_text(name, spread.high),
            )
            for name, spread in self.spreads.items()
        ]


def deviation_text(metric: str, value: float) -> str:
    """A standard deviation in the unit of its metric."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.2f} points" if is_share(metric) else format_number(value)


def write_seeds_page(record: SeedsRecord, output: Path) -> Path:
    """Write the page about the seeds, of which some may be still to come.

    Raises:
        RunFolderError: the page cannot be written.
    """
    names = list(record.spreads)
    values = {
        "title": f"{len(record.runs)} of {record.count} seeds of {record.run_dir}",
        "rows": record.rows(),
        "metrics": [title_of(words_of(name)) for name in names],
        "runs": [
            (
                run.seed,
                Path(run.run_dir).name,
                [metric_text(name, run.metrics[name]) for name in names],
                format_duration(run.seconds),
            )
            for run in record.runs
        ],
        "charts": [
            (title_of(words_of(name)), Markup(chart))
            for name in names
            if (chart := _strip(name, record))
        ],
        "judged": words_of(record.metric),
    }
    return write_page(output, "seeds.html.j2", values)


def _strip(metric: str, record: SeedsRecord) -> str:
    """A dot for each seed on a line, and the mean; empty where a value is not finite."""
    values = [(run.seed, run.metrics[metric]) for run in record.runs]
    if len(values) < 2 or not all(math.isfinite(value) for _, value in values):
        return ""
    width, left, right, middle = 520, 20, 20, 30
    factor = 100.0 if is_share(metric) else 1.0
    low, high = (min(v for _, v in values) * factor, max(v for _, v in values) * factor)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    parts = [f'<line class="grid" x1="{left}" x2="{width - right}" y1="{middle}" y2="{middle}"/>']
    for tick in ticks:
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{middle + 28}" text-anchor="middle">'
            f"{tick_text(tick, ticks[1] - ticks[0])}{'%' if factor != 1 else ''}</text>"
        )
    mean = x(record.spreads[metric].mean * factor)
    parts.append(
        f'<g class="mark best"><title>mean {metric_text(metric, record.spreads[metric].mean)}'
        f'</title><line x1="{mean:.1f}" x2="{mean:.1f}" y1="8" y2="{middle + 12}"/></g>'
    )
    for seed, value in values:
        parts.append(
            f'<circle class="dot series-0" cx="{x(value * factor):.1f}" cy="{middle}" r="5">'
            f"<title>seed {seed}: {metric_text(metric, value)}</title></circle>"
        )
    label = escape(f"{title_of(words_of(metric))} of {len(values)} seeds")
    return (
        f'<svg class="strip" viewBox="0 0 {width} 66" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )
