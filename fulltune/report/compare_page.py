"""One self-contained page about a comparison of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from fulltune.report.charts import interval_chart
from fulltune.report.report import write_page


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
    chart = Markup(interval_chart(intervals, title=unit))
    return write_page(
        output,
        "compare.html.j2",
        {"title": title, "lead": lead, "tables": tables, "chart": chart},
    )
