"""One label for a text or a pair of texts, on a model of any family.

Shape suffixes: D documents, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fulltune.data.encoding import EncodedExample
from fulltune.data.tasks import ClassificationExample, Example
from fulltune.errors import DataError
from fulltune.objectives.base import Batch, Scores
from fulltune.objectives.document_reader import DocumentBatch, DocumentReader, document_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNLABELLED = -1

ClassificationLoss: TypeAlias = Literal["cross_entropy", "focal", "ordinal"]

FOCAL_GAMMA = 2.0
"""Of Lin et al., 2017, who found it the best."""


class ClassificationBatch(DocumentBatch):
    """A micro-batch of labelled documents.

    label_indices:  int64 [D], the class of each document; ``UNLABELLED`` when only predicting.
    """

    label_indices: Tensor


class ClassificationOutput(NamedTuple):
    """What came out for one document."""

    logits_C: Tensor
    """Float32, in the order of the objective's labels."""
    label_index: int
    """The right class; ``UNLABELLED`` when only predicting."""


@dataclass(frozen=True)
class Classification(DocumentReader):
    """The loss of one label a document.

    Args:
        labels: the classes in order.
        label_smoothing: share of the right class's probability that is spread over all.
        loss: ``cross_entropy``; ``focal``, which counts what is told well already for little (Lin
            et al., 2017, with gamma 2); or ``ordinal`` for classes that have an order: the squared
            earth mover's distance, by which a near class costs less than a far one (Hou et al.,
            2016).
        class_weights: what a document of each class counts for, in the order of ``labels``; empty
            where all count the same.
    """

    labels: tuple[str, ...] = ()
    label_smoothing: float = 0.0
    loss: ClassificationLoss = "cross_entropy"
    class_weights: tuple[float, ...] = ()

    @property
    def head(self) -> Literal["classification"]:
        """A classification head."""
        return "classification"

    def encode(self, example: Example) -> list[EncodedExample]:
        """One encoded document, or none if it was too long and is dropped.

        Raises:
            DataError: the document has no tokens, or is too long and ``too_long`` is "error".
        """
        if not isinstance(example, ClassificationExample):
            raise TypeError(f"{type(example).__name__} has no label")
        labels = [example.label] if example.label else []
        return self.encode_document(example.text, example.text_pair, labels, where=example.where)

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `ClassificationBatch`.

        Raises:
            DataError: a label the model does not have.
        """
        batch = self.collate_documents(examples)
        batch["label_indices"] = torch.tensor(
            [
                label_index(self.labels, example["labels"][0], example["where"])
                if example["labels"]
                else UNLABELLED
                for example in examples
            ]
        )
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Documents of the batch; each has one label."""
        return int(batch["label_indices"].numel())

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The loss of every label, summed and not averaged: a float32 scalar.

        With class weights too it is divided by the number of documents, not by their weights, so
        that no cut into micro-batches changes the update.
        """
        logits_DC, labels_D = document_logits(model, batch), batch["label_indices"]
        if self.loss == "cross_entropy":
            losses_D = F.cross_entropy(
                logits_DC, labels_D, reduction="none", label_smoothing=self.label_smoothing
            )
        elif self.loss == "focal":
            right_D = logits_DC.log_softmax(-1).gather(-1, labels_D[:, None])[:, 0]
            losses_D = -((1 - right_D.exp()) ** FOCAL_GAMMA) * right_D
        else:
            reached_DC = F.one_hot(labels_D, logits_DC.shape[-1]).cumsum(-1)
            losses_D = (logits_DC.softmax(-1).cumsum(-1) - reached_DC).square().sum(-1)
        if self.class_weights:
            losses_D = losses_D * logits_DC.new_tensor(self.class_weights)[labels_D]
        return losses_D.sum()

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """Plain cross-entropy; ``outputs`` are a `ClassificationOutput` for each document."""
        with torch.no_grad():
            logits_DC = document_logits(model, batch)
        label_indices_D = batch["label_indices"]
        labelled = bool((label_indices_D != UNLABELLED).all())
        loss = F.cross_entropy(logits_DC, label_indices_D, reduction="sum") if labelled else None
        return Scores(
            loss_sum=float(loss) if loss is not None else float("nan"),
            num_targets=self.num_targets(batch),
            num_correct=int((logits_DC.argmax(-1) == label_indices_D).sum()),
            outputs=[
                ClassificationOutput(logits_C, index)
                for logits_C, index in zip(logits_DC.cpu(), label_indices_D.tolist(), strict=True)
            ],
        )


def label_index(labels: Sequence[str], label: str, where: str) -> int:
    """The place of a label.

    Raises:
        DataError: the model does not have it.
    """
    try:
        return labels.index(label)
    except ValueError:
        raise DataError(
            f"{where}: label {label!r} is not one of the model's labels: {', '.join(labels)}",
            hint="add rows with this label to the training data, or drop the row",
        ) from None
