"""What each example adds to the metrics of each kind of task.

Shape suffixes: D examples, S sums, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fulltune.evaluate.additive import Additive, Floats, ratio


def classification_parts(
    labels_D: NDArray[np.int64],
    predicted_D: NDArray[np.int64],
    losses_D: Floats,
    labels: Sequence[str],
) -> Additive:
    """Loss, accuracy, F1 and Matthews correlation of single-label classification.

    They are those of `classification_metrics`, as sums: for each label how often it was predicted
    rightly, how often it was predicted, and how often it is right.

    Args:
        labels_D: the right labels.
        predicted_D: the predicted ones.
        losses_D: minus the log of the right label's probability, in nats.
        labels: the labels that these are places in.
    """
    every_label = np.arange(len(labels))
    is_label_DL = labels_D[:, None] == every_label
    is_predicted_DL = predicted_D[:, None] == every_label
    parts = [losses_D[:, None], is_label_DL & is_predicted_DL, is_predicted_DL, is_label_DL]
    parts_DS = np.concatenate(parts, axis=1).astype(np.float64)
    return Additive(parts_DS, _classification_formula, frozenset({"accuracy"}), tuple(labels))


def f1_of_labels(additive: Additive) -> Additive:
    """The F1 of each label under its name, of what is counted for each label."""

    def formula(sums: Floats) -> dict[str, Floats]:
        f1_L = f1_of_counts(*_counts_of_labels(sums, len(additive.labels)))
        return {name: f1_L[..., place] for place, name in enumerate(additive.labels)}

    return replace(additive, formula=formula, shares=frozenset())


def _counts_of_labels(sums: Floats, num_labels: int) -> list[Floats]:
    """How often each label was predicted rightly, how often it was predicted, and is right."""
    counts = sums[..., 1 : 1 + 3 * num_labels]
    return np.split(counts, [num_labels, 2 * num_labels], axis=-1)


def _classification_formula(sums: Floats) -> dict[str, Floats]:
    right_L, predicted_L, support_L = _counts_of_labels(sums, (sums.shape[-1] - 1) // 3)
    total = support_L.sum(axis=-1)
    f1_L = f1_of_counts(right_L, predicted_L, support_L)
    occurs_L = predicted_L + support_L > 0
    right = right_L.sum(axis=-1)
    # The correlation of several labels (Gorodkin, 2004), as scikit-learn computes it.
    covariance = right * total - (predicted_L * support_L).sum(axis=-1)
    variances = (total**2 - (predicted_L**2).sum(axis=-1)) * (
        total**2 - (support_L**2).sum(axis=-1)
    )
    return {
        "loss": ratio(sums[..., 0], total),
        "accuracy": ratio(right, total),
        "macro_f1": ratio(f1_L.sum(axis=-1), occurs_L.sum(axis=-1)),
        "weighted_f1": ratio((f1_L * support_L).sum(axis=-1), total),
        # One label alone has no correlation; it counts as 0.
        "matthews": ratio(covariance, np.sqrt(variances), undefined=0.0),
    }


def f1_of_counts(right: Floats, predicted: Floats, wanted: Floats) -> Floats:
    """F1 of how much was found rightly, found, and wanted; 0 where there is nothing of it."""
    return ratio(2 * right, predicted + wanted, undefined=0.0)


def multi_label_parts(
    has_label_DL: NDArray[np.bool_], logits_DL: Floats, labels: Sequence[str]
) -> Additive:
    """Loss and F1 of any number of labels an example, as `multi_label_metrics` defines them."""
    predicted_DL = logits_DL > 0
    losses_DL = np.logaddexp(0, logits_DL) - logits_DL * has_label_DL
    all_right_D = (has_label_DL == predicted_DL).all(axis=1)
    columns = [
        losses_DL.mean(axis=1, keepdims=True), has_label_DL & predicted_DL, predicted_DL,
        has_label_DL, all_right_D[:, None], np.ones((len(logits_DL), 1)),
    ]  # fmt: skip
    parts_DS = np.concatenate(columns, axis=1).astype(np.float64)
    return Additive(parts_DS, _multi_label_formula, frozenset({"subset_accuracy"}), tuple(labels))


def _multi_label_formula(sums: Floats) -> dict[str, Floats]:
    right_L, predicted_L, support_L = _counts_of_labels(sums, (sums.shape[-1] - 3) // 3)
    total = sums[..., -1]
    micro = f1_of_counts(right_L.sum(-1), predicted_L.sum(-1), support_L.sum(-1))
    return {
        "loss": ratio(sums[..., 0], total),
        "micro_f1": micro,
        "macro_f1": f1_of_counts(right_L, predicted_L, support_L).mean(axis=-1),
        "subset_accuracy": ratio(sums[..., -2], total),
    }


def regression_parts(scores_D: Floats, predicted_D: Floats) -> Additive:
    """Errors and linear correlation of one number an example, as in `regression_metrics`.

    Ranks are no sums: the correlation of ranks is not among them.
    """
    errors_D = predicted_D - scores_D
    # Moments about the mean: those about 0 would lose digits where the numbers are large.
    right_D, given_D = scores_D - scores_D.mean(), predicted_D - predicted_D.mean()
    columns = [
        errors_D**2, np.abs(errors_D), right_D, given_D, right_D**2, given_D**2,
        right_D * given_D, np.ones(len(scores_D)),
    ]  # fmt: skip
    return Additive(np.stack(columns, axis=1), _regression_formula)


def _regression_formula(sums: Floats) -> dict[str, Floats]:
    total = sums[..., -1]
    square, distance, right, given, right_square, given_square, product = (
        ratio(sums[..., place], total) for place in range(7)
    )
    variance, given_variance = right_square - right**2, given_square - given**2
    spread = np.sqrt(np.clip(variance, 0, None) * np.clip(given_variance, 0, None))
    return {
        "loss": square,
        "mean_absolute_error": distance,
        "pearson": ratio(product - right * given, spread),
        "r2": 1 - ratio(square, variance),
    }


def language_parts(
    losses_D: Floats,
    num_targets_D: NDArray[np.int64],
    *,
    num_bytes_D: NDArray[np.int64] | None = None,
    num_correct_D: NDArray[np.int64] | None = None,
    accuracy: str | None = None,
) -> Additive:
    """Loss, perplexity, the share of right guesses and, where the bytes are known, bits per byte.

    Args:
        losses_D: cross-entropy of each document, summed over its targets, in nats.
        num_targets_D: its targets.
        num_bytes_D: UTF-8 bytes of the text that its targets stand for; None where unknown.
        num_correct_D: its targets whose likeliest guess is right.
        accuracy: the name of the share of these; None where it is no metric.
    """
    columns = {"loss": losses_D, "targets": num_targets_D}
    if num_bytes_D is not None:
        columns["bytes"] = num_bytes_D
    if accuracy is not None and num_correct_D is not None:
        columns["correct"] = num_correct_D
    place = {name: number for number, name in enumerate(columns)}

    def formula(sums: Floats) -> dict[str, Floats]:
        num_targets = sums[..., place["targets"]]
        loss = ratio(sums[..., place["loss"]], num_targets)
        with np.errstate(over="ignore"):  # as in `language_metrics`, too large is infinite
            metrics = {"loss": loss, "perplexity": np.exp(loss)}
        if "bytes" in place:
            bits = sums[..., place["loss"]] / math.log(2)
            metrics["bits_per_byte"] = ratio(bits, sums[..., place["bytes"]])
        if "correct" in place:
            metrics[str(accuracy)] = ratio(sums[..., place["correct"]], num_targets)
        return metrics

    return Additive(np.stack(list(columns.values()), axis=1).astype(np.float64), formula)
