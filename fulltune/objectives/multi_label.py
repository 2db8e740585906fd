"""Any number of labels for a text or a pair of texts.

Shape suffixes: D documents, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulltune.data.encoding import EncodedExample
from fulltune.data.tasks import Example, MultiLabelExample
from fulltune.objectives.base import Batch, Scores
from fulltune.objectives.classification import label_index
from fulltune.objectives.document_reader import DocumentBatch, DocumentReader, document_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MultiLabelBatch(DocumentBatch):
    """A micro-batch of documents with their labels.

    has_label:      float32 [D, C], 1 where the document has the label, else 0.
    """

    has_label: Tensor


class MultiLabelOutput(NamedTuple):
    """What came out for one document."""

    logits_C: Tensor
    """Float32, in the order of the objective's labels."""
    has_label_C: Tensor
    """Bool: the right labels."""


@dataclass(frozen=True)
class MultiLabel(DocumentReader):
    """Binary cross-entropy of each label, averaged over the labels as transformers' heads do.

    Args:
        labels: the classes in order.
        label_shares: of the training documents, those that have each label; a new head begins with
            them (`start_at_shares`). Empty where they are not known.
    """

    labels: tuple[str, ...] = ()
    label_shares: tuple[float, ...] = ()

    @property
    def head(self) -> Literal["multi_label"]:
        """A classification head whose classes do not exclude each other."""
        return "multi_label"

    def encode(self, example: Example) -> list[EncodedExample]:
        """One encoded document, or none if it was too long and is dropped.

        Raises:
            DataError: the document has no tokens, or is too long and ``too_long`` is "error".
        """
        if not isinstance(example, MultiLabelExample):
            raise TypeError(f"{type(example).__name__} has no labels")
        return self.encode_document(
            example.text, example.text_pair, example.labels, where=example.where
        )

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `MultiLabelBatch`.

        Raises:
            DataError: a label the model does not have.
        """
        batch = self.collate_documents(examples)
        has_label_DC = torch.zeros(len(examples), len(self.labels))
        for document, example in enumerate(examples):
            for label in example["labels"]:
                has_label_DC[document, label_index(self.labels, label, example["where"])] = 1
        batch["has_label"] = has_label_DC
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Documents of the batch."""
        return len(batch["has_label"])

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The loss of every document, summed and not averaged: a float32 scalar."""
        return _loss_sum(document_logits(model, batch), batch["has_label"])

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """The same loss; ``outputs`` are a `MultiLabelOutput` for each document."""
        with torch.no_grad():
            logits_DC = document_logits(model, batch)
        has_label_DC = batch["has_label"]
        return Scores(
            loss_sum=float(_loss_sum(logits_DC, has_label_DC)),
            num_targets=self.num_targets(batch),
            outputs=[
                MultiLabelOutput(logits_C, has_label_C)
                for logits_C, has_label_C in zip(
                    logits_DC.cpu(), has_label_DC.bool().cpu(), strict=True
                )
            ],
        )


@torch.no_grad()
def start_at_shares(model: PreTrainedModel, label_shares: Sequence[float]) -> bool:
    """Let a new head begin by giving each label its share, as Lin et al., 2017, do for rare ones.

    Otherwise the first steps push all labels down at once, through every layer, and a body that
    gives all texts the same vector does that best. A head that was trained is left as it is, and so
    is one without biases.

    Returns:
        Whether it was done.
    """
    heads = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module.out_features == len(label_shares)
        and module.bias is not None
        and not module.bias.any()  # as a new one has it
    ]
    if not heads:
        return False
    shares_C = torch.tensor(label_shares).clamp(1e-4, 1 - 1e-4)
    heads[-1].bias.copy_(shares_C.logit())
    return True


def _loss_sum(logits_DC: Tensor, has_label_DC: Tensor) -> Tensor:
    losses_DC = F.binary_cross_entropy_with_logits(logits_DC, has_label_DC, reduction="none")
    return losses_DC.mean(-1).sum()
