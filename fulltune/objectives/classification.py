"""One label for a text or a pair of texts, on a model of any family.

Shape suffixes: D documents, B rows, T tokens, H hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, NotRequired, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.data.tasks import ClassificationExample, Example
from fulltune.errors import DataError
from fulltune.models.families import classification_logits, classification_states
from fulltune.objectives.base import (
    Batch,
    Scores,
    TooLong,
    collate_tokens,
    model_inputs,
    tokenizer_fingerprint,
)
from fulltune.objectives.causal_lm import MODEL_INPUTS, too_long_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNLABELLED = -1


class ClassificationBatch(TypedDict):
    """A micro-batch of labelled documents.

    input_ids:      int64 [1, T] packed documents, or [B, T] right-padded where packing is off.
    label_indices:  int64 [D], the class of each document; ``UNLABELLED`` when only predicting.
    pooled_positions: int64 [D], into the flattened tokens: the token whose hidden state the head
                    reads, the first or the last of each document; absent where transformers' own
                    forward chooses it.
    token_type_ids: int64, shaped like ``input_ids``; absent where the model has no segments.
    attention_mask: int64 [B, T], 1 on tokens and 0 on padding; absent when packed.
    position_ids, cu_seq_lens_q, ...: document boundaries, present when packed.
    """

    input_ids: Tensor
    label_indices: Tensor
    pooled_positions: NotRequired[Tensor]
    token_type_ids: NotRequired[Tensor]
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    cu_seq_lens_q: NotRequired[Tensor]
    cu_seq_lens_k: NotRequired[Tensor]
    max_length_q: NotRequired[int]
    max_length_k: NotRequired[int]


class ClassificationOutput(NamedTuple):
    """What came out for one document."""

    logits_C: Tensor
    """Float32, in the order of the objective's labels."""
    label_index: int
    """The right class; ``UNLABELLED`` when only predicting."""


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of one label a document.

    Args:
        tokenizer: a fast tokenizer.
        labels: the classes in order.
        max_length: longest document in tokens.
        too_long: what happens to a longer one.
        pooling: which token of a document the head reads.
        packing: whether the model isolates documents packed into one row.
        own_forward: whether padded rows go through the model's own forward, which then pools.
    """

    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    max_length: int
    pooling: Literal["first", "last"]
    too_long: TooLong = "error"
    packing: bool = True
    own_forward: bool = True
    label_smoothing: float = 0.0

    @property
    def head(self) -> Literal["classification"]:
        """A classification head."""
        return "classification"

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens; labels are kept by name."""
        return tokenizer_fingerprint(
            self.tokenizer,
            objective="classification",
            max_length=self.max_length,
            too_long=self.too_long,
        )

    def encode(self, example: Example) -> list[EncodedExample]:
        """One encoded document, or none if it was too long and is dropped.

        A tokenizer without separators (most decoders) gets a pair joined by a line break.

        Raises:
            DataError: the document has no tokens, or is too long and ``too_long`` is "error".
        """
        if not isinstance(example, ClassificationExample):
            raise TypeError(f"{type(example).__name__} has no label")
        texts = (
            (example.text, example.text_pair) if example.text_pair is not None else (example.text,)
        )
        separated = self.tokenizer.num_special_tokens_to_add(
            pair=True
        ) > self.tokenizer.num_special_tokens_to_add(pair=False)
        if len(texts) == 2 and not separated:
            texts = ("\n".join(texts),)
        tokens = self.tokenizer(*texts, verbose=False)
        length = len(tokens["input_ids"])
        if not length:
            raise DataError(f"{example.where}: the text has no tokens")
        if length > self.max_length:
            if self.too_long == "drop":
                return []
            if self.too_long == "error":
                raise too_long_error(example.where, length, self.max_length)
            tokens = self.tokenizer(
                *texts, truncation=True, max_length=self.max_length, verbose=False
            )
        label = example.label or ""
        text_hash = content_hash(example.text, *([example.text_pair] if example.text_pair else []))
        return [
            EncodedExample(
                input_ids=tokens["input_ids"],
                targets=[0] * len(tokens["input_ids"]),
                token_type_ids=tokens.get("token_type_ids", []),
                labels=[label] if label else [],
                num_removed=length - len(tokens["input_ids"]),
                num_removed_targets=0,
                input_hash=text_hash,
                example_hash=content_hash(str(text_hash), label),
                num_bytes=0,
                where=example.where,
            )
        ]

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `ClassificationBatch`.

        Raises:
            DataError: a label the model does not have.
        """
        batch, starts_D = collate_tokens(
            examples, packing=self.packing, padding=self.tokenizer.pad_token_id or 0
        )
        batch["label_indices"] = torch.tensor([self._label_index(example) for example in examples])
        if self.packing or not self.own_forward:
            lengths_D = torch.tensor([len(example["input_ids"]) for example in examples])
            last = self.pooling == "last"
            batch["pooled_positions"] = starts_D + lengths_D - 1 if last else starts_D
        return batch

    def _label_index(self, example: EncodedExample) -> int:
        if not example["labels"]:
            return UNLABELLED
        label = example["labels"][0]
        try:
            return self.labels.index(label)
        except ValueError:
            raise DataError(
                f"{example['where']}: label {label!r} is not one of the model's labels: "
                f"{', '.join(self.labels)}",
                hint="add rows with this label to the training data, or drop the row",
            ) from None

    def num_targets(self, batch: Batch) -> int:
        """Documents of the batch; each has one label."""
        return int(batch["label_indices"].numel())

    def logits(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Scores before the softmax: float32 [D, C]."""
        inputs = model_inputs(batch, (*MODEL_INPUTS, "token_type_ids"))
        if "pooled_positions" not in batch:
            return cast(Tensor, model(**inputs).logits).float()
        hidden_DH = classification_states(model, inputs).flatten(0, 1)[batch["pooled_positions"]]
        return classification_logits(model, hidden_DH).float()

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Cross-entropy of every label, summed and not averaged: a float32 scalar."""
        return F.cross_entropy(
            self.logits(model, batch),
            batch["label_indices"],
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """Plain cross-entropy; ``outputs`` are a `ClassificationOutput` for each document."""
        with torch.no_grad():
            logits_DC = self.logits(model, batch)
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
