"""Metrics of several labels, or of a number, for each example.

Shape suffixes: D documents (examples), L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulltune.errors import DataError


def multi_label_metrics(
    has_label_DL: NDArray[np.bool_],
    logits_DL: NDArray[np.floating[Any]],
    label_names: Sequence[str],
) -> dict[str, Any]:
    """Scores of multi-label classification, computed by scikit-learn.

    A label is predicted where it is likelier than not. A precision, recall or F1 without any
    example to divide by counts as 0.

    Args:
        has_label_DL: the right labels.
        logits_DL: of each label, before the sigmoid.
        label_names: the model's labels in order.

    Returns:
        Numbers under the names of `METRICS`, and `per_label` (precision, recall, f1, support by
        name).
    """
    from sklearn import metrics as sklearn_metrics

    predicted_DL = logits_DL > 0
    # log(1 + e^x) - x y, without overflow
    losses_DL = np.logaddexp(0, logits_DL) - logits_DL * has_label_DL
    precision_L, recall_L, f1_L, support_L = sklearn_metrics.precision_recall_fscore_support(
        has_label_DL, predicted_DL, zero_division=0
    )
    return {
        "loss": float(losses_DL.mean()),
        "micro_f1": float(
            sklearn_metrics.f1_score(has_label_DL, predicted_DL, average="micro", zero_division=0)
        ),
        "macro_f1": float(
            sklearn_metrics.f1_score(has_label_DL, predicted_DL, average="macro", zero_division=0)
        ),
        "subset_accuracy": float((has_label_DL == predicted_DL).all(axis=1).mean()),
        "per_label": {
            name: {
                "precision": float(precision_L[index]),
                "recall": float(recall_L[index]),
                "f1": float(f1_L[index]),
                "support": int(support_L[index]),
            }
            for index, name in enumerate(label_names)
        },
    }


def regression_metrics(
    scores_D: NDArray[np.floating[Any]], predicted_D: NDArray[np.floating[Any]]
) -> dict[str, Any]:
    """Scores of one number an example.

    A correlation with numbers that are all the same is not defined and is given as NaN, as is the
    share of a variance of 0.

    Raises:
        DataError: an example has no score.
    """
    if np.isnan(scores_D).any():
        raise DataError(
            f"{int(np.isnan(scores_D).sum())} of {len(scores_D)} examples have no score",
            hint="add it, or use `fulltune predict`",
        )
    errors_D = predicted_D - scores_D
    variance = float(np.var(scores_D))
    mean_square = float(np.mean(errors_D**2))
    return {
        "loss": mean_square,
        "mean_absolute_error": float(np.abs(errors_D).mean()),
        "pearson": _correlation(scores_D, predicted_D),
        "spearman": _correlation(_ranks(scores_D), _ranks(predicted_D)),
        "r2": 1 - mean_square / variance if variance else float("nan"),
    }


def _correlation(one_D: NDArray[Any], other_D: NDArray[Any]) -> float:
    if np.ptp(one_D) == 0 or np.ptp(other_D) == 0:
        return float("nan")
    return float(np.corrcoef(one_D, other_D)[0, 1])


def _ranks(values_D: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place_D, counts = np.unique(values_D, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: NDArray[np.float64] = ends - (counts + 1) / 2
    return means[place_D]
