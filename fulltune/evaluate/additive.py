"""Metrics as functions of sums over examples, which is what makes resampling them quick.

Accuracy is a mean, but macro F1, perplexity or a correlation are not: they are functions of a few
sums (right answers, predictions and examples of each label; nats and targets; products). With a row
of numbers for each example, a metric of any resample or slice of the data is one product of
matrices and one formula, whatever the metric.

Shape suffixes: D examples, S sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Formula: TypeAlias = Callable[[Floats], Mapping[str, Floats]]
"""Sums [..., S] to metrics [...] by name."""


@dataclass(frozen=True)
class Additive:
    """What each example adds, and what the metrics make of the sums.

    Args:
        parts_DS: float64 [D, S], what each example adds to each sum.
        formula: sums [..., S] -> metrics [...] by name; a metric that is undefined is NaN.
        shares: the metrics that are a share of the examples, each of which counts as 0 or 1.
        labels: the labels that sums are counted for, in their order.
    """

    parts_DS: Floats
    formula: Formula
    shares: frozenset[str] = frozenset()
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.parts_DS)

    def metrics(self) -> dict[str, float]:
        """The metrics of all examples."""
        found = self.formula(self.parts_DS.sum(axis=0))
        return {name: float(value) for name, value in found.items()}

    def of(self, places: Sequence[int] | NDArray[np.int64]) -> Additive:
        """The same of some examples."""
        return Additive(
            self.parts_DS[np.asarray(places, dtype=np.int64)], self.formula, self.shares
        )


def mean_parts(columns: Mapping[str, Sequence[float] | NDArray[Any]]) -> Additive:
    """Metrics that are plain means over examples, by name.

    One whose every value is 0 or 1 is a share of the examples.
    """
    values_DS = np.stack([np.asarray(values, np.float64) for values in columns.values()], axis=1)
    names = tuple(columns)
    shares = frozenset(
        name for place, name in enumerate(names) if np.isin(values_DS[:, place], (0, 1)).all()
    )
    parts_DS = np.concatenate([values_DS, np.ones((len(values_DS), 1))], axis=1)

    def formula(sums: Floats) -> dict[str, Floats]:
        return {name: ratio(sums[..., place], sums[..., -1]) for place, name in enumerate(names)}

    return Additive(parts_DS, formula, shares)


def ratio(above: Floats, below: Floats, *, undefined: float = math.nan) -> Floats:
    """``above / below``, and ``undefined`` where there is nothing to divide by."""
    whole = np.broadcast_to(np.asarray(below, np.float64), np.shape(above))
    result: Floats = np.full(np.shape(above), undefined)
    np.divide(above, whole, out=result, where=whole > 0)
    return result
