"""The charts of a run: which of its numbers are drawn, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fulltune.data.preview_facts import PreviewFacts
from fulltune.data.preview_view import NUM_LABELS, visible
from fulltune.report.charts import (
    NUM_COLOURS,
    Mark,
    Series,
    bar_chart,
    heat_map,
    line_chart,
    smooth,
)
from fulltune.report.run_record import MetricCourse, RunRecord
from fulltune.report.words import count_text, is_share, percent_text, title_of, words_of
from fulltune.tracking import format_bytes, format_miss

STEP_CHARTS: tuple[tuple[str, str, str, float], ...] = (
    ("lr", "Learning rate", "", 1.0),
    ("grad_norm", "Gradient norm", "before clipping", 1.0),
    ("tokens_per_second", "Speed", "tokens per second", 1.0),
    ("matmul_share", "Share of the measured matrix rate", "%", 100.0),
    ("memory_bytes", "Memory, highest so far", "GiB", 1 / 1024**3),
    ("updates_rounded_away", "Updates that bf16 alone would round away", "%", 100.0),
)
"""Value of a step event, title, unit, factor from the logged value to the shown one."""

FROM_ZERO = frozenset({"tokens_per_second", "matmul_share", "memory_bytes"})

EVENT_WORDS = {
    "spike": "loss spike",
    "nonfinite": "loss or gradient not finite",
    "resume": "resumed",
    "interrupted": "interrupted",
    "early_stop": "stopped early",
    "note": "note",
}


def run_charts(run: RunRecord) -> list[Markup]:
    """The curves of training and of every metric, each with what happened marked in it."""
    marks = marks_of(run)
    loss = run.values("loss")
    series = []
    if len(loss) >= 20:
        series.append(Series("training, each step", loss, faint=True))
        series.append(Series("training, running median", smooth(loss, smoothing_window(loss))))
    else:
        series.append(Series("training", loss))
    courses = run.courses()
    losses = [course for course in courses if course.metric == "loss"]
    for index, course in enumerate(losses, start=1):
        series.append(Series(course.split, course.points, colour=index, dots=True))
    charts = [figure(series, "Loss", "nats per target", marks)]
    charts += _metric_charts([course for course in courses if course.metric != "loss"], marks)
    for key, title, unit, factor in STEP_CHARTS:
        points = [(step, value * factor) for step, value in run.values(key)]
        charts.append(
            figure([Series(title, points)], title, unit, marks, from_zero=key in FROM_ZERO)
        )
    return [chart for chart in charts if chart]


def _metric_charts(courses: Sequence[MetricCourse], marks: Sequence[Mark]) -> list[Markup]:
    """One chart for a metric with its splits; the shares between 0 and 1 stand together."""
    groups: dict[str, list[MetricCourse]] = {}
    for course in courses:
        share = is_share(course.metric)
        groups.setdefault("accuracy and F1" if share else course.metric, []).append(course)
    charts = []
    for name, group in groups.items():
        metrics = {course.metric for course in group}
        title = title_of(words_of(next(iter(metrics)) if len(metrics) == 1 else name))
        factor = 100.0 if is_share(group[0].metric) else 1.0
        series = [
            Series(
                f"{course.split} {words_of(course.metric)}",
                [(step, value * factor) for step, value in course.points],
                colour=index,
                dots=True,
            )
            for index, course in enumerate(group, start=1)
        ]
        charts.append(figure(series, title, "%" if factor != 1 else "", marks))
    return charts


def figure(
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


def smoothing_window(points: Sequence[object]) -> int:
    """Points of a running median, so that a long run is smoothed as a short one."""
    return max(5, len(points) // 25)


def marks_of(run: RunRecord) -> list[Mark]:
    """What happened at a step: spikes, interruptions, and the best evaluation."""
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
            words = "interrupted, resumed" if both else EVENT_WORDS[kind]
            marks.append(Mark(event["step"], words, style))
    course = run.main_course()
    if course is not None and len(course.points) > 1 and run.best_step is not None:
        label = f"best {course.split} {words_of(course.metric)}"
        marks.append(Mark(run.best_step, label, "best"))
    return marks


def confusion_chart(predictions: Mapping[str, Any]) -> Markup:
    """How often each label was taken for each; nothing where it was not counted."""
    labels, rows = predictions.get("labels"), predictions.get("confusion")
    if not labels or not rows:
        return Markup("")
    names = [str(label) for label in labels]
    return Markup(heat_map(names, rows, title="Confusion matrix"))


def weight_change_chart(manifest: Mapping[str, Any]) -> Markup:
    """How far the weights of each group of layers moved."""
    bars = [
        (str(group["group"]), float(group["relative_change"]))
        for group in manifest.get("weight_change") or ()
    ]
    return Markup(bar_chart(bars, title="Relative change per layer group", show=percent_text))


def label_charts(facts: PreviewFacts) -> list[tuple[str, Markup]]:
    """A bar chart of the labels' counts for every split that has labels."""
    charts = []
    for split in facts.splits:
        counts = split.labels.counts if split.labels else {}
        bars = sorted(((visible(name), float(count)) for name, count in counts.items()), key=_least)
        title = f"{split.name}: {'words by tag' if facts.tags else 'examples by label'}"
        if len(bars) > NUM_LABELS:
            title += f", the {NUM_LABELS} most frequent of {len(bars):,}"
        chart = bar_chart(bars[:NUM_LABELS], title=title, show=count_text)
        if chart:
            charts.append((title, Markup(chart)))
    return charts


def _least(bar: tuple[str, float]) -> float:
    return -bar[1]


def memory_chart(run: RunRecord) -> tuple[str, Markup]:
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
    peak = run.peak_memory_bytes
    if peak > measured:
        sentence += f", {format_bytes(peak)} at most in the whole run"
        bars.insert(0, ("measured, whole run", peak))
    bars.append(("predicted", predicted))
    bars += [(f"· {words_of(part)}", float(size)) for part, size in event["parts"].items() if size]
    chart = bar_chart(bars, title="Memory, predicted and measured", show=format_bytes)
    return sentence, Markup(chart)
