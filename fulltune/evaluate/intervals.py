"""95% intervals: where a metric would lie on other data of the same kind and number.

Examples are drawn again with replacement (Efron, 1979), a seeded number of times, and the interval
is the bias-corrected and accelerated one of Efron (1987), as in `scipy.stats.bootstrap`. The model
is one and the same: what another seed of training would give is not in it.

Shape suffixes: D examples, S sums, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from fulltune.evaluate.additive import Additive, Floats

LEVEL = 0.95
NUM_RESAMPLES = 2000
"""The ends of an interval then move by about a twentieth of its width from seed to seed."""

_DRAWN_AT_ONCE = 2**21
"""Numbers drawn at a time: memory does not grow with the resamples."""

T = TypeVar("T")


@dataclass(frozen=True)
class Interval:
    """The interval of a metric, and how it was made."""

    low: float
    high: float
    method: Literal["bca", "percentile", "wilson"]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def intervals_of(
    additive: Additive, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> dict[str, Interval]:
    """The interval of every metric that has one.

    A share of examples gets Wilson's, which is right near 0 and 1 too, where resampling gives no
    width at all. A metric that is not finite, or the same in every resample, gets none.

    Args:
        additive: what each example adds, and the metrics of the sums.
        seed: of the resamples.
        num_resamples: how many are drawn.
    """
    values = additive.metrics()
    if len(additive) < 2 or not values:
        return {}
    resampled = additive.formula(resampled_sums(additive.parts_DS, seed, num_resamples))
    without_one = additive.formula(sums_without_one(additive.parts_DS))
    intervals = {}
    for name, value in values.items():
        if name in additive.shares:
            count = len(additive)
            intervals[name] = wilson_interval(round(value * count), count)
            continue
        interval = bootstrap_interval(value, resampled[name], without_one[name])
        if interval is not None:
            intervals[name] = interval
    return intervals


def measured_again(
    items: Sequence[T],
    measure: Callable[[Sequence[T]], Mapping[str, float]],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Interval]:
    """The interval of metrics that are no function of sums, by measuring every resample.

    The percentile interval: measuring once more without each example would cost too much.
    """
    values = measure(items)
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for counts_RD in resample_counts(len(items), seed, num_resamples):
        for counts_D in counts_RD:
            chosen: list[int] = np.repeat(np.arange(len(items)), counts_D).tolist()
            found = measure([items[place] for place in chosen])
            for name, sample in drawn.items():
                sample.append(found.get(name, math.nan))
    intervals = {
        name: bootstrap_interval(value, np.array(drawn[name]), None)
        for name, value in values.items()
    }
    return {name: interval for name, interval in intervals.items() if interval is not None}


def resample_counts(
    num_examples: int, seed: int, num_resamples: int
) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """How often each example is drawn in each resample: int64 [some R, D], a few R at a time."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // num_examples)
    for start in range(0, num_resamples, at_once):
        rows = min(at_once, num_resamples - start)
        drawn_RD = generator.integers(num_examples, size=(rows, num_examples))
        drawn_RD += num_examples * np.arange(rows)[:, None]
        counts = np.bincount(drawn_RD.ravel(), minlength=rows * num_examples)
        yield counts.reshape(rows, num_examples)


def resampled_sums(parts_DS: Floats, seed: int, num_resamples: int) -> Floats:
    """The sums of each resample: float64 [R, S]."""
    counts = resample_counts(len(parts_DS), seed, num_resamples)
    with np.errstate(invalid="ignore"):  # an infinite loss that is not drawn: 0 times infinity
        sums: Floats = np.concatenate([each.astype(np.float64) @ parts_DS for each in counts])
    return sums


def sums_without_one(parts_DS: Floats) -> Floats:
    """The sums of all examples but one, for each of them: float64 [D, S]."""
    with np.errstate(invalid="ignore"):  # infinity less infinity is not a number
        left: Floats = parts_DS.sum(axis=0) - parts_DS
    return left


def bootstrap_interval(
    value: float, resampled_R: Floats, without_one_D: Floats | None
) -> Interval | None:
    """The interval of one metric from its resamples.

    Args:
        value: of all examples.
        resampled_R: of each resample.
        without_one_D: of all examples but one, each left out once, from which the acceleration is
            estimated; None asks for the percentile interval.

    Returns:
        None where a number is not finite, or all resamples are the same, as those of a metric that
        no example moves: they say nothing of how sure it is.
    """
    if not (math.isfinite(value) and np.isfinite(resampled_R).all()):
        return None
    if np.ptp(resampled_R) <= 1e-12 * max(1.0, abs(value)):
        return None
    tail = (1 - LEVEL) / 2
    if without_one_D is None or not np.isfinite(without_one_D).all():
        low, high = np.quantile(resampled_R, [tail, 1 - tail])
        return Interval(float(low), float(high), "percentile")
    shares = _corrected_shares(value, resampled_R, without_one_D, tail)
    if shares is None:  # every resample is on one side of the value
        low, high = np.quantile(resampled_R, [tail, 1 - tail])
        return Interval(float(low), float(high), "percentile")
    low, high = np.quantile(resampled_R, shares)
    return Interval(float(low), float(high), "bca")


def _corrected_shares(
    value: float, resampled_R: Floats, without_one_D: Floats, tail: float
) -> tuple[float, float] | None:
    """The quantiles that are the ends: Efron (1987), with scipy's treatment of equal values."""
    from scipy.special import ndtr, ndtri

    below = float(((resampled_R < value).mean() + (resampled_R <= value).mean()) / 2)
    bias = float(ndtri(below))
    if not math.isfinite(bias):
        return None
    moves_D = without_one_D.mean() - without_one_D
    spread = float((moves_D**2).sum())
    acceleration = float((moves_D**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0

    def share(normal: float) -> float:
        shifted = bias + normal
        return float(ndtr(bias + shifted / (1 - acceleration * shifted)))

    end = float(ndtri(tail))
    return share(end), share(-end)


def wilson_interval(num_right: int, count: int) -> Interval:
    """The score interval of a share (Wilson, 1927): within 0 and 1, and never of no width."""
    from scipy.special import ndtri

    normal = float(ndtri(1 - (1 - LEVEL) / 2))
    share = num_right / count
    weight = normal**2 / count
    middle = (share + weight / 2) / (1 + weight)
    half = normal * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    # At 0 and 1 the end is exact, where rounding would put it beside.
    low = 0.0 if num_right == 0 else middle - half
    high = 1.0 if num_right == count else middle + half
    return Interval(low, high, "wilson")
