"""Documents as tokens, and one vector of scores for each: what objectives of whole texts share.

Shape suffixes: D documents, B rows, T tokens, H hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.errors import DataError
from fulltune.models.families import classification_logits, classification_states
from fulltune.objectives.base import (
    Batch,
    TooLong,
    collate_tokens,
    model_inputs,
    tokenizer_fingerprint,
)
from fulltune.objectives.causal_lm import MODEL_INPUTS, too_long_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class DocumentBatch(TypedDict):
    """A micro-batch of whole documents.

    input_ids:      int64 [1, T] packed documents, or [B, T] right-padded where packing is off.
    pooled_positions: int64 [D], into the flattened tokens: the token whose hidden state the head
                    reads, the first or the last of each document; absent where transformers' own
                    forward chooses it.
    token_type_ids: int64, shaped like ``input_ids``; absent where the model has no segments.
    attention_mask: int64 [B, T], 1 on tokens and 0 on padding; absent when packed.
    position_ids, cu_seq_lens_q, ...: document boundaries, present when packed.
    """

    input_ids: Tensor
    pooled_positions: NotRequired[Tensor]
    token_type_ids: NotRequired[Tensor]
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    cu_seq_lens_q: NotRequired[Tensor]
    cu_seq_lens_k: NotRequired[Tensor]
    max_length_q: NotRequired[int]
    max_length_k: NotRequired[int]


@dataclass(frozen=True)
class DocumentReader:
    """How a model reads whole documents; the objectives of whole texts add what is to be told.

    Args:
        tokenizer: a fast tokenizer.
        max_length: longest document in tokens.
        pooling: which token of a document the head reads.
        too_long: what happens to a longer document.
        packing: whether the model isolates documents packed into one row.
        own_forward: whether padded rows go through the model's own forward, which then pools.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    pooling: Literal["first", "last"]
    too_long: TooLong = "error"
    packing: bool = True
    own_forward: bool = True

    @property
    def fingerprint(self) -> str:
        """Changes whenever other tokens would come out; labels are kept by name."""
        return tokenizer_fingerprint(
            self.tokenizer,
            objective="classification",
            max_length=self.max_length,
            too_long=self.too_long,
        )

    def encode_document(
        self, text: str, text_pair: str | None, labels: Sequence[str], *, where: str
    ) -> list[EncodedExample]:
        """One encoded document, or none if it was too long and is dropped.

        A tokenizer without separators (most decoders) gets a pair joined by a line break.

        Raises:
            DataError: the document has no tokens, or is too long and ``too_long`` is "error".
        """
        texts = (text, text_pair) if text_pair is not None else (text,)
        separated = self.tokenizer.num_special_tokens_to_add(
            pair=True
        ) > self.tokenizer.num_special_tokens_to_add(pair=False)
        if len(texts) == 2 and not separated:
            texts = ("\n".join(texts),)
        tokens = self.tokenizer(*texts, verbose=False)
        length = len(tokens["input_ids"])
        if not length:
            raise DataError(f"{where}: the text has no tokens")
        if length > self.max_length:
            if self.too_long == "drop":
                return []
            if self.too_long == "error":
                raise too_long_error(where, length, self.max_length)
            tokens = self.tokenizer(
                *texts, truncation=True, max_length=self.max_length, verbose=False
            )
        text_hash = content_hash(text, *([text_pair] if text_pair else []))
        return [
            EncodedExample(
                input_ids=tokens["input_ids"],
                targets=[0] * len(tokens["input_ids"]),
                token_type_ids=tokens.get("token_type_ids", []),
                labels=list(labels),
                num_removed=length - len(tokens["input_ids"]),
                num_removed_targets=0,
                input_hash=text_hash,
                example_hash=content_hash(str(text_hash), *labels),
                num_bytes=0,
                where=where,
            )
        ]

    def collate_documents(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass, without what is right; see `DocumentBatch`."""
        batch, starts_D = collate_tokens(
            examples, packing=self.packing, padding=self.tokenizer.pad_token_id or 0
        )
        if self.packing or not self.own_forward:
            lengths_D = torch.tensor([len(example["input_ids"]) for example in examples])
            last = self.pooling == "last"
            batch["pooled_positions"] = starts_D + lengths_D - 1 if last else starts_D
        return batch


def document_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What the head gives for each document: float32 [D, C]."""
    inputs = model_inputs(batch, (*MODEL_INPUTS, "token_type_ids"))
    if "pooled_positions" not in batch:
        return cast(Tensor, model(**inputs).logits).float()
    hidden_DH = classification_states(model, inputs).flatten(0, 1)[batch["pooled_positions"]]
    return classification_logits(model, hidden_DH).float()
