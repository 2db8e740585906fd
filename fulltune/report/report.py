"""`fulltune report`: one self-contained HTML page about a run, or about several side by side.

The page asks nothing of the network: style, script and charts are inside it. Everything that comes
from data, settings or answers is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fulltune.data.preview_facts import PreviewFacts
from fulltune.data.preview_page import length_columns
from fulltune.data.preview_view import NUM_LABELS, rows_of, visible
from fulltune.errors import RunFolderError
from fulltune.report.charts import (
    NUM_COLOURS,
    Mark,
    Series,
    bar_chart,
    heat_map,
    line_chart,
    smooth,
)
from fulltune.report.model_card import flatten, render_model_card
from fulltune.report.run_record import MetricCourse, RunRecord, read_run
from fulltune.tracking import format_bytes, format_duration, format_miss, format_number, name_of

__all__ = ["render_model_card", "write_report"]

# Value of a step event, title, unit, factor from the logged value to the shown one.
_STEP_CHARTS: tuple[tuple[str, str, str, float], ...] = (
    ("lr", "Learning rate", "", 1.0),
    ("grad_norm", "Gradient norm", "before clipping", 1.0),
    ("tokens_per_second", "Speed", "tokens per second", 1.0),
    ("matmul_share", "Share of the measured matrix rate", "%", 100.0),
    ("memory_bytes", "Memory, highest so far", "GiB", 1 / 1024**3),
    ("updates_rounded_away", "Updates that bf16 alone would round away", "%", 100.0),
)

_FROM_ZERO = frozenset({"tokens_per_second", "matmul_share", "memory_bytes"})

_EVENT_WORDS = {
    "spike": "loss spike",
    "nonfinite": "loss or gradient not finite",
    "resume": "resumed",
    "interrupted": "interrupted",
    "early_stop": "stopped early",
    "note": "note",
}

_NAMES = {"cpu": "CPU", "gpu": "GPU"}

_OF_THE_MACHINE = ("device", "precision", "matmul_rate", "predicted_memory_bytes")
"""What may differ where a run goes on; all else is as at its start, which the page shows."""

NUM_NAMED = 8
"""Rows named of those that a spike or a value that is not finite came from."""


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write one HTML page about one run, or comparing several.

    Args:
        runs: run folders; an unfinished run works too.
        output: the file to write.

    Returns:
        `output`.

    Raises:
        RunFolderError: a folder is not a run's, or the page cannot be written.
        DataError: a run has no metrics, or a file in it was changed.
    """
    if not runs:
        raise RunFolderError("no run was given", hint="give the folder of at least one run")
    records = [read_run(run) for run in runs]
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("fulltune.report"), PackageLoader("fulltune.data")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    if len(records) == 1:
        page = environment.get_template("run.html.j2").render(describe_run(records[0]))
    else:
        page = environment.get_template("comparison.html.j2").render(describe_comparison(records))
    temporary = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(output)
    except OSError as error:
        raise RunFolderError(
            f"`{output}` cannot be written: {error.strerror or error}",
            hint="choose another place with `--output`",
        ) from error
    return output


# ------------------------------------------------------------------------------------- one run


def describe_run(run: RunRecord) -> dict[str, Any]:
    """What the page of one run shows, ready for its template."""
    facts, findings = (run.data.facts, run.data.findings) if run.data else (None, ())
    memory, memory_chart = _memory(run)
    judged = run.main_course()
    labelled = facts is not None and any(split.labels for split in facts.splits)
    return {
        "title": run.name,
        "headline": _headline(run),
        "sentence": _sentence(run),
        "status": run.status,
        "tiles": _tiles(run),
        "caution": _caution(run),
        "results": _results(run),
        "kept_step": run.kept_step,
        "written": str(run.written.get("dtype", "")),
        "arithmetic": str(run.start.get("precision", "the arithmetic of training")),
        "judged": f"{judged.split} {_words(judged.metric)}" if judged is not None else "",
        "charts": _run_charts(run),
        "mark_keys": list(dict.fromkeys((mark.kind, mark.label) for mark in _marks(run))),
        "events": _events(run),
        "samples": run.samples,
        "confusion": _confusion(run.predictions),
        "per_class": _per_class(run.predictions),
        "weight_change": _weight_change(run.manifest),
        "memory": memory,
        "memory_chart": memory_chart,
        "warnings": [finding for finding in findings if finding.level != "note"],
        "notes": [finding for finding in findings if finding.level == "note"],
        "split_names": [split.name for split in facts.splits] if facts else [],
        "fact_rows": rows_of(facts) if facts else [],
        "histograms": [
            (split, length_columns(split))
            for split in (facts.splits if facts else ())
            if split.lengths
        ],
        "label_charts": _label_charts(facts) if facts and labelled else [],
        "visible": visible,
        "settings": [(key, _setting(value)) for key, value in flatten(run.config)],
        "model_card": render_markdown(run.model_card) if run.model_card else "",
        "provenance": _provenance(run.manifest),
    }


def _headline(run: RunRecord) -> str:
    model = run.manifest.get("base_model") or run.start.get("model") or run.config.get("model")
    return " · ".join(str(part) for part in (model, run.task) if part)


def _sentence(run: RunRecord) -> str:
    """What was trained, on what, in one sentence."""
    total, trained = run.start.get("num_parameters"), run.start.get("num_trained_parameters")
    if not total or not trained:
        return ""
    share = f"All {total:,} parameters" if trained == total else (
        f"{trained:,} of {total:,} parameters ({trained / total:.1%})"
    )  # fmt: skip
    task = run.config.get("task")
    train = task.get("train") if isinstance(task, Mapping) else None
    on = f" on {_setting(train)}" if train else ""
    splits = run.data.facts.splits if run.data else ()
    examples = [f"{split.num_examples:,} {split.name}" for split in splits]
    counted = f" ({', '.join(examples)} examples)" if examples else ""
    return f"{share} trained{on}{counted}, in {run.start.get('precision', 'unknown')} arithmetic."


def _caution(run: RunRecord) -> str:
    """What a reader of the results must not miss."""
    course = run.main_course()
    if course is not None and run.best_step == 0 and len(course.points) > 1:
        return (
            f"No evaluation was better than the model before training, judged by "
            f"{course.split} {_words(course.metric)}. The weights are those of the last step."
        )
    return ""


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """The few numbers at the top: name, value, and what stands under it."""
    tiles: list[tuple[str, str, str]] = []
    judged = run.main_course()
    shown = [judged] if judged is not None else []
    shown += [
        course
        for course in run.courses()
        if judged is not None and course.metric == "accuracy" != judged.metric
    ]
    for course in shown:
        value = run.result(course)
        if value is None:
            continue
        under = f"at step {run.kept_step:,}"
        if len(course.points) > 1 and course.first[0] != run.kept_step:
            before = "before training" if course.first[0] == 0 else f"at step {course.first[0]:,}"
            under = f"{_metric_value(course.metric, course.first[1])} {before}"
        name = f"{course.split} {_words(course.metric)}"
        tiles.append((name, _metric_value(course.metric, value), under))
    losses = run.values("loss")
    if losses:
        first_loss, last_loss = losses[0][1], losses[-1][1]
        tiles.append(
            ("training loss", format_number(last_loss), f"{format_number(first_loss)} at first")
        )
    num_steps = run.start.get("num_steps")
    planned = f"of {num_steps:,} steps" if isinstance(num_steps, int) else "steps"
    tokens = sum(int(event.get("num_tokens") or 0) for event in run.steps())
    seen = f", {_large(tokens)} tokens" if tokens else ""
    tiles.append(("trained", f"{run.last_step:,}", f"{planned}{seen}"))
    duration = run.duration_seconds
    if duration:
        stepping = sum(float(event.get("seconds") or 0.0) for event in run.steps())
        under = f"{tokens / stepping:,.0f} tokens per second" if tokens and stepping else ""
        tiles.append(("time", format_duration(duration), under))
    memory = _peak_memory(run)
    if memory:
        predicted = run.start.get("predicted_memory_bytes")
        under = f"at most; {format_bytes(predicted)} predicted" if predicted else "at most"
        tiles.append(("memory", format_bytes(memory), under))
    machine = _machine(run)
    if machine:
        tiles.append(("machine", machine[0], machine[1]))
    return tiles


def _peak_memory(run: RunRecord) -> float:
    recorded = (run.manifest.get("memory") or {}).get("peak_bytes")
    values = [value for _, value in run.values("memory_bytes") if math.isfinite(value)]
    return float(recorded or max(values, default=0.0))


def _machine(run: RunRecord) -> tuple[str, str] | None:
    machine = run.manifest.get("machine")
    if not isinstance(machine, Mapping):
        device = machine or run.start.get("device")
        return (str(device), "") if device else None
    name = str(machine.get("gpu") or machine.get("cpu") or machine.get("device") or "")
    cores = f"{machine['cores']} cores" if "cores" in machine else ""
    memory = machine.get("memory_bytes")
    size = format_bytes(memory) if isinstance(memory, (int, float)) else ""
    return (name, " · ".join(part for part in (cores, size) if part)) if name else None


def _results(run: RunRecord) -> list[tuple[str, ...]]:
    """Name of each metric, then its value before training, of the kept weights, and at the end.

    Where the model was written more exactly than it was trained, its own value comes last.
    """
    rows: list[tuple[str, ...]] = []
    judged = run.main_course()
    for course in sorted(run.courses(), key=lambda course: course != judged):
        kept = course.at(run.kept_step)
        name = f"{course.split} {_words(course.metric)}"
        before = course.first[1] if course.first[0] == 0 else None
        cells = [before, kept, course.last[1]]
        if run.written:
            cells.append(run.result(course))
        rows.append(
            (name, *("–" if cell is None else _metric_value(course.metric, cell) for cell in cells))
        )
    return rows


def _run_charts(run: RunRecord) -> list[Markup]:
    marks = _marks(run)
    loss = run.values("loss")
    series = []
    if len(loss) >= 20:
        series.append(Series("training, each step", loss, faint=True))
        series.append(Series("training, running median", smooth(loss, _window(loss))))
    else:
        series.append(Series("training", loss))
    courses = run.courses()
    losses = [course for course in courses if course.metric == "loss"]
    for index, course in enumerate(losses, start=1):
        series.append(Series(course.split, course.points, colour=index, dots=True))
    charts = [_figure(series, "Loss", "nats per target", marks)]
    charts += _metric_charts([course for course in courses if course.metric != "loss"], marks)
    for key, title, unit, factor in _STEP_CHARTS:
        points = [(step, value * factor) for step, value in run.values(key)]
        start_at_zero = key in ("tokens_per_second", "memory_bytes", "matmul_share")
        charts.append(_figure([Series(title, points)], title, unit, marks, from_zero=start_at_zero))
    return [chart for chart in charts if chart]


def _metric_charts(courses: Sequence[MetricCourse], marks: Sequence[Mark]) -> list[Markup]:
    """One chart for a metric with its splits; the shares between 0 and 1 stand together."""
    groups: dict[str, list[MetricCourse]] = {}
    for course in courses:
        share = _is_share(course.metric)
        groups.setdefault("accuracy and F1" if share else course.metric, []).append(course)
    charts = []
    for name, group in groups.items():
        metrics = {course.metric for course in group}
        title = _title(_words(next(iter(metrics)) if len(metrics) == 1 else name))
        factor = 100.0 if _is_share(group[0].metric) else 1.0
        series = [
            Series(
                f"{course.split} {_words(course.metric)}",
                [(step, value * factor) for step, value in course.points],
                colour=index,
                dots=True,
            )
            for index, course in enumerate(group, start=1)
        ]
        charts.append(_figure(series, title, "%" if factor != 1 else "", marks))
    return charts


def _figure(
    series: Sequence[Series],
    title: str,
    unit: str,
    marks: Sequence[Mark],
    *,
    from_zero: bool = False,
) -> Markup:
    """A chart under its title, with a legend where there is more than one line."""
    chart = line_chart(series, title=title, y_label=unit, marks=marks, from_zero=from_zero)
    if not chart:
        return Markup("")
    legend = Markup("")
    if len(series) > 1:
        legend = Markup("").join(
            Markup('<span class="key series-{}{}">{}</span>').format(
                one.colour % NUM_COLOURS, " faint" if one.faint else "", one.name
            )
            for one in series
        )
        legend = Markup('<p class="legend">{}</p>').format(legend)
    return Markup("<figure><figcaption>{}</figcaption>{}{}</figure>").format(
        title, legend, Markup(chart)
    )


def _window(points: Sequence[object]) -> int:
    return max(5, len(points) // 25)


def _marks(run: RunRecord) -> list[Mark]:
    marks = []
    interrupted = {event.get("step") for event in run.events if event["event"] == "interrupted"}
    resumed = {event.get("step") for event in run.events if event["event"] == "resume"}
    for event in run.events:
        kind = event["event"]
        if kind == "resume" and event.get("step") in interrupted:
            continue  # one line in the chart says both
        if "step" in event and kind in ("spike", "nonfinite", "resume", "interrupted"):
            style = "spike" if kind == "nonfinite" else kind
            both = kind == "interrupted" and event["step"] in resumed
            words = "interrupted, resumed" if both else _EVENT_WORDS[kind]
            marks.append(Mark(event["step"], words, style))
    course = run.main_course()
    if course is not None and len(course.points) > 1 and run.best_step is not None:
        label = f"best {course.split} {_words(course.metric)}"
        marks.append(Mark(run.best_step, label, "best"))
    return marks


def _events(run: RunRecord) -> list[tuple[str, str, str, str]]:
    """Style, step, what happened, and its details."""
    rows = []
    for event in run.events:
        kind = event["event"]
        if kind not in _EVENT_WORDS:
            continue
        details = [
            str(value) if key in ("text", "message") else _detail(key, value)
            for key, value in event.items()
            if key not in ("event", "time", "step")
            and not (kind == "resume" and key not in _OF_THE_MACHINE)
        ]
        style = "spike" if kind == "nonfinite" else kind
        rows.append((style, f"{event.get('step', '')}", _EVENT_WORDS[kind], " · ".join(details)))
    return rows


def _detail(key: str, value: object) -> str:
    """Name and value, in the unit that people use."""
    if key.endswith("_bytes") and isinstance(value, int | float):
        return f"{_words(key.removesuffix('_bytes'))}: {format_bytes(value)}"
    if key == "matmul_rate" and isinstance(value, int | float):
        return f"matrix products: {value / 1e9:,.0f} GFLOP/s"
    return f"{_words(key)}: {_shown(value)}"


def _shown(value: object) -> str:
    if isinstance(value, list) and len(value) > NUM_NAMED:
        return f"{_setting(value[:NUM_NAMED])} and {len(value) - NUM_NAMED:,} more"
    return format_number(value) if isinstance(value, float) else _setting(value)


def _confusion(predictions: Mapping[str, Any]) -> Markup:
    labels, rows = predictions.get("labels"), predictions.get("confusion")
    if not labels or not rows:
        return Markup("")
    names = [str(label) for label in labels]
    return Markup(heat_map(names, rows, title="Confusion matrix"))


def _per_class(predictions: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            str(label),
            *(f"{float(scores.get(key, math.nan)):.1%}" for key in ("precision", "recall", "f1")),
            f"{int(scores.get('support', 0)):,}",
        )
        for label, scores in predictions.get("per_class", {}).items()
    ]


def _weight_change(manifest: Mapping[str, Any]) -> Markup:
    bars = [
        (str(group["group"]), float(group["relative_change"]))
        for group in manifest.get("weight_change") or ()
    ]
    return Markup(bar_chart(bars, title="Relative change per layer group", show=_percent))


def _label_charts(facts: PreviewFacts) -> list[tuple[str, Markup]]:
    """A bar chart of the labels' counts for every split that has labels."""
    charts = []
    for split in facts.splits:
        counts = split.labels.counts if split.labels else {}
        bars = sorted(((visible(name), float(count)) for name, count in counts.items()), key=_least)
        title = f"{split.name}: examples by label"
        if len(bars) > NUM_LABELS:
            title += f", the {NUM_LABELS} most frequent of {len(bars):,}"
        chart = bar_chart(bars[:NUM_LABELS], title=title, show=_count)
        if chart:
            charts.append((title, Markup(chart)))
    return charts


def _least(bar: tuple[str, float]) -> float:
    return -bar[1]


def _memory(run: RunRecord) -> tuple[str, Markup]:
    """What was predicted before the first step beside what was measured after the third."""
    event = next((event for event in run.events if event["event"] == "memory"), None)
    if event is None:
        return "", Markup("")
    measured, predicted = float(event["measured_bytes"]), float(event["predicted_bytes"])
    sentence = (
        f"{format_bytes(predicted)} predicted before the first step, {format_bytes(measured)} "
        f"measured after step {event['step']} ({format_miss(float(event['error']))})"
    )
    bars = [(f"measured, step {event['step']}", measured)]
    peak = _peak_memory(run)
    if peak > measured:
        sentence += f", {format_bytes(peak)} at most in the whole run"
        bars.insert(0, ("measured, whole run", peak))
    bars.append(("predicted", predicted))
    bars += [(f"· {_words(part)}", float(size)) for part, size in event["parts"].items() if size]
    chart = bar_chart(bars, title="Memory, predicted and measured", show=format_bytes)
    return sentence, Markup(chart)


def _provenance(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key in ("base_model", "licence", "git_commit"):
        if manifest.get(key):
            rows.append((_words(key), str(manifest[key])))
    for file, digest in (manifest.get("base_model_hash") or {}).items():
        rows.append((str(file), f"sha256 {digest}"))
    for source in manifest.get("data") or ():
        parts = [f"{_count(source['rows'])} rows"] if source.get("rows") else []
        parts += [f"sha256 {source['fingerprint']}"] if source.get("fingerprint") else []
        rows.append((f"data {source['source']}", " · ".join(parts)))
    for section in ("machine", "versions"):
        for key, value in (manifest.get(section) or {}).items():
            rows.append((_words(str(key).removesuffix("_bytes")), _fact(key, value)))
    return rows


# --------------------------------------------------------------------------------- several runs


def describe_comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What the page about several runs shows: results, curves over one another, what differs."""
    names = _distinct_names(runs)
    charts = []
    train = []
    for index, run in enumerate(runs):
        loss = run.values("loss")
        smoothed = smooth(loss, _window(loss)) if len(loss) >= 20 else loss
        train.append(Series(names[index], smoothed, colour=index))
    charts.append(_figure(train, "Training loss, running median", "nats per target", ()))
    courses = [{(c.split, c.metric): c for c in run.courses()} for run in runs]
    judged = [(c.split, c.metric) for c in (run.main_course() for run in runs) if c is not None]
    keys = list(dict.fromkeys([*judged, *(key for of_run in courses for key in of_run)]))
    for split, metric in keys:
        factor = 100.0 if _is_share(metric) else 1.0
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
        charts.append(_figure(series, _title(f"{split} {_words(metric)}"), unit, ()))
    for key, title, unit, factor in _STEP_CHARTS:
        lines = []
        for index, run in enumerate(runs):
            points = [(step, value * factor) for step, value in run.values(key)]
            lines.append(Series(names[index], points, colour=index))
        charts.append(_figure(lines, title, unit, (), from_zero=key in _FROM_ZERO))
    rows: list[tuple[str, list[str]]] = []
    for split, metric in keys:
        cells = []
        for run, of_run in zip(runs, courses, strict=True):
            course = of_run.get((split, metric))
            if course is None:
                cells.append("–")
                continue
            value = run.result(course)
            cells.append("–" if value is None else _metric_value(metric, value))
        rows.append((f"{split} {_words(metric)}", cells))
    rows.append(
        (
            "weights kept, of step",
            [f"{run.kept_step:,}" if run.kept_step is not None else "–" for run in runs],
        )
    )
    rows += _run_rows(runs)
    flat = [{key: _setting(value) for key, value in flatten(run.config)} for run in runs]
    differing = [
        (key, [settings.get(key, "–") for settings in flat])
        for key in dict.fromkeys(key for settings in flat for key in settings)
        if key != "run_dir" and len({settings.get(key, "–") for settings in flat}) > 1
    ]
    return {
        "title": f"{len(runs)} runs compared",
        "names": names,
        "headlines": [_headline(run) for run in runs],
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
        peak = _peak_memory(run)
        return format_bytes(peak) if peak else "–"

    return [
        row("steps made", lambda run: f"{run.last_step:,}"),
        row("time", lambda run: format_duration(run.duration_seconds)),
        row("memory, at most", memory),
        row("machine", lambda run: " · ".join(filter(None, _machine(run) or ("–",)))),
    ]


def _distinct_names(runs: Sequence[RunRecord]) -> list[str]:
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [str(run.folder) for run in runs]


# ------------------------------------------------------------------------------- words and text


def render_markdown(text: str) -> Markup:
    """The Markdown that model cards use: headings, tables, lists, paragraphs, `code`, **bold**."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.split("\n")
        heading = re.match(r"(#{1,6}) +(.*)", lines[0])
        if heading and len(lines) == 1:
            # The page has a heading of its own above.
            level = min(6, len(heading[1]) + 2)
            inline = _inline(heading[2])
            blocks.append(Markup("<h{0}>{1}</h{0}>").format(level, inline))
        elif lines[0].startswith("|"):
            blocks.append(_markdown_table(lines))
        elif all(line.lstrip().startswith(("- ", "* ")) for line in lines):
            items = [Markup("<li>{}</li>").format(_inline(line.lstrip()[2:])) for line in lines]
            blocks.append(Markup("<ul>{}</ul>").format(Markup("").join(items)))
        else:
            blocks.append(Markup("<p>{}</p>").format(_inline(" ".join(lines))))
    return Markup("\n").join(blocks)


def _markdown_table(lines: Sequence[str]) -> Markup:
    rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines]
    body = [row for row in rows if not all(set(cell.strip()) <= set(":-") for cell in row)]
    html = []
    for index, row in enumerate(body):
        tag = "th" if index == 0 else "td"
        cells = [
            Markup("<{0}>{1}</{0}>").format(tag, _inline(cell.strip().replace("\\|", "|")))
            for cell in row
        ]
        html.append(Markup("<tr>{}</tr>").format(Markup("").join(cells)))
    return Markup('<div class="scroll"><table>{}</table></div>').format(Markup("").join(html))


def _inline(text: str) -> Markup:
    safe = str(escape(text.replace("&lt;", "<")))
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", safe))


def _is_share(metric: str) -> bool:
    return metric == "accuracy" or metric.endswith("_f1")


def _metric_value(metric: str, value: float) -> str:
    if _is_share(metric) and math.isfinite(value):
        return f"{value:.1%}"
    return format_number(value)


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]


def _words(key: str) -> str:
    return _NAMES.get(key) or name_of(key).replace(".", " ")


def _fact(key: str, value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, (int, float)):
        if key.endswith("share"):
            return f"{value:.1%}"
        if key.endswith("bytes"):
            return format_bytes(value)
        return _count(value) if isinstance(value, int) else format_number(value)
    return str(value)


def _setting(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    if value is None or value == {}:
        return "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{value:.1%}" if abs(value) >= 0.1 else f"{value:.3%}"


def _large(value: float) -> str:
    for factor, name in ((1e9, "B"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.2f} {name}"
    return f"{value:,.0f}"
