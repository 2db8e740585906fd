"""Where a model is good and where not: by length, and the examples it is most wrong about.

Shape suffixes: D examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulltune.evaluate.additive import Additive, Floats
from fulltune.evaluate.intervals import Interval, intervals_of

NUM_BUCKETS = 4
NUM_ERRORS = 5


@dataclass(frozen=True)
class Slice:
    """The metrics of some of the examples."""

    name: str
    num_examples: int
    metrics: dict[str, float]
    intervals: dict[str, Interval]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class WorstError:
    """An example that the model is wrong about, and sure of it."""

    where: str
    """File and line."""
    text: str
    """What the model was given."""
    label: str
    """What is right."""
    prediction: str
    loss: float

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def slices_of(
    additive: Additive, groups: Mapping[str, NDArray[np.int64]], *, seed: int = 0
) -> list[Slice]:
    """The metrics of groups of examples, with their intervals."""
    slices = []
    for name, places in groups.items():
        part = additive.of(places)
        slices.append(Slice(name, len(places), part.metrics(), intervals_of(part, seed=seed)))
    return slices


def length_buckets(
    lengths_D: Sequence[int] | NDArray[np.int64], num_buckets: int = NUM_BUCKETS
) -> dict[str, NDArray[np.int64]]:
    """Examples by their length in tokens, in buckets of about equally many; named `9 to 12`.

    Examples of one length stay together, so there may be fewer buckets.
    """
    lengths = np.asarray(lengths_D, dtype=np.int64)
    if not len(lengths):
        return {}
    shares = np.arange(1, num_buckets) / num_buckets
    ends = np.unique([*np.quantile(lengths, shares, method="lower"), lengths.max()])
    places_D = np.searchsorted(ends, lengths)
    buckets = {}
    for number in range(len(ends)):
        members = np.flatnonzero(places_D == number)
        if not len(members):
            continue
        low, high = int(lengths[members].min()), int(lengths[members].max())
        buckets[f"{low:,}" if low == high else f"{low:,} to {high:,}"] = members
    return buckets


def worst_places(
    losses_D: Floats, wrong_D: NDArray[np.bool_], count: int = NUM_ERRORS
) -> list[int]:
    """The wrong examples of the highest losses, the worst first; of equals the earlier."""
    order = np.argsort(-losses_D, kind="stable")
    return [int(place) for place in order if wrong_D[place]][:count]
