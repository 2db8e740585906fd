"""What a comparison says: its table, its findings in words, and its page."""

from __future__ import annotations

import math
from pathlib import Path

from fulltune.evaluate.metrics import METRICS
from fulltune.recipes.compare import Comparison, Config, MethodResult
from fulltune.report.compare_page import Table, write_compare_page
from fulltune.tracking import format_bytes, format_duration, format_number, name_of

PAGE = "compare.html"
HEADERS = ("method", "on the test split", "rate", "weights trained", "peak memory", "time")


def rows_of(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row for each method."""
    return [
        (
            method.method,
            _value(method),
            f"{method.rate:g}",
            f"{method.num_trained:,} ({method.num_trained / max(1, method.num_parameters):.1%})",
            format_bytes(method.peak_bytes),
            format_duration(method.seconds),
        )
        for method in comparison.methods
    ]


def findings(comparison: Comparison) -> list[str]:
    """Whether training all weights is better than each other method, and how sure that is."""
    full = next((method for method in comparison.methods if method.method == "all"), None)
    if full is None:
        return []
    sign = 1 if METRICS[comparison.metric].better == "higher" else -1
    sentences = []
    for other in comparison.methods:
        if other is full:
            continue
        difference = sign * (full.mean - other.mean)
        verb = "better" if difference > 0 else "worse"
        if math.isfinite(full.half_width + other.half_width):
            apart = abs(difference) > full.half_width + other.half_width
            sure = "the intervals do not overlap" if apart else "the intervals overlap"
        else:
            sure = "one seed tells nothing of chance"
        sentences.append(
            f"all weights against {other.method}: {verb} by {format_number(abs(difference))} "
            f"{name_of(comparison.metric)}; {sure}"
        )
    return sentences


def write(comparison: Comparison, config: Config, folder: Path) -> Path:
    """Write the page of a comparison into its folder."""
    runs = [
        (
            run.method,
            f"{run.rate:g}",
            str(run.seed),
            format_number(run.validation),
            format_number(run.test[comparison.metric]) if run.test else "failed",
            format_duration(run.seconds) if run.test else "",
        )
        for run in comparison.runs
    ]
    metric = name_of(comparison.metric)
    seeds = f"{config.seeds} seed{'s' if config.seeds > 1 else ''}"
    lead = (
        f"{config.finetune['model']}, {config.finetune.get('duration', 'default duration')}. Each "
        f"method chose its rate by the validation split, of {len(config.rates)} tried, and then "
        f"ran with {seeds}; the table shows the mean of {metric} on the test split, which no "
        "choice looked at, with the 95 % interval of Student's t over the seeds. "
        + ". ".join(findings(comparison))
    )
    return write_compare_page(
        folder / PAGE,
        title=f"Methods compared: {folder.name}",
        lead=lead,
        tables=[
            Table("Methods", HEADERS, rows_of(comparison)),
            Table(
                "All runs",
                ("method", "rate", "seed", f"validation {metric}", f"test {metric}", "time"),
                runs,
            ),
        ],
        intervals=[
            (method.method, method.mean, method.half_width) for method in comparison.methods
        ],
        unit=f"{metric} on the test split, mean and 95 % interval",
    )


def _value(method: MethodResult) -> str:
    if not math.isfinite(method.half_width):
        return format_number(method.mean)
    return f"{format_number(method.mean)} ± {format_number(method.half_width)}"
