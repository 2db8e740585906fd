"""Calibration errors against hand-made cases and scikit-learn, and temperatures against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize
from sklearn import metrics as sklearn_metrics

from fulltune.evaluate.calibration import (
    HALVES,
    calibrate,
    calibration_errors,
    expected_calibration_error,
    fit_temperature,
    losses_of,
    reliability_bins,
    softmax,
)


def sampled_logits(
    count: int, *, temperature: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Logits whose softmax at ``temperature`` is what the labels are drawn from."""
    generator = np.random.default_rng(seed)
    logits_DL = generator.normal(scale=2.0, size=(count, 3))
    shares_DL = softmax(logits_DL)
    labels_D = (shares_DL.cumsum(axis=1) < generator.random((count, 1))).sum(axis=1)
    return logits_DL * temperature, labels_D


def test_a_hand_counted_case_gives_the_hand_counted_error() -> None:
    confidences = np.array([0.9, 0.9, 0.9, 0.9, 0.6, 0.6])
    right = np.array([True, True, True, False, True, False])
    # Four said with 0.9, three of them right; two said with 0.6, one right.
    wanted = (4 * abs(0.9 - 0.75) + 2 * abs(0.6 - 0.5)) / 6
    # In one bin of equal width: said with 0.8 on the mean, two of three right.
    assert expected_calibration_error(
        confidences, right, spacing="width", num_bins=2
    ) == pytest.approx(0.8 - 4 / 6)
    assert expected_calibration_error(
        confidences, right, spacing="width", num_bins=10
    ) == pytest.approx(wanted)
    first, last = reliability_bins(confidences, right, spacing="width", num_bins=10)
    assert (first.low, first.high) == pytest.approx((0.5, 0.6))
    assert (first.count, first.accuracy) == (2, 0.5)
    assert first.confidence == pytest.approx(0.6)
    assert (last.count, last.accuracy) == (4, 0.75)


def test_bins_of_equal_mass_hold_equally_many_and_every_example_once() -> None:
    confidences = np.random.default_rng(0).random(31)
    bins = reliability_bins(confidences, confidences > 0.5, spacing="mass", num_bins=15)
    assert sorted({each.count for each in bins}) == [2, 3]
    assert sum(each.count for each in bins) == 31
    few = reliability_bins(confidences[:4], np.ones(4, dtype=bool), spacing="mass", num_bins=15)
    assert [each.count for each in few] == [1, 1, 1, 1]


def test_confidences_of_zero_and_one_have_a_bin() -> None:
    bins = reliability_bins(np.array([0.0, 1.0]), np.array([False, True]), spacing="width")
    assert [each.low for each in bins] == pytest.approx([0, 14 / 15])
    assert [each.high for each in bins] == pytest.approx([1 / 15, 1])


def test_loss_and_brier_are_those_of_scikit_learn() -> None:
    logits_DL, labels_D = sampled_logits(200)
    errors = calibration_errors(logits_DL, labels_D)
    probabilities_DL = softmax(logits_DL)
    assert errors.loss == pytest.approx(sklearn_metrics.log_loss(labels_D, probabilities_DL))
    assert errors.brier == pytest.approx(
        sklearn_metrics.brier_score_loss(labels_D, probabilities_DL, scale_by_half=False)
    )
    assert losses_of(logits_DL, labels_D).mean() == pytest.approx(errors.loss)
    assert math.isfinite(calibration_errors(logits_DL * 1e4, labels_D).loss)


def test_probabilities_that_labels_are_drawn_from_are_calibrated() -> None:
    logits_DL, labels_D = sampled_logits(20_000)
    # 20,000 draws scatter a bin's accuracy by about 0.01.
    assert calibration_errors(logits_DL, labels_D).ece < 0.015
    assert calibration_errors(logits_DL * 3, labels_D).ece > 0.08


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_is_the_one_of_least_loss(temperature: float) -> None:
    logits_DL, labels_D = sampled_logits(2000, temperature=temperature)
    found = fit_temperature(logits_DL, labels_D)
    best = optimize.minimize_scalar(
        lambda scale: losses_of(logits_DL / math.exp(scale), labels_D).mean(), bracket=(-1, 1)
    )
    assert found == pytest.approx(math.exp(best.x), rel=1e-4)
    assert found == pytest.approx(temperature, rel=0.1)


def test_where_surer_is_always_better_there_is_no_temperature() -> None:
    logits_DL = np.array([[2.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits_DL, np.array([0, 1])) is None  # all right
    assert fit_temperature(logits_DL, np.array([1, 0])) is None  # all wrong
    assert fit_temperature(logits_DL[:0], np.zeros(0, dtype=np.int64)) is None
    report = calibrate(logits_DL, np.array([0, 1]))
    assert report.temperature is None
    assert report.after is None


def test_scaling_mends_a_model_that_is_too_sure_on_examples_it_was_not_fitted_on() -> None:
    logits_DL, labels_D = sampled_logits(1500, temperature=3.0)
    report = calibrate(logits_DL, labels_D)
    assert report.fitted_on == HALVES
    assert report.temperature == pytest.approx(3.0, rel=0.15)
    assert report.after.loss < report.before.loss
    assert report.after.ece < report.before.ece / 2
    assert report.as_json()["reliability"][0]["count"] == report.reliability[0].count

    other_DL, other_D = sampled_logits(1500, temperature=3.0, seed=7)
    elsewhere = calibrate(logits_DL, labels_D, fitting=(other_DL, other_D, "validation"))
    assert elsewhere.fitted_on == "validation"
    assert elsewhere.temperature == fit_temperature(other_DL, other_D)
    assert elsewhere.after.ece < elsewhere.before.ece / 2
    assert elsewhere.before == report.before


def test_scaling_changes_no_label() -> None:
    logits_DL, _ = sampled_logits(100, temperature=3.0)
    assert (logits_DL.argmax(axis=1) == (logits_DL / 3.0).argmax(axis=1)).all()
