"""What the page of a run says of one of its evaluations, ready for its template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from fulltune.report.charts import Whisker, heat_map, interval_chart
from fulltune.report.evaluation_words import (
    calibration_rows,
    calibration_sentence,
    comparison_rows,
    comparison_sentences,
    interval_text,
    label_rows,
    length_rows,
    metric_rows,
)
from fulltune.report.reliability_chart import reliability_chart
from fulltune.report.words import is_share, metric_text
from fulltune.tracking import format_number, name_of


def describe_evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """One evaluation: numbers as text, and charts."""
    intervals = evaluation["intervals"]
    details = evaluation.get("details", {})
    calibration = evaluation.get("calibration")
    slices = evaluation.get("by_length") or []
    header, lengths = length_rows(slices) if len(slices) > 1 else ([], [])
    labels = list(details.get("per_label", {}))
    shares = [
        _whisker(name, value, intervals[name])
        for name, value in evaluation["metrics"].items()
        if is_share(name) and name in intervals
    ]
    return {
        "data": evaluation["data"],
        "made": str(evaluation["made"]).replace("T", " ").replace("Z", " UTC"),
        "count": f"{evaluation['num_examples']:,}",
        "notes": evaluation.get("notes") or [],
        "metrics": metric_rows(evaluation),
        "resampled": evaluation.get("resampled", "") if intervals else "",
        "intervals_chart": Markup(interval_chart(shares, title="")),
        "against": _against(evaluation),
        "labels": label_rows(evaluation),
        "confusion": Markup(
            heat_map(labels, details["confusion_matrix"], title="Confusion matrix")
            if labels and "confusion_matrix" in details
            else ""
        ),
        "reliability": Markup(reliability_chart(calibration["reliability"]) if calibration else ""),
        "calibration": _calibration(calibration),
        "length_header": header,
        "lengths": lengths,
        "errors": [
            (one["text"], one["label"], one["prediction"], format_number(one["loss"]), one["where"])
            for one in evaluation.get("worst_errors") or []
        ],
    }


def _whisker(name: str, value: float, interval: Mapping[str, Any]) -> Whisker:
    shown = metric_text(name, value)
    tip = f"{shown}, 95% interval {interval_text(name, interval)}"
    return Whisker(name_of(name), value, interval["low"], interval["high"], shown, tip)


def _against(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    against = evaluation.get("against")
    if against is None:
        return None
    return {
        "model": against["model"],
        "count": f"{against['num_examples']:,} {against['unit']}",
        "rows": comparison_rows(against),
        "sentences": comparison_sentences(evaluation["model"], against),
    }


def _calibration(calibration: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    header, rows = calibration_rows(calibration)
    return {"header": header, "rows": rows, "sentence": calibration_sentence(calibration)}
