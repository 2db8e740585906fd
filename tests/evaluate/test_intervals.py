"""Intervals and metrics of sums against scipy and scikit-learn, and what has none."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import stats

from fulltune.evaluate.additive import Additive, mean_parts
from fulltune.evaluate.intervals import intervals_of, measured_again, wilson_interval
from fulltune.evaluate.label_metrics import multi_label_metrics, regression_metrics
from fulltune.evaluate.metrics import classification_metrics, language_metrics
from fulltune.evaluate.parts import (
    classification_parts,
    f1_of_labels,
    language_parts,
    multi_label_parts,
    regression_parts,
)


def some_classification(count: int, num_labels: int = 4, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Labels, predictions and probabilities, about three of four right."""
    generator = np.random.default_rng(seed)
    labels_D = generator.integers(num_labels, size=count)
    logits_DL = generator.normal(size=(count, num_labels))
    logits_DL[np.arange(count), labels_D] += 1.7
    probabilities_DL = np.exp(logits_DL) / np.exp(logits_DL).sum(axis=1, keepdims=True)
    return labels_D, logits_DL.argmax(axis=1), probabilities_DL


def parts_of(
    labels_D: np.ndarray, predicted_D: np.ndarray, probabilities_DL: np.ndarray
) -> Additive:
    losses_D = -np.log(probabilities_DL[np.arange(len(labels_D)), labels_D])
    return classification_parts(
        labels_D, predicted_D, losses_D, "abcdef"[: probabilities_DL.shape[1]]
    )


@pytest.mark.parametrize("absent", [False, True], ids=["all labels", "a label that is absent"])
def test_metrics_of_sums_are_those_that_scikit_learn_computes(absent: bool) -> None:
    labels_D, predicted_D, probabilities_DL = some_classification(300)
    if absent:
        kept = (labels_D != 2) & (predicted_D != 2)
        labels_D, predicted_D, probabilities_DL = (
            values[kept] for values in (labels_D, predicted_D, probabilities_DL)
        )
    wanted = classification_metrics(labels_D, predicted_D, probabilities_DL, list("abcd"))
    parts = parts_of(labels_D, predicted_D, probabilities_DL)
    assert parts.metrics() == pytest.approx({name: wanted[name] for name in parts.metrics()})
    assert len(parts.metrics()) == 5
    f1_of = {name: values["f1"] for name, values in wanted["per_label"].items()}
    assert f1_of_labels(parts).metrics() == pytest.approx(f1_of)


def test_one_label_alone_has_a_correlation_of_zero_as_in_the_metrics() -> None:
    ones = np.ones(5, dtype=np.int64)
    assert classification_parts(ones, ones, np.zeros(5), "ab").metrics()["matthews"] == 0


def test_metrics_of_many_labels_and_of_numbers_are_those_of_the_evaluation() -> None:
    generator = np.random.default_rng(0)
    logits_DL = generator.normal(size=(80, 3))
    has_label_DL = generator.random((80, 3)) < 1 / (1 + np.exp(-2 * logits_DL))
    wanted = multi_label_metrics(has_label_DL, logits_DL, list("abc"))
    parts = multi_label_parts(has_label_DL, logits_DL, list("abc"))
    assert parts.metrics() == pytest.approx({name: wanted[name] for name in parts.metrics()})
    f1_of = {name: values["f1"] for name, values in wanted["per_label"].items()}
    assert f1_of_labels(parts).metrics() == pytest.approx(f1_of)

    scores_D = 1e6 + generator.normal(size=80)
    predicted_D = scores_D + generator.normal(0.3, 0.5, size=80)
    wanted = regression_metrics(scores_D, predicted_D)
    found = regression_parts(scores_D, predicted_D).metrics()
    assert found == pytest.approx({name: wanted[name] for name in found})
    assert set(wanted) - set(found) == {"spearman"}


def test_the_metrics_of_language_are_those_of_the_evaluation() -> None:
    losses_D, targets_D, bytes_D = np.array([3.0, 8.0]), np.array([2, 5]), np.array([9, 20])
    assert language_parts(losses_D, targets_D, num_bytes_D=bytes_D).metrics() == pytest.approx(
        language_metrics(11.0, 7, 29)
    )
    assert "bits_per_byte" not in language_parts(losses_D, targets_D).metrics()
    assert language_parts(np.array([1e6]), np.array([1])).metrics()["perplexity"] == math.inf


def test_an_interval_of_a_mean_is_that_of_scipy() -> None:
    values_D = np.random.default_rng(1).gamma(0.5, size=80)  # skewed, as losses are
    mine = intervals_of(mean_parts({"loss": values_D}), num_resamples=20000)["loss"]
    theirs = stats.bootstrap(
        (values_D,), np.mean, n_resamples=20000, method="BCa", rng=np.random.default_rng(2)
    ).confidence_interval
    assert mine.method == "bca"
    # Two draws of 20,000: the ends of the interval scatter by about a hundredth of its width.
    width = theirs.high - theirs.low
    assert mine.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert mine.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_an_interval_of_macro_f1_is_that_of_resampling_the_examples_themselves() -> None:
    labels_D, predicted_D, probabilities_DL = some_classification(120)
    mine = intervals_of(parts_of(labels_D, predicted_D, probabilities_DL), num_resamples=5000)

    def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
        right = np.bincount(labels[labels == predicted], minlength=4)
        both = np.bincount(labels, minlength=4) + np.bincount(predicted, minlength=4)
        return float(np.mean(2 * right / both))

    theirs = stats.bootstrap(
        (labels_D, predicted_D), macro_f1, paired=True, vectorized=False, n_resamples=5000,
        method="BCa", rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert mine["macro_f1"].low == pytest.approx(theirs.low, abs=0.1 * width)
    assert mine["macro_f1"].high == pytest.approx(theirs.high, abs=0.1 * width)


def test_a_share_gets_the_interval_that_scipy_calls_wilson() -> None:
    for right, count in ((0, 20), (7, 20), (20, 20), (475, 500)):
        theirs = stats.binomtest(right, count).proportion_ci(method="wilson")
        mine = wilson_interval(right, count)
        assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high))
    labels = np.zeros(20, dtype=np.int64)
    perfect = intervals_of(classification_parts(labels, labels, np.full(20, 0.1), "ab"))
    assert perfect["accuracy"].low == pytest.approx(0.839, abs=1e-3)
    assert perfect["accuracy"].high == 1.0
    # Resampling the same again and again says nothing of how sure it is.
    assert set(perfect) == {"accuracy"}


def test_intervals_depend_on_the_seed_alone() -> None:
    parts = parts_of(*some_classification(50))
    assert intervals_of(parts) == intervals_of(parts)
    assert intervals_of(parts) != intervals_of(parts, seed=1)


def test_a_metric_that_is_not_finite_has_no_interval_and_others_keep_theirs() -> None:
    labels_D, predicted_D, _ = some_classification(40)
    losses_D = np.ones(40)
    losses_D[3] = math.inf
    found = intervals_of(classification_parts(labels_D, predicted_D, losses_D, "abcd"))
    assert "loss" not in found
    assert {"accuracy", "macro_f1"} <= set(found)
    assert intervals_of(mean_parts({"loss": [1.0]})) == {}


def test_a_metric_that_is_no_sum_is_measured_on_every_resample() -> None:
    values = np.random.default_rng(3).normal(size=60).tolist()
    found = measured_again(values, lambda chosen: {"median": float(np.median(chosen))})["median"]
    theirs = stats.bootstrap(
        (values,), np.median, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    assert found.method == "percentile"
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.1)


def test_ten_thousand_examples_take_seconds() -> None:
    parts = parts_of(*some_classification(10_000, num_labels=6))
    start = time.perf_counter()
    found = intervals_of(parts)
    assert len(found) == 5
    assert time.perf_counter() - start < 15  # 1 s on an idle core
