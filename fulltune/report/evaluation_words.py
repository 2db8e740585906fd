"""The numbers of an evaluation as the terminal and the page write them, from its JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fulltune.report.words import is_share, metric_text
from fulltune.tracking import format_number, name_of

DASH = "–"
POINTS = " points"
"""Of a difference of shares."""
CALIBRATION_NAMES = {
    "loss": "loss",
    "brier": "Brier score (0 to 2)",
    "ece": "calibration error, 15 bins of equal width",
    "ece_equal_mass": "calibration error, 15 bins of equal mass",
}


def interval_text(metric: str, interval: Mapping[str, Any] | None) -> str:
    """Both ends of an interval; a dash where there is none."""
    if interval is None:
        return DASH
    return f"{metric_text(metric, interval['low'])} to {metric_text(metric, interval['high'])}"


def difference_text(metric: str, difference: float) -> str:
    """A difference with its sign; of shares, in percentage points."""
    if not math.isfinite(difference):
        return DASH
    if is_share(metric):
        return f"{100 * difference:+.1f}{POINTS}"
    return f"{'-' if difference < 0 else '+'}{format_number(abs(difference))}"


def p_text(p_value: float) -> str:
    """A p-value as people write it."""
    if not math.isfinite(p_value):
        return DASH
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def metric_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and interval of each metric."""
    intervals = evaluation["intervals"]
    return [
        (name_of(name), metric_text(name, value), interval_text(name, intervals.get(name)))
        for name, value in evaluation["metrics"].items()
    ]


def label_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Label, precision, recall, F1, its interval and the number of examples."""
    intervals = evaluation.get("label_intervals") or {}
    per_label = evaluation.get("details", {}).get("per_label", {})
    return [
        (
            label,
            *(f"{values[name]:.1%}" for name in ("precision", "recall", "f1")),
            interval_text("macro_f1", intervals.get(label)),
            f"{values['support']:,}",
        )
        for label, values in per_label.items()
    ]


def calibration_rows(calibration: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows: each error as trained and, where it was fitted, at a temperature."""
    sides = [calibration["before"], calibration["after"]]
    header = ["", "as trained"]
    if sides[1] is not None:
        header.append(f"logits / {calibration['temperature']:.2f}")
    rows = []
    for key, name in CALIBRATION_NAMES.items():
        values = [side[key] for side in sides if side is not None]
        texts = (f"{v:.1%}" if key.startswith("ece") else format_number(v) for v in values)
        rows.append((name, *texts))
    return header, rows


def calibration_sentence(calibration: Mapping[str, Any]) -> str:
    """What the temperature says."""
    temperature = calibration["temperature"]
    if calibration["after"] is None or temperature is None:
        return "No temperature can be fitted: there are too few errors, or too many."
    fitted = f"The temperature {temperature:.2f} is fitted on {calibration['fitted_on']}"
    if calibration["after"]["loss"] >= calibration["before"]["loss"]:
        return f"{fitted}, and does not lower the loss: the model is about as sure as it should be."
    sure = "too sure of itself" if temperature > 1 else "not sure enough"
    return f"{fitted}: the model is {sure}. It changes no label."


def length_rows(slices: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows: the metrics of examples of like length."""
    known = slices[0]["metrics"]
    shown = [name for name in ("accuracy", "loss") if name in known] or list(known)[:2]
    header = ["tokens", "examples"]
    for name in shown:
        header += [name_of(name), "95% interval"]
    rows = []
    for part in slices:
        cells = [part["name"], f"{part['num_examples']:,}"]
        for name in shown:
            cells.append(metric_text(name, part["metrics"][name]))
            cells.append(interval_text(name, part["intervals"].get(name)))
        rows.append(tuple(cells))
    return header, rows


def comparison_rows(against: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Metric, both values, their difference, its interval and its p-value."""
    rows = []
    for name, found in against["metrics"].items():
        ends = found["interval"]
        between = DASH
        if ends is not None:
            low, high = (difference_text(name, ends[side]) for side in ("low", "high"))
            between = f"{low.removesuffix(POINTS)} to {high}"
        values = (metric_text(name, found[side]) for side in ("first", "second"))
        difference = difference_text(name, found["difference"])
        rows.append((name_of(name), *values, difference, between, p_text(found["p_value"])))
    return rows


def comparison_sentences(model: str, against: Mapping[str, Any]) -> list[str]:
    """What the comparison says, for a reader who does not think in p-values; notes come first."""
    metrics = against["metrics"]
    chosen = dict.fromkeys([next(iter(metrics)), *(name for name in metrics if name == "accuracy")])
    sentences = [f"Note: {note}." for note in against["notes"]]
    sentences += [f"{model}: {metrics[name]['words']}." for name in chosen]
    test = against["mcnemar"]
    if test is not None:
        sentences.append(
            f"Only {model} is right on {test['only_first']:,} examples, only {against['model']} on "
            f"{test['only_second']:,}: McNemar's p is {p_text(test['p_value'])} ({test['method']})."
        )
    return sentences
