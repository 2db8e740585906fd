"""The page of a search: its trials, what mattered, and how it went; one file that loads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from fulltune.report.charts import bar_chart
from fulltune.report.report import write_page
from fulltune.report.search_charts import history_chart, parallel_chart, range_chart, value_text
from fulltune.report.search_record import FEWEST_TO_EXPLAIN, SearchRecord, TrialRecord
from fulltune.report.words import metric_text, percent_text, title_of, words_of
from fulltune.tracking import format_duration, format_number


def write_search_page(record: SearchRecord, output: Path) -> Path:
    """Write the page about a search, which may still be going on.

    Raises:
        RunFolderError: the page cannot be written.
    """
    return write_page(output, "search.html.j2", _describe(record))


def _describe(record: SearchRecord) -> dict[str, Any]:
    sign = -1 if record.better == "higher" else 1

    def order(trial: TrialRecord) -> tuple[Any, ...]:
        """Finished ones first, the best on top; those without a result last."""
        has_result = trial.result is not None
        return (
            trial.state != "finished",
            not has_result,
            sign * (trial.result or 0.0),
            trial.number,
        )

    best = record.best_trial
    counts = {
        state: sum(trial.state == state for trial in record.trials)
        for state in ("finished", "given up", "failed", "did not fit", "running")
    }
    result = best.result if best is not None else None
    tiles = [
        (
            f"best {words_of(record.metric)}",
            metric_text(record.metric, result) if result is not None else "–",
            f"trial {best.number}" if best is not None else "no finished trial yet",
        ),
        (
            "trials",
            f"{len(record.trials):,}",
            ", ".join(f"{n} {s}" for s, n in counts.items() if n),
        ),
        ("budget", record.budget, f"{record.spent} spent"),
        (
            "time",
            format_duration(sum(trial.seconds for trial in record.trials)),
            f"{sum(trial.tokens for trial in record.trials):,} tokens trained on",
        ),
    ]
    test = record.range_test
    charts = [
        ("Results in the order of the trials", history_chart(record)),
        (record.importances.title, _importances(record)),
        ("Range test of the learning rate", range_chart(test) if test else ""),
    ]
    return {
        "title": f"Search {record.run_dir}",
        "status": "finished" if record.is_over else "unfinished",
        "tiles": tiles,
        "metric": title_of(words_of(record.metric)),
        "names": list(record.space),
        "space": record.space.items(),
        "trials": [_row(record, trial) for trial in sorted(record.trials, key=order)],
        "best": [(key, value_text(value)) for key, value in best.values.items()] if best else [],
        "charts": [(title, Markup(chart)) for title, chart in charts if chart],
        "few": counts["finished"] + counts["given up"] < FEWEST_TO_EXPLAIN,
        "fewest": FEWEST_TO_EXPLAIN,
        "parallel": Markup(parallel_chart(record)),
        "range_test": test,
        "range_text": f"{test.given} narrowed to {test.low:g} to {test.high:g}" if test else "",
    }


def _row(record: SearchRecord, trial: TrialRecord) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state,
        "is_best": trial.number == record.best,
        "values": [
            value_text(trial.values[name]) if name in trial.values else "–" for name in record.space
        ],
        "result": "–" if trial.result is None else metric_text(record.metric, trial.result),
        "course": " ".join(format_number(value) for value in trial.evaluations),
        "time": format_duration(trial.seconds),
        "reason": trial.reason or "",
    }


def _importances(record: SearchRecord) -> str:
    bars = list(record.importances.shares.items())
    return bar_chart(bars, title=record.importances.title, show=percent_text)
