"""What is measured of each kind of task whose metrics need more than sums.

Shape suffixes: D documents, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from fulltune.data.tasks import TaskKind
from fulltune.evaluate.answer_metrics import answer_metrics
from fulltune.evaluate.label_metrics import multi_label_metrics, regression_metrics
from fulltune.evaluate.metrics import classification_metrics
from fulltune.evaluate.tagging_metrics import tagging_metrics
from fulltune.objectives.answer_spans import WindowOutput
from fulltune.objectives.base import Objective
from fulltune.objectives.classification import Classification, ClassificationOutput
from fulltune.objectives.multi_label import MultiLabel, MultiLabelOutput
from fulltune.objectives.preference import PreferenceOutput
from fulltune.objectives.question_answering import QuestionAnswering
from fulltune.objectives.regression import RegressionOutput
from fulltune.objectives.token_classification import TaggingOutput

Measure: TypeAlias = Callable[[Objective, Sequence[Any]], dict[str, Any]]
"""The objective and its `Scores.outputs` of all examples -> numbers under the names of `METRICS`,
and under other names what belongs to them: tables, matrices."""


def _classification(objective: Objective, outputs: Sequence[ClassificationOutput]) -> Any:
    logits_DC = torch.stack([output.logits_C for output in outputs])
    return classification_metrics(
        [output.label_index for output in outputs],
        logits_DC.argmax(dim=-1).numpy(),
        logits_DC.double().softmax(dim=-1).numpy(),
        cast(Classification, objective).labels,
    )


def _multi_label(objective: Objective, outputs: Sequence[MultiLabelOutput]) -> Any:
    return multi_label_metrics(
        torch.stack([output.has_label_C for output in outputs]).numpy(),
        torch.stack([output.logits_C for output in outputs]).double().numpy(),
        cast(MultiLabel, objective).labels,
    )


def _regression(objective: Objective, outputs: Sequence[RegressionOutput]) -> Any:
    return regression_metrics(
        np.array([output.score for output in outputs]),
        np.array([output.predicted for output in outputs]),
    )


def _preference(objective: Objective, outputs: Sequence[PreferenceOutput]) -> Any:
    margins = np.array([output.margin for output in outputs])
    return {
        "loss": float(np.logaddexp(0, -margins).mean()),
        "preference_accuracy": float((margins > 0).mean()),
        "margin": float(margins.mean()),
    }


def _question_answering(objective: Objective, outputs: Sequence[WindowOutput]) -> Any:
    return answer_metrics(cast(QuestionAnswering, objective), outputs)


def _token_classification(objective: Objective, outputs: Sequence[TaggingOutput]) -> Any:
    measured = tagging_metrics(
        [output.right for output in outputs], [output.predicted for output in outputs]
    )
    num_words = sum(len(output.right) for output in outputs)
    return {**measured, "loss": sum(output.loss_sum for output in outputs) / num_words}


MEASURES: dict[TaskKind, Measure] = {
    "preference": _preference,
    "classification": _classification,
    "multi_label": _multi_label,
    "regression": _regression,
    "question_answering": _question_answering,
    "token_classification": _token_classification,
}
