"""What an evaluation says beside its metrics: how sure they are, and where the model is wrong.

Shape suffixes: D examples, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulltune.data.tasks import TaskKind
from fulltune.evaluate.additive import Additive
from fulltune.evaluate.calibration import Calibration, calibrate
from fulltune.evaluate.examined import EXAMINE, Examined, joined_in_groups
from fulltune.evaluate.intervals import Interval, intervals_of, measured_again
from fulltune.evaluate.measures import MEASURES
from fulltune.evaluate.parts import f1_of_labels
from fulltune.evaluate.slices import Slice, length_buckets, slices_of, worst_places
from fulltune.objectives.base import Objective

NUM_MEASURED = 500
"""Resamples of a metric that is measured anew on each of them."""

ENOUGH_DOCUMENTS = 20
"""Documents that are resampled whole; of fewer, their windows are."""


@dataclass(frozen=True)
class Outputs:
    """What came out for each example, and what is known of it."""

    kind: TaskKind
    objective: Objective
    outputs: Sequence[Any]
    """The objective's `Scores.outputs`."""
    lengths_D: NDArray[np.int64]
    """In tokens."""
    num_bytes_D: NDArray[np.int64]
    """UTF-8 bytes of the targets; 0 where they are not known."""
    documents_D: NDArray[np.int64]
    """The number of the document that each is a part of, from 0 on."""

    def examined(self) -> Examined | None:
        """Example by example; None where the kind of task does not say how."""
        examine = EXAMINE.get(self.kind)
        if examine is None or not self.outputs:
            return None
        return examine(self.objective, self.outputs, self.num_bytes_D.tolist())


@dataclass(frozen=True)
class Analysis:
    """How sure the metrics are, and where the model is right and wrong."""

    intervals: dict[str, Interval] = field(default_factory=dict)
    """Of the metrics, by name; 95%."""
    resampled: str = "examples"
    """What was drawn again: `examples`, `documents`, or `windows` of documents."""
    label_intervals: dict[str, Interval] = field(default_factory=dict)
    """Of the F1 of each label."""
    calibration: Calibration | None = None
    length_slices: list[Slice] = field(default_factory=list)
    worst: list[int] = field(default_factory=list)
    """Places of the wrong examples with the highest losses."""


def analyse(
    outputs: Outputs,
    metrics: Sequence[str],
    *,
    fitting: tuple[Outputs, str] | None = None,
    seed: int = 0,
) -> Analysis:
    """Intervals, calibration, slices and the worst errors of an evaluation.

    Args:
        outputs: what came out for each example.
        metrics: the names of those that were measured.
        fitting: outputs on other examples, and their name, to fit a temperature on.
        seed: of the resamples.
    """
    examined = outputs.examined()
    if examined is None:
        return Analysis()
    resampled, unit = _units(outputs, examined.additive)
    intervals = intervals_of(resampled, seed=seed)
    unknown = [name for name in metrics if name not in resampled.metrics()]
    again = _measured_again(outputs, unknown, seed)
    answers, labelled = examined.answers, examined.labelled
    return Analysis(
        intervals={**intervals, **again},
        resampled=unit,
        label_intervals=intervals_of(f1_of_labels(resampled), seed=seed),
        calibration=None if labelled is None else calibrate(
            labelled.logits_DL, labelled.labels_D, fitting=_to_fit_on(fitting)
        ),
        length_slices=slices_of(
            examined.additive, length_buckets(outputs.lengths_D), seed=seed
        ),
        worst=[] if answers is None else worst_places(answers.losses_D, answers.wrong_D),
    )  # fmt: skip


def _units(outputs: Outputs, additive: Additive) -> tuple[Additive, str]:
    """What is resampled. Windows of one document are alike, and alone would seem surer."""
    whole = joined_in_groups(additive, outputs.documents_D)
    if len(whole) == len(additive):
        return additive, "documents" if outputs.kind == "text" else "examples"
    if len(whole) >= ENOUGH_DOCUMENTS:
        return whole, "documents"
    return additive, "windows"


def _to_fit_on(fitting: tuple[Outputs, str] | None) -> tuple[Any, Any, str] | None:
    if fitting is None:
        return None
    examined = fitting[0].examined()
    assert examined is not None
    assert examined.labelled is not None
    return examined.labelled.logits_DL, examined.labelled.labels_D, fitting[1]


def _measured_again(outputs: Outputs, metrics: Sequence[str], seed: int) -> dict[str, Interval]:
    measure = MEASURES.get(outputs.kind)
    if measure is None or not metrics or not outputs.outputs:
        return {}

    def values(chosen: Sequence[Any]) -> dict[str, float]:
        measured = measure(outputs.objective, chosen)
        return {name: measured[name] for name in metrics if name in measured}

    return measured_again(outputs.outputs, values, seed=seed, num_resamples=NUM_MEASURED)
