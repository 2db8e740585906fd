"""Two models on the same examples: by how much they differ, and whether that may be chance.

Shape suffixes: D examples, S sums, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fulltune.evaluate.additive import Additive, Floats
from fulltune.evaluate.intervals import (
    NUM_RESAMPLES,
    Interval,
    bootstrap_interval,
    resampled_sums,
    sums_without_one,
)

SIGNIFICANT = 0.05
_EXACT_BELOW = 25
"""Disagreements below which McNemar's test is exact; from there on chi-squared is close."""

_DRAWN_AT_ONCE = 2**21


@dataclass(frozen=True)
class Difference:
    """One metric of two models on the same examples."""

    first: float
    second: float
    difference: float
    """First less second."""
    interval: Interval | None
    """Of the difference, by the paired bootstrap."""
    p_value: float
    """How often a difference this large would come about if both models were alike, by approximate
    randomisation (Noreen, 1989): the outputs of an example change sides at random."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class McNemar:
    """McNemar's test (1947) of two classifiers: only examples that one of them has right count."""

    only_first: int
    """Examples that the first has right and the second wrong."""
    only_second: int
    p_value: float
    method: Literal["exact", "chi-squared, continuity-corrected"]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def mcnemar(first_right_D: NDArray[np.bool_], second_right_D: NDArray[np.bool_]) -> McNemar:
    """Test whether two classifiers are right equally often, by the examples they differ on.

    With few of them the p-value is the two-sided one of the binomial distribution; else that of
    chi-squared with the correction of Edwards (1948).
    """
    from scipy.special import bdtr, chdtrc

    only_first = int((first_right_D & ~second_right_D).sum())
    only_second = int((~first_right_D & second_right_D).sum())
    differing = only_first + only_second
    if differing < _EXACT_BELOW:
        p_value = min(1.0, 2 * float(bdtr(min(only_first, only_second), differing, 0.5)))
        return McNemar(only_first, only_second, p_value, "exact")
    statistic = max(0, abs(only_first - only_second) - 1) ** 2 / differing
    method: Literal["chi-squared, continuity-corrected"] = "chi-squared, continuity-corrected"
    return McNemar(only_first, only_second, float(chdtrc(1, statistic)), method)


def compare(
    first: Additive, second: Additive, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> dict[str, Difference]:
    """Every metric that both models have, on the same examples in the same order.

    Both are resampled alike: an example that is hard for both moves both, and not their difference.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} examples cannot be paired with {len(second)}")
    first_values, second_values = first.metrics(), second.metrics()
    names = [name for name in first_values if name in second_values]
    resampled = _difference(
        first.formula(resampled_sums(first.parts_DS, seed, num_resamples)),
        second.formula(resampled_sums(second.parts_DS, seed, num_resamples)),
    )
    without_one = _difference(
        first.formula(sums_without_one(first.parts_DS)),
        second.formula(sums_without_one(second.parts_DS)),
    )
    swapped = _swapped_differences(first, second, seed, num_resamples)
    differences = {}
    for name in names:
        difference = first_values[name] - second_values[name]
        differences[name] = Difference(
            first_values[name],
            second_values[name],
            difference,
            bootstrap_interval(difference, resampled[name], without_one[name]),
            _p_value(difference, swapped.get(name)),
        )
    return differences


def _difference(first: Mapping[str, Floats], second: Mapping[str, Floats]) -> dict[str, Floats]:
    with np.errstate(invalid="ignore"):  # two infinite losses have no difference
        return {name: first[name] - second[name] for name in first if name in second}


def _swapped_differences(
    first: Additive, second: Additive, seed: int, num_resamples: int
) -> dict[str, Floats]:
    """The differences where each example's outputs change sides by the toss of a coin.

    Empty where the two do not add up the same things, so that nothing can be exchanged.
    """
    if first.parts_DS.shape != second.parts_DS.shape or first.labels != second.labels:
        return {}
    generator = np.random.default_rng([seed, 1])
    at_once = max(1, _DRAWN_AT_ONCE // len(first))
    with np.errstate(invalid="ignore"):  # of infinite losses; such metrics get no p-value
        change_DS = second.parts_DS - first.parts_DS
        exchanged = [
            generator.integers(2, size=(min(at_once, num_resamples - start), len(first)))
            @ change_DS
            for start in range(0, num_resamples, at_once)
        ]
        exchanged_RS = np.concatenate(exchanged)
        sums = (
            first.parts_DS.sum(axis=0) + exchanged_RS,
            second.parts_DS.sum(axis=0) - exchanged_RS,
        )
    return _difference(first.formula(sums[0]), second.formula(sums[1]))


def _p_value(difference: float, swapped_R: Floats | None) -> float:
    """The share of exchanges with as large a difference, the one that was found among them."""
    if swapped_R is None or not (math.isfinite(difference) and np.isfinite(swapped_R).all()):
        return math.nan
    # Sums in another order differ in their last bits; equal differences must count as equal.
    as_large = np.abs(swapped_R) >= abs(difference) - 1e-9 * max(1.0, abs(difference))
    return (1 + int(as_large.sum())) / (1 + len(swapped_R))


def in_words(
    metric: str, difference: Difference, *, higher_is_better: bool, num_examples: int
) -> str:
    """What the comparison says, for a reader who does not think in p-values.

    "Better" is said only where the interval excludes 0 and chance is an unlikely explanation.
    """
    interval = difference.interval
    if difference.difference == 0:
        return f"the {metric} is the same on these {num_examples:,} examples"
    if interval is None or not math.isfinite(difference.p_value):
        return f"whether the {metric} differs cannot be said from these {num_examples:,} examples"
    excludes_zero = interval.low > 0 or interval.high < 0
    better = (difference.difference > 0) == higher_is_better
    word = "better" if better else "worse"
    if excludes_zero and difference.p_value < SIGNIFICANT:
        return f"the {metric} is {word}, and chance is an unlikely explanation of it"
    return (
        f"the {metric} shows no clear difference: {num_examples:,} examples are too few to tell "
        "the two apart"
    )
