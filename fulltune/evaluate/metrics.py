"""Metrics: what they mean, which direction is better, and how they are computed.

Shape suffixes: D documents (examples), L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fulltune.data.tasks import TASKS, TaskKind
from fulltune.errors import ConfigError, DataError, near_names

if TYPE_CHECKING:
    from fulltune.objectives.base import Objective


@dataclass(frozen=True)
class Metric:
    """How a number is to be read."""

    better: Literal["lower", "higher"]
    meaning: str


METRICS: dict[str, Metric] = {
    "loss": Metric("lower", "mean cross-entropy per target, in nats; of a number, squared error"),
    "perplexity": Metric("lower", "e to the power of the loss"),
    "bits_per_byte": Metric("lower", "cross-entropy per UTF-8 byte of the text, in bits"),
    "accuracy": Metric("higher", "share of examples whose likeliest label is the right one"),
    "masked_accuracy": Metric(
        "higher", "share of masked tokens whose likeliest guess is the right one"
    ),
    "target_accuracy": Metric(
        "higher",
        "share of the targets of permutations or of an encoder-decoder (sentinels and end tokens "
        "too) whose likeliest guess is the right one",
    ),
    "sentence_accuracy": Metric(
        "higher", "share of sentence pairs whose order or belonging is told right"
    ),
    "macro_f1": Metric("higher", "mean F1 of the labels, each counting the same"),
    "weighted_f1": Metric("higher", "mean F1 of the labels, each counting by its examples"),
    "matthews": Metric("higher", "Matthews correlation of labels and predictions, -1 to 1"),
    "micro_f1": Metric("higher", "F1 of all labels of all examples together"),
    "subset_accuracy": Metric("higher", "share of examples whose labels are all right"),
    "preference_accuracy": Metric(
        "higher", "share of pairs whose chosen answer gained more than the rejected one"
    ),
    "margin": Metric("higher", "mean of beta times how much more it gained, in nats"),
    "mean_absolute_error": Metric("lower", "mean distance of the number given from the right one"),
    "pearson": Metric("higher", "linear correlation of the numbers given and the right ones"),
    "spearman": Metric("higher", "correlation of their ranks"),
    "r2": Metric("higher", "share of the variance explained; 0 is always giving the mean"),
    "f1": Metric("higher", "mean F1 of the words of the answers with those of the right ones"),
    "bleu": Metric("higher", "BLEU of generated answers (sacreBLEU), 0 to 100"),
    "chrf": Metric("higher", "chrF of generated answers (sacreBLEU), 0 to 100"),
    "rouge1": Metric("higher", "ROUGE-1 of generated answers: mean F1 of words, 0 to 1"),
    "rouge2": Metric("higher", "ROUGE-2 of generated answers: mean F1 of word pairs, 0 to 1"),
    "rouge_lsum": Metric(
        "higher", "ROUGE-Lsum of generated answers: mean F1 of subsequences by line, 0 to 1"
    ),
    "exact_match": Metric("higher", "share of answers that are a right answer itself"),
    "span_f1": Metric("higher", "F1 of entities, right where both ends and the label are"),
    "span_precision": Metric("higher", "share of the entities found that are right"),
    "span_recall": Metric("higher", "share of the right entities that are found"),
    "tag_accuracy": Metric("higher", "share of words whose tag is right"),
    "retention_loss": Metric("lower", "loss on a fixed general text: rises when it is forgotten"),
}


def check_metric(
    name: str | None,
    kind: TaskKind,
    *,
    retention: bool = False,
    generates: bool = False,
    more: Sequence[str] = (),
) -> str:
    """The metric that early stopping and the best model go by.

    Args:
        name: a metric, or None for the first one of the task.
        kind: the task's kind.
        retention: whether the run measures `retention_loss` at all.
        generates: whether it scores generated answers.
        more: what the run measures besides the metrics of the kind.

    Raises:
        ConfigError: there is no such metric, or the task does not measure it.
    """
    if name is None:
        return TASKS[kind].metrics[0]
    measured = TASKS[kind].metrics
    possible = [known for known in measured if retention or not known.startswith("retention")]
    possible += TASKS[kind].generated_metrics if generates else ()
    possible += more
    if name in possible:
        return name
    if name in METRICS:
        message = f"`evaluate.metric` is `{name}`, which a {kind} run does not measure"
        if name in measured:
            raise ConfigError(message, hint="set `evaluate.retention=true` to measure it")
        if name in TASKS[kind].generated_metrics:
            raise ConfigError(
                message + " without generated answers",
                hint="set `evaluate.generate` to the number of examples that are answered",
            )
    else:
        message = f"`evaluate.metric` is `{name}`, which is not a metric"
    near = near_names(name, possible)
    suggestion = f"did you mean `{near[0]}`? " if near else ""
    listed = ", ".join(f"`{known}`" for known in possible)
    raise ConfigError(message, hint=f"{suggestion}A {kind} run measures {listed}")


def guess_metric(objective: Objective) -> str | None:
    """The name of the share of tokens that are guessed right; None where it is no metric."""
    if objective.head in ("masked_lm", "sentence_order"):
        return "masked_accuracy"
    return None if objective.head == "causal_lm" else "target_accuracy"


def language_metrics(
    cross_entropy_sum: float, num_targets: int, num_bytes: int = 0
) -> dict[str, float]:
    """Loss, perplexity and, where the bytes are known, bits per byte.

    A perplexity too large for a float is ``inf`` and a loss that is not a number stays ``nan``;
    neither is clipped, since a clipped number would look like a measurement.

    Raises:
        DataError: there is no target.
    """
    if num_targets < 1:
        raise DataError(
            "the evaluation data has no target: nothing of it is to be predicted",
            hint="look at it with `fulltune preview`",
        )
    loss = cross_entropy_sum / num_targets
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    metrics = {"loss": loss, "perplexity": perplexity}
    if num_bytes > 0:
        metrics["bits_per_byte"] = cross_entropy_sum / math.log(2) / num_bytes
    return metrics


def classification_metrics(
    labels: Sequence[int] | NDArray[np.int64],
    predicted: Sequence[int] | NDArray[np.int64],
    probabilities: Sequence[Sequence[float]] | NDArray[np.floating[Any]],
    label_names: Sequence[str],
) -> dict[str, Any]:
    """Scores of single-label classification, computed by scikit-learn.

    A precision, recall or F1 without any example to divide by counts as 0. Averages run over the
    labels that occur among the labels or the predictions, so a label that the evaluation data does
    not hold, and that is never predicted, does not pull `macro_f1` down.

    Args:
        labels: the right labels [D], as places in ``label_names``.
        predicted: the predicted labels [D], likewise.
        probabilities: [D, L], each row summing to 1 within float32 rounding.
        label_names: the model's labels in order.

    Returns:
        Numbers under the names of `METRICS`, and `per_label` (precision, recall, f1, support by
        name) and `confusion_matrix` (rows are the right labels, columns the predicted ones).

    Raises:
        DataError: there is no example, or a label is not one of the model's.
    """
    from sklearn import metrics as sklearn_metrics

    labels_D = np.asarray(labels, dtype=np.int64)
    predicted_D = np.asarray(predicted, dtype=np.int64)
    probabilities_DL = np.asarray(probabilities, dtype=np.float64)
    num_labels = len(label_names)
    if not len(labels_D):
        raise DataError(
            "the evaluation data holds no example", hint="give a split that is not empty"
        )
    num_unknown = int(((labels_D < 0) | (labels_D >= num_labels)).sum())
    if num_unknown:
        raise DataError(
            f"{num_unknown} of {len(labels_D)} examples have a label that the model does not know",
            hint=f"the model's labels are {', '.join(f'`{name}`' for name in label_names)}",
        )
    every_label = np.arange(num_labels)
    precision_L, recall_L, f1_L, support_L = sklearn_metrics.precision_recall_fscore_support(
        labels_D, predicted_D, labels=every_label, zero_division=0
    )
    return {
        "loss": _log_loss(labels_D, probabilities_DL),
        "accuracy": float(sklearn_metrics.accuracy_score(labels_D, predicted_D)),
        "macro_f1": float(
            sklearn_metrics.f1_score(labels_D, predicted_D, average="macro", zero_division=0)
        ),
        "weighted_f1": float(
            sklearn_metrics.f1_score(labels_D, predicted_D, average="weighted", zero_division=0)
        ),
        # One label alone has no correlation; scikit-learn gives 0 too, but with a warning.
        "matthews": float(sklearn_metrics.matthews_corrcoef(labels_D, predicted_D))
        if len(np.union1d(labels_D, predicted_D)) > 1
        else 0.0,
        "per_label": {
            name: {
                "precision": float(precision_L[index]),
                "recall": float(recall_L[index]),
                "f1": float(f1_L[index]),
                "support": int(support_L[index]),
            }
            for index, name in enumerate(label_names)
        },
        "confusion_matrix": sklearn_metrics.confusion_matrix(
            labels_D, predicted_D, labels=every_label
        ).tolist(),
    }


def _log_loss(labels_D: NDArray[np.int64], probabilities_DL: NDArray[np.float64]) -> float:
    # scikit-learn's log_loss clips at the smallest step of float64 and so hides a probability of
    # zero; here a right label that got none costs infinity, as it does in training.
    probabilities_DL = probabilities_DL / probabilities_DL.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        costs_D = -np.log(probabilities_DL[np.arange(len(labels_D)), labels_D])
    return float(costs_D.mean())
