"""The preview as one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from fulltune.data.preview_facts import Finding, PreviewFacts, SplitFacts
from fulltune.data.preview_view import (
    MEANINGS,
    SampleView,
    arranged_rows_of,
    label_rows_of,
    rows_of,
    runs_of,
    states_of,
    visible,
)

_PAGE_RUN = 600


@dataclass(frozen=True, slots=True)
class Column:
    """A bar of the drawn histogram, in units of its view box."""

    x: float
    y: float
    width: float
    height: float
    title: str


def render_html(
    facts: PreviewFacts,
    findings: Sequence[Finding],
    samples: Sequence[SampleView],
    *,
    title: str = "What is trained on",
) -> str:
    """The preview as one page that needs nothing else: light and dark, on a phone too."""
    label_rows, num_more_labels = label_rows_of(facts)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fulltune.data", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("preview.html.j2").render(
        title=title,
        facts=facts,
        findings=findings,
        rows=rows_of(facts),
        arranged_rows=arranged_rows_of(facts),
        label_rows=label_rows,
        num_more_labels=num_more_labels,
        histograms=[(split, length_columns(split)) for split in facts.splits if split.lengths],
        samples=[(sample, runs_of(sample.tokens, limit=_PAGE_RUN)) for sample in samples],
        states=[(state, MEANINGS[state]) for state in states_of(samples)],
        visible=visible,
    )


def length_columns(split: SplitFacts) -> list[Column]:
    """Bars within a box of 480 by 120; an example or more is always a visible bar."""
    assert split.lengths is not None
    bars = split.lengths.histogram
    most = max(bar.count for bar in bars)
    step = 480 / len(bars)
    columns = []
    for number, bar in enumerate(bars):
        height = max(120 * bar.count / most, 1.5) if bar.count else 0
        examples = f"{bar.count:,} example{'' if bar.count == 1 else 's'}"
        tokens = (
            f"{bar.low:,} to {bar.high - 1:,} tokens"
            if bar.high - bar.low > 1
            else f"{bar.low:,} tokens"
        )
        columns.append(
            Column(
                x=round(number * step + 0.5, 2),
                y=round(120 - height, 2),
                width=round(step - 1, 2),
                height=round(height, 2),
                title=f"{tokens}: {examples}",
            )
        )
    return columns
