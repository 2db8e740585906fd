"""One self-contained page about a comparison of methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from fulltune.report.charts import Whisker, interval_chart
from fulltune.report.report import write_page
from fulltune.tracking import format_number


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_compare_page(
    output: Path,
    *,
    title: str,
    lead: str,
    tables: Sequence[Table],
    intervals: Sequence[tuple[str, float, float]],
    unit: str,
) -> Path:
    """Write the page.

    Args:
        output: the file.
        title: what was compared.
        lead: how, in a few sentences.
        tables: what was measured.
        intervals: name, mean and half the width of its interval, drawn below one another.
        unit: what they are.

    Raises:
        RunFolderError: it cannot be written.
    """
    chart = Markup(interval_chart([_whisker(*row) for row in intervals], title=unit))
    return write_page(
        output,
        "compare.html.j2",
        {"title": title, "lead": lead, "tables": tables, "chart": chart},
    )


def _whisker(name: str, mean: float, half: float) -> Whisker:
    known = half if math.isfinite(half) else 0.0
    shown = f"{format_number(mean)} ± {format_number(known)}" if known else format_number(mean)
    return Whisker(name, mean, mean - known, mean + known, shown, shown)
