"""Calibration: whether labels given with 90% are right nine times of ten, and what mends it.

Shape suffixes: D examples, L labels, B bins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fulltune.evaluate.additive import Floats

NUM_BINS = 15
"""As in Guo et al. (2017), so that errors can be compared with published ones."""


@dataclass(frozen=True)
class Bin:
    """The examples whose confidence lies in one range."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean probability of the predicted label."""
    accuracy: float


@dataclass(frozen=True)
class CalibrationErrors:
    """How far probabilities are from frequencies; 0 is the best of each."""

    loss: float
    """Mean cross-entropy, in nats."""
    brier: float
    """Squared distance of the probabilities from the right label, summed over the labels
    (Brier, 1950): 0 to 2, and for two labels twice what some report."""
    ece: float
    """Expected calibration error: the mean distance of confidence and accuracy over 15 bins of
    equal width, each counting by its examples (Naeini et al., 2015)."""
    ece_equal_mass: float
    """The same over 15 bins of equally many examples, which depends less on where the bins end."""


@dataclass(frozen=True)
class Calibration:
    """Probabilities against frequencies, as trained and after temperature scaling."""

    before: CalibrationErrors
    after: CalibrationErrors | None
    """With the logits divided by the temperature; None where none could be fitted."""
    temperature: float | None
    """Above 1 the model is too sure of itself, below 1 not sure enough."""
    fitted_on: str
    """What the temperature was fitted on."""
    reliability: tuple[Bin, ...]
    """The bins of equal width that are not empty, before scaling."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


HALVES = "each half of these examples for the other"


def calibrate(
    logits_DL: Floats,
    labels_D: NDArray[np.int64],
    *,
    fitting: tuple[Floats, NDArray[np.int64], str] | None = None,
) -> Calibration:
    """Measure calibration, and what a temperature would make of it.

    Args:
        logits_DL: of the examples that are measured.
        labels_D: their right labels.
        fitting: logits, labels and name of other examples to fit the temperature on. Without them
            it is fitted on each half of the measured ones and tried on the other, so that no
            example is measured with a temperature that it helped to choose.
    """
    before = calibration_errors(logits_DL, labels_D)
    reliability = reliability_bins(*_confidence_of(softmax(logits_DL), labels_D), spacing="width")
    temperature: float | None
    scaled_DL: Floats | None = None
    if fitting is not None:
        fitting_DL, fitting_labels_D, fitted_on = fitting
        temperature = fit_temperature(fitting_DL, fitting_labels_D)
        if temperature is not None:
            scaled_DL = logits_DL / temperature
    else:
        fitted_on = HALVES
        temperature = fit_temperature(logits_DL, labels_D)
        halves = [np.arange(len(labels_D)) % 2 == side for side in (0, 1)]
        scales = [fit_temperature(logits_DL[half], labels_D[half]) for half in reversed(halves)]
        if temperature is not None and all(scale is not None for scale in scales):
            scaled_DL = logits_DL.copy()
            for half, scale in zip(halves, scales, strict=True):
                scaled_DL[half] /= scale
    after = None if scaled_DL is None else calibration_errors(scaled_DL, labels_D)
    return Calibration(before, after, temperature, fitted_on, tuple(reliability))


def calibration_errors(logits_DL: Floats, labels_D: NDArray[np.int64]) -> CalibrationErrors:
    """The errors of probabilities, which are the softmax of the logits."""
    probabilities_DL = softmax(logits_DL)
    confidences_D, right_D = _confidence_of(probabilities_DL, labels_D)
    right_DL = np.zeros_like(probabilities_DL)
    right_DL[np.arange(len(labels_D)), labels_D] = 1.0
    return CalibrationErrors(
        loss=float(losses_of(logits_DL, labels_D).mean()),
        brier=float(((probabilities_DL - right_DL) ** 2).sum(axis=1).mean()),
        ece=expected_calibration_error(confidences_D, right_D, spacing="width"),
        ece_equal_mass=expected_calibration_error(confidences_D, right_D, spacing="mass"),
    )


def expected_calibration_error(
    confidences_D: Floats,
    right_D: NDArray[np.bool_],
    *,
    spacing: Literal["width", "mass"],
    num_bins: int = NUM_BINS,
) -> float:
    """Mean distance of confidence and accuracy, each bin counting by its examples."""
    bins = reliability_bins(confidences_D, right_D, spacing=spacing, num_bins=num_bins)
    distances = (each.count * abs(each.confidence - each.accuracy) for each in bins)
    return float(sum(distances)) / len(confidences_D)


def reliability_bins(
    confidences_D: Floats,
    right_D: NDArray[np.bool_],
    *,
    spacing: Literal["width", "mass"],
    num_bins: int = NUM_BINS,
) -> list[Bin]:
    """The examples in bins of their confidence; empty bins are left out.

    A bin of equal width holds its upper end and not its lower one. Bins of equal mass differ by
    one example at most, and the surest examples are in the last.
    """
    order = np.argsort(confidences_D, kind="stable")
    if spacing == "mass":
        groups: Sequence[NDArray[np.int64]] = np.array_split(order, num_bins)
        ends = [
            (confidences_D[g[0]], confidences_D[g[-1]]) if len(g) else (0.0, 0.0) for g in groups
        ]
    else:
        limits = np.linspace(0, 1, num_bins + 1)
        places = np.clip(np.searchsorted(limits, confidences_D, side="left") - 1, 0, num_bins - 1)
        groups = [np.flatnonzero(places == number) for number in range(num_bins)]
        ends = list(itertools.pairwise(limits))
    return [
        Bin(
            float(low), float(high), len(group),
            float(confidences_D[group].mean()), float(right_D[group].mean()),
        )
        for (low, high), group in zip(ends, groups, strict=True)
        if len(group)
    ]  # fmt: skip


def fit_temperature(logits_DL: Floats, labels_D: NDArray[np.int64]) -> float | None:
    """The one number to divide logits by that makes the loss least (Guo et al., 2017).

    Its logarithm is fitted by L-BFGS in float64; the loss has one lowest point in 1/T.

    Returns:
        None where there is none: without an example; where every answer is right, so that ever
        surer would be better; or where the right logits are on the whole no higher than the others,
        so that no opinion would be better.
    """
    if len(labels_D) == 0 or not np.isfinite(logits_DL).all():
        return None
    logits = torch.from_numpy(np.ascontiguousarray(logits_DL, dtype=np.float64))
    labels = torch.from_numpy(np.ascontiguousarray(labels_D))
    # The slope of the loss at the two ends of the scale: the right logit against the largest one,
    # and against the mean of all.
    right_D = logits.gather(1, labels[:, None])[:, 0]
    if bool((right_D - logits.amax(1)).sum() >= 0) or bool((right_D - logits.mean(1)).sum() <= 0):
        return None
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_temperature], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), labels)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    temperature = math.exp(float(log_temperature.detach()))
    return temperature if math.isfinite(temperature) else None


def softmax(logits_DL: Floats) -> Floats:
    """Probabilities in float64."""
    shifted_DL = logits_DL - logits_DL.max(axis=1, keepdims=True)
    powers_DL = np.exp(shifted_DL)
    return np.asarray(powers_DL / powers_DL.sum(axis=1, keepdims=True))


def losses_of(logits_DL: Floats, labels_D: NDArray[np.int64]) -> Floats:
    """Minus the log of the right label's probability, in nats: float64 [D]."""
    shifted_DL = logits_DL - logits_DL.max(axis=1, keepdims=True)
    log_sums_D = np.log(np.exp(shifted_DL).sum(axis=1))
    return np.asarray(log_sums_D - shifted_DL[np.arange(len(labels_D)), labels_D])


def _confidence_of(
    probabilities_DL: Floats, labels_D: NDArray[np.int64]
) -> tuple[Floats, NDArray[np.bool_]]:
    """The probability of the predicted label, and whether it is right."""
    return probabilities_DL.max(axis=1), probabilities_DL.argmax(axis=1) == labels_D
