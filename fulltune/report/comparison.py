"""What the page about several runs says: results, curves over one another, what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fulltune.report.charts import NUM_COLOURS, Series, smooth
from fulltune.report.model_card import flatten
from fulltune.report.run_charts import FROM_ZERO, STEP_CHARTS, figure, smoothing_window
from fulltune.report.run_record import RunRecord
from fulltune.report.words import is_share, metric_text, setting_text, title_of, words_of
from fulltune.tracking import format_bytes, format_duration


def describe_comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What the page about several runs shows: results, curves over one another, what differs."""
    names = _distinct_names(runs)
    charts = []
    train = []
    for index, run in enumerate(runs):
        loss = run.values("loss")
        smoothed = smooth(loss, smoothing_window(loss)) if len(loss) >= 20 else loss
        train.append(Series(names[index], smoothed, colour=index))
    charts.append(figure(train, "Training loss, running median", "nats per target", ()))
    courses = [{(c.split, c.metric): c for c in run.courses()} for run in runs]
    judged = [(c.split, c.metric) for c in (run.main_course() for run in runs) if c is not None]
    keys = list(dict.fromkeys([*judged, *(key for of_run in courses for key in of_run)]))
    for split, metric in keys:
        factor = 100.0 if is_share(metric) else 1.0
        series = [
            Series(
                names[index],
                [(step, value * factor) for step, value in of_run[split, metric].points],
                colour=index,
                dots=True,
            )
            for index, of_run in enumerate(courses)
            if (split, metric) in of_run
        ]
        unit = "%" if factor != 1 else "nats per target" if metric == "loss" else ""
        charts.append(figure(series, title_of(f"{split} {words_of(metric)}"), unit, ()))
    for key, title, unit, factor in STEP_CHARTS:
        lines = []
        for index, run in enumerate(runs):
            points = [(step, value * factor) for step, value in run.values(key)]
            lines.append(Series(names[index], points, colour=index))
        charts.append(figure(lines, title, unit, (), from_zero=key in FROM_ZERO))
    rows: list[tuple[str, list[str]]] = []
    for split, metric in keys:
        cells = []
        for run, of_run in zip(runs, courses, strict=True):
            course = of_run.get((split, metric))
            if course is None:
                cells.append("–")
                continue
            value = run.result(course)
            cells.append("–" if value is None else metric_text(metric, value))
        rows.append((f"{split} {words_of(metric)}", cells))
    rows.append(
        (
            "weights kept, of step",
            [f"{run.kept_step:,}" if run.kept_step is not None else "–" for run in runs],
        )
    )
    rows += _run_rows(runs)
    flat = [{key: setting_text(value) for key, value in flatten(run.config)} for run in runs]
    differing = [
        (key, [settings.get(key, "–") for settings in flat])
        for key in dict.fromkeys(key for settings in flat for key in settings)
        if key != "run_dir" and len({settings.get(key, "–") for settings in flat}) > 1
    ]
    return {
        "title": f"{len(runs)} runs compared",
        "names": names,
        "headlines": [run.headline for run in runs],
        "statuses": [run.status for run in runs],
        "results": rows,
        "differing": differing,
        "charts": [chart for chart in charts if chart],
        "num_colours": NUM_COLOURS,
    }


def _run_rows(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    def row(name: str, value: Callable[[RunRecord], str]) -> tuple[str, list[str]]:
        return name, [value(run) for run in runs]

    def memory(run: RunRecord) -> str:
        peak = run.peak_memory_bytes
        return format_bytes(peak) if peak else "–"

    return [
        row("steps made", lambda run: f"{run.last_step:,}"),
        row("time", lambda run: format_duration(run.duration_seconds)),
        row("memory, at most", memory),
        row("machine", lambda run: " · ".join(filter(None, run.machine or ("–",)))),
    ]


def _distinct_names(runs: Sequence[RunRecord]) -> list[str]:
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [str(run.folder) for run in runs]
