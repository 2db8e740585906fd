"""One number for a text or a pair of texts.

Shape suffixes: D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from fulltune.data.encoding import EncodedExample
from fulltune.data.tasks import Example, RegressionExample
from fulltune.objectives.base import Batch, Scores
from fulltune.objectives.document_reader import DocumentBatch, DocumentReader, document_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RegressionBatch(DocumentBatch):
    """A micro-batch of documents with their scores.

    scores:         float32 [D]; NaN when only predicting.
    """

    scores: Tensor


class RegressionOutput(NamedTuple):
    """What came out for one document."""

    predicted: float
    score: float
    """The right number; NaN when only predicting."""


@dataclass(frozen=True)
class Regression(DocumentReader):
    """Squared error of one number a document."""

    @property
    def head(self) -> Literal["regression"]:
        """A classification head with one output."""
        return "regression"

    def encode(self, example: Example) -> list[EncodedExample]:
        """One encoded document, or none if it was too long and is dropped.

        Raises:
            DataError: the document has no tokens, or is too long and ``too_long`` is "error".
        """
        if not isinstance(example, RegressionExample):
            raise TypeError(f"{type(example).__name__} has no score")
        # As text and exact: `repr` of a float is read back to the same bits.
        labels = [repr(example.score)] if example.score is not None else []
        return self.encode_document(example.text, example.text_pair, labels, where=example.where)

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `RegressionBatch`."""
        batch = self.collate_documents(examples)
        batch["scores"] = torch.tensor(
            [
                float(example["labels"][0]) if example["labels"] else torch.nan
                for example in examples
            ]
        )
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Documents of the batch; each has one score."""
        return len(batch["scores"])

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The squared error of every document, summed and not averaged: a float32 scalar."""
        errors_D: Tensor = document_logits(model, batch)[:, 0] - batch["scores"]
        return errors_D.square().sum()

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """The same loss; ``outputs`` are a `RegressionOutput` for each document."""
        with torch.no_grad():
            predicted_D = document_logits(model, batch)[:, 0]
        scores_D = batch["scores"]
        return Scores(
            loss_sum=float((predicted_D - scores_D).square().sum()),
            num_targets=self.num_targets(batch),
            outputs=[
                RegressionOutput(predicted, score)
                for predicted, score in zip(predicted_D.tolist(), scores_D.tolist(), strict=True)
            ],
        )
