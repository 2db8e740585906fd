"""The reliability of probabilities as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fulltune.report.charts import svg


def reliability_chart(bins: Sequence[Mapping[str, Any]]) -> str:
    """How often the predicted label is right, for each range of its probability.

    A bar for each bin, with the area of its dot by its number of examples; on the diagonal
    probabilities are what they say.
    """
    if not bins:
        return ""
    left, top, size = 52, 10, 330
    largest = max(each["count"] for each in bins)

    def x_of(share: float) -> float:
        return left + share * size

    def y_of(share: float) -> float:
        return top + (1 - share) * size

    parts = []
    for tick in range(0, 101, 20):
        share = tick / 100
        parts.append(
            f'<line class="grid" x1="{left}" x2="{left + size}" y1="{y_of(share):.1f}" '
            f'y2="{y_of(share):.1f}"/><text class="tick" x="{left - 8}" y="{y_of(share) + 4:.1f}" '
            f'text-anchor="end">{tick}%</text><text class="tick" x="{x_of(share):.1f}" '
            f'y="{top + size + 17}" text-anchor="middle">{tick}%</text>'
        )
    for each in bins:
        width = x_of(each["high"]) - x_of(each["low"])
        tip = (
            f"{each['count']:,} examples given with {each['low']:.0%} to {each['high']:.0%}, "
            f"{each['confidence']:.1%} on the mean: {each['accuracy']:.1%} right"
        )
        height = max(1.0, y_of(0) - y_of(each["accuracy"]))
        radius = 2 + 6 * (each["count"] / largest) ** 0.5
        parts.append(
            f'<g><title>{escape(tip)}</title><rect class="bar soft" '
            f'x="{x_of(each["low"]) + 1:.1f}" y="{y_of(0) - height:.1f}" '
            f'width="{width - 2:.1f}" height="{height:.1f}"/>'
            f'<circle class="dot series-0" cx="{x_of(each["confidence"]):.1f}" '
            f'cy="{y_of(each["accuracy"]):.1f}" r="{radius:.1f}"/></g>'
        )
    parts.append(
        f'<line class="diagonal" x1="{x_of(0)}" y1="{y_of(0)}" x2="{x_of(1)}" y2="{y_of(1)}"/>'
        f'<text class="axis" x="{left + size}" y="{top + size + 36}" text-anchor="end">'
        "probability of the predicted label</text>"
        f'<text class="axis" x="{left + 6}" y="{top + 12}">right</text>'
    )
    summary = "; ".join(
        f"{each['confidence']:.0%} given, {each['accuracy']:.0%} right of {each['count']:,}"
        for each in bins
    )
    return svg(
        parts, "Reliability", summary, f"{left + size + 20} {top + size + 44}", "reliability"
    )
