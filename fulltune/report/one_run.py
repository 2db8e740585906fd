"""What the page of one run says, ready for its template."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fulltune.data.preview_page import length_columns
from fulltune.data.preview_view import rows_of, visible
from fulltune.report.evaluations import describe_evaluation
from fulltune.report.markdown import render_markdown
from fulltune.report.model_card import flatten
from fulltune.report.run_charts import (
    EVENT_WORDS,
    confusion_chart,
    label_charts,
    marks_of,
    memory_chart,
    run_charts,
    weight_change_chart,
)
from fulltune.report.run_record import RunRecord
from fulltune.report.words import (
    count_text,
    fact_text,
    large_text,
    metric_text,
    setting_text,
    words_of,
)
from fulltune.tracking import format_bytes, format_duration, format_number

_OF_THE_MACHINE = ("device", "precision", "matmul_rate", "predicted_memory_bytes")
"""What may differ where a run goes on; all else is as at its start, which the page shows."""

NUM_NAMED = 8
"""Rows named of those that a spike or a value that is not finite came from."""


def describe_run(run: RunRecord) -> dict[str, Any]:
    """What the page of one run shows, ready for its template."""
    facts, findings = (run.data.facts, run.data.findings) if run.data else (None, ())
    memory, memory_bars = memory_chart(run)
    judged = run.main_course()
    labelled = facts is not None and any(split.labels for split in facts.splits)
    return {
        "title": run.name,
        "headline": run.headline,
        "sentence": _sentence(run),
        "status": run.status,
        "tiles": _tiles(run),
        "caution": _caution(run),
        "results": _results(run),
        "kept_step": run.kept_step,
        "written": str(run.written.get("dtype", "")),
        "arithmetic": str(run.start.get("precision", "the arithmetic of training")),
        "judged": f"{judged.split} {words_of(judged.metric)}" if judged is not None else "",
        "charts": run_charts(run),
        "mark_keys": list(dict.fromkeys((mark.kind, mark.label) for mark in marks_of(run))),
        "events": _events(run),
        "samples": run.samples,
        "confusion": confusion_chart(run.predictions),
        "per_class": _per_class(run.predictions),
        "evaluations": [describe_evaluation(one) for one in run.evaluations],
        "weight_change": weight_change_chart(run.manifest),
        "memory": memory,
        "memory_chart": memory_bars,
        "warnings": [finding for finding in findings if finding.level != "note"],
        "notes": [finding for finding in findings if finding.level == "note"],
        "split_names": [split.name for split in facts.splits] if facts else [],
        "fact_rows": rows_of(facts) if facts else [],
        "histograms": [
            (split, length_columns(split))
            for split in (facts.splits if facts else ())
            if split.lengths
        ],
        "label_charts": label_charts(facts) if facts and labelled else [],
        "visible": visible,
        "settings": [(key, setting_text(value)) for key, value in flatten(run.config)],
        "model_card": render_markdown(run.model_card) if run.model_card else "",
        "provenance": _provenance(run.manifest),
    }


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
    on = f" on {setting_text(train)}" if train else ""
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
            f"{course.split} {words_of(course.metric)}. The weights are those of the last step."
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
            under = f"{metric_text(course.metric, course.first[1])} {before}"
        name = f"{course.split} {words_of(course.metric)}"
        tiles.append((name, metric_text(course.metric, value), under))
    losses = run.values("loss")
    if losses:
        first_loss, last_loss = losses[0][1], losses[-1][1]
        tiles.append(
            ("training loss", format_number(last_loss), f"{format_number(first_loss)} at first")
        )
    num_steps = run.start.get("num_steps")
    planned = f"of {num_steps:,} steps" if isinstance(num_steps, int) else "steps"
    tokens = sum(int(event.get("num_tokens") or 0) for event in run.steps())
    seen = f", {large_text(tokens)} tokens" if tokens else ""
    tiles.append(("trained", f"{run.last_step:,}", f"{planned}{seen}"))
    duration = run.duration_seconds
    if duration:
        stepping = sum(float(event.get("seconds") or 0.0) for event in run.steps())
        under = f"{tokens / stepping:,.0f} tokens per second" if tokens and stepping else ""
        tiles.append(("time", format_duration(duration), under))
    memory = run.peak_memory_bytes
    if memory:
        predicted = run.start.get("predicted_memory_bytes")
        under = f"at most; {format_bytes(predicted)} predicted" if predicted else "at most"
        tiles.append(("memory", format_bytes(memory), under))
    machine = run.machine
    if machine:
        tiles.append(("machine", machine[0], machine[1]))
    return tiles


def _results(run: RunRecord) -> list[tuple[str, ...]]:
    """Name of each metric, then its value before training, of the kept weights, and at the end.

    Where the model was written more exactly than it was trained, its own value comes last.
    """
    rows: list[tuple[str, ...]] = []
    judged = run.main_course()
    for course in sorted(run.courses(), key=lambda course: course != judged):
        kept = course.at(run.kept_step)
        name = f"{course.split} {words_of(course.metric)}"
        before = course.first[1] if course.first[0] == 0 else None
        cells = [before, kept, course.last[1]]
        if run.written:
            cells.append(run.result(course))
        rows.append(
            (name, *("–" if cell is None else metric_text(course.metric, cell) for cell in cells))
        )
    return rows


def _events(run: RunRecord) -> list[tuple[str, str, str, str]]:
    """Style, step, what happened, and its details."""
    rows = []
    for event in run.events:
        kind = event["event"]
        if kind not in EVENT_WORDS:
            continue
        details = [
            str(value) if key in ("text", "message") else _detail(key, value)
            for key, value in event.items()
            if key not in ("event", "time", "step")
            and not (kind == "resume" and key not in _OF_THE_MACHINE)
        ]
        style = "spike" if kind == "nonfinite" else kind
        rows.append((style, f"{event.get('step', '')}", EVENT_WORDS[kind], " · ".join(details)))
    return rows


def _detail(key: str, value: object) -> str:
    """Name and value, in the unit that people use."""
    if key.endswith("_bytes") and isinstance(value, int | float):
        return f"{words_of(key.removesuffix('_bytes'))}: {format_bytes(value)}"
    if key == "matmul_rate" and isinstance(value, int | float):
        return f"matrix products: {value / 1e9:,.0f} GFLOP/s"
    return f"{words_of(key)}: {_shown(value)}"


def _shown(value: object) -> str:
    if isinstance(value, list) and len(value) > NUM_NAMED:
        return f"{setting_text(value[:NUM_NAMED])} and {len(value) - NUM_NAMED:,} more"
    return format_number(value) if isinstance(value, float) else setting_text(value)


def _per_class(predictions: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            str(label),
            *(f"{float(scores.get(key, math.nan)):.1%}" for key in ("precision", "recall", "f1")),
            f"{int(scores.get('support', 0)):,}",
        )
        for label, scores in predictions.get("per_class", {}).items()
    ]


def _provenance(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key in ("base_model", "licence", "git_commit"):
        if manifest.get(key):
            rows.append((words_of(key), str(manifest[key])))
    for name, signature in (manifest.get("signatures") or {}).items():
        rows.append((f"signature of {name}", str(signature)))
    for file, digest in (manifest.get("base_model_hash") or {}).items():
        rows.append((str(file), f"sha256 {digest}"))
    for source in manifest.get("data") or ():
        parts = [f"{count_text(source['rows'])} rows"] if source.get("rows") else []
        parts += [f"sha256 {source['fingerprint']}"] if source.get("fingerprint") else []
        rows.append((f"data {source['source']}", " · ".join(parts)))
    for section in ("machine", "versions"):
        for key, value in (manifest.get(section) or {}).items():
            rows.append((words_of(str(key).removesuffix("_bytes")), fact_text(key, value)))
    return rows
