"""Labels of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from fulltune.data.tasks import ClassificationExample
from fulltune.inference.batches import encode_whole, in_chunks, score_examples
from fulltune.inference.quick import score_quickly
from fulltune.objectives.classification import Classification


@dataclass(frozen=True)
class Prediction:
    """The label of one example and the probabilities of all labels, in the model's order."""

    label: str
    probabilities: dict[str, float]


def classify(
    model: PreTrainedModel,
    objective: Classification,
    examples: Iterable[ClassificationExample],
    *,
    batch_tokens: int = 8192,
    window: int = 512,
    quick: PreTrainedModel | None = None,
) -> Iterator[Prediction]:
    """Label examples, in their order.

    Examples are read ``window`` at a time and batched by length within the window, so memory does
    not grow with their number.

    Args:
        model: a classifier.
        objective: how examples become tokens and tokens become logits.
        examples: what to label; their own labels are not looked at.
        batch_tokens: most tokens in a batch, padding included.
        window: examples held at a time.
        quick: the model in bf16: labels are the same, probabilities have two or three digits.
    """
    names = objective.labels
    for chunk in in_chunks(examples, window):
        encoded = encode_whole(objective, chunk)
        outputs = (
            score_examples(model, objective, encoded, batch_tokens=batch_tokens)
            if quick is None
            else score_quickly(model, quick, objective, encoded, batch_tokens=batch_tokens)
        )
        for output in outputs:
            row = output.logits_C.softmax(dim=-1)
            shares = dict(zip(names, row.tolist(), strict=True))
            yield Prediction(names[int(row.argmax())], shares)
