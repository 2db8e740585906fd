"""An evaluation example by example, for each kind of task: one table, as `measures` is one.

A metric of such a kind that is no function of sums has an interval too, by measuring every
resample. Of a kind that is not in the table nothing is said but what `measures` measures.

Shape suffixes: D examples, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from fulltune.data.tasks import TaskKind
from fulltune.evaluate.additive import Additive, Floats
from fulltune.evaluate.calibration import losses_of
from fulltune.evaluate.metrics import guess_metric
from fulltune.evaluate.parts import (
    classification_parts,
    language_parts,
    multi_label_parts,
    regression_parts,
)
from fulltune.objectives.base import DocumentScore, Objective
from fulltune.objectives.classification import Classification, ClassificationOutput
from fulltune.objectives.multi_label import MultiLabel, MultiLabelOutput
from fulltune.objectives.regression import RegressionOutput


@dataclass(frozen=True)
class Answers:
    """What is right and what was predicted for each example, as text, and how wrong it is."""

    right: Sequence[str]
    predicted: Sequence[str]
    losses_D: Floats
    wrong_D: NDArray[np.bool_]


@dataclass(frozen=True)
class Labelled:
    """One right and one predicted label for each example, and how sure the model was."""

    names: tuple[str, ...]
    labels_D: NDArray[np.int64]
    """Places in ``names``."""
    logits_DL: Floats

    @property
    def predicted_D(self) -> NDArray[np.int64]:
        """Places in ``names``."""
        predicted_D: NDArray[np.int64] = np.argmax(self.logits_DL, axis=1)
        return predicted_D

    @property
    def right_D(self) -> NDArray[np.bool_]:
        """Whether the likeliest label is the right one."""
        return np.equal(self.predicted_D, self.labels_D)

    @property
    def losses_D(self) -> Floats:
        """Minus the log of the right label's probability, in nats."""
        return losses_of(self.logits_DL, self.labels_D)

    def parts(self, names: Sequence[str] | None = None) -> Additive:
        """The metrics as sums, with the labels in the order of ``names``, which may have more."""
        names = names or self.names
        codes = {name: code for code, name in enumerate(names)}
        place_L = np.array([codes[name] for name in self.names], dtype=np.int64)
        return classification_parts(
            place_L[self.labels_D], place_L[self.predicted_D], self.losses_D, names
        )


@dataclass(frozen=True)
class Examined:
    """What an evaluation says of each example, in their order."""

    additive: Additive
    answers: Answers | None = None
    """None where nothing is simply right or wrong."""
    labelled: Labelled | None = None
    """Of a task with one label an example, whose probabilities can be calibrated."""


Examine: TypeAlias = Callable[[Objective, Sequence[Any], Sequence[int]], Examined]
"""The objective, its `Scores.outputs` of all examples, and the bytes of each (0 where they are not
known) -> what is said of each example."""


def _classification(
    objective: Objective, outputs: Sequence[ClassificationOutput], num_bytes: Sequence[int]
) -> Examined:
    names = cast(Classification, objective).labels
    labelled = Labelled(
        names,
        np.array([output.label_index for output in outputs], dtype=np.int64),
        np.stack([output.logits_C.double().numpy() for output in outputs]),
    )
    answers = Answers(
        [names[label] for label in labelled.labels_D],
        [names[label] for label in labelled.predicted_D],
        labelled.losses_D,
        ~labelled.right_D,
    )
    return Examined(labelled.parts(), answers, labelled)


def _multi_label(
    objective: Objective, outputs: Sequence[MultiLabelOutput], num_bytes: Sequence[int]
) -> Examined:
    names = cast(MultiLabel, objective).labels
    logits_DL = np.stack([output.logits_C.double().numpy() for output in outputs])
    has_label_DL = np.stack([output.has_label_C.numpy() for output in outputs])
    additive = multi_label_parts(has_label_DL, logits_DL, names)

    def listed(chosen_DL: NDArray[np.bool_]) -> list[str]:
        return [", ".join(np.array(names)[chosen_L]) or "none" for chosen_L in chosen_DL]

    answers = Answers(
        listed(has_label_DL),
        listed(logits_DL > 0),
        additive.parts_DS[:, 0],
        (has_label_DL != (logits_DL > 0)).any(axis=1),
    )
    return Examined(additive, answers)


def _regression(
    objective: Objective, outputs: Sequence[RegressionOutput], num_bytes: Sequence[int]
) -> Examined:
    scores_D = np.array([output.score for output in outputs])
    predicted_D = np.array([output.predicted for output in outputs])
    errors_D = predicted_D - scores_D
    answers = Answers(
        [f"{score:g}" for score in scores_D],
        [f"{predicted:.4g}" for predicted in predicted_D],
        errors_D**2,
        errors_D != 0,
    )
    return Examined(regression_parts(scores_D, predicted_D), answers)


def _language(
    objective: Objective, outputs: Sequence[DocumentScore], num_bytes: Sequence[int]
) -> Examined:
    return Examined(
        language_parts(
            np.array([output.loss for output in outputs]),
            np.array([output.num_targets for output in outputs], dtype=np.int64),
            num_bytes_D=np.array(num_bytes, dtype=np.int64) if any(num_bytes) else None,
            num_correct_D=np.array([output.num_correct for output in outputs], dtype=np.int64),
            accuracy=guess_metric(objective),
        )
    )


EXAMINE: dict[TaskKind, Examine] = {
    "classification": _classification,
    "multi_label": _multi_label,
    "regression": _regression,
    "chat": _language,
    "text": _language,
    "sequence_to_sequence": _language,
}


def joined_in_groups(additive: Additive, groups_D: NDArray[np.int64]) -> Additive:
    """The same with the examples of a group taken as one: what they add is summed.

    Args:
        additive: what each example adds.
        groups_D: the number of each example's group, from 0 on.
    """
    count = int(groups_D.max()) + 1 if len(groups_D) else 0
    if count == len(groups_D) and (groups_D == np.arange(count)).all():
        return additive
    parts = np.zeros((count, additive.parts_DS.shape[1]))
    np.add.at(parts, groups_D, additive.parts_DS)
    return replace(additive, parts_DS=parts, shares=frozenset())
