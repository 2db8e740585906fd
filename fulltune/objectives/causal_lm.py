"""Next-token prediction (GPT): conversations and plain text.

Shape suffixes: B rows, T tokens, H hidden size, N targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from fulltune.data.chat import encode_segments, render_conversation
from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.data.special_text import refuse_special_text
from fulltune.data.tasks import ChatExample, Example, TextExample
from fulltune.errors import DataError, ModelError
from fulltune.models.evaluation_mode import evaluation_mode
from fulltune.objectives.base import (
    Batch,
    Scores,
    TooLong,
    collate_tokens,
    model_inputs,
    token_scores,
    tokenizer_fingerprint,
)
from fulltune.objectives.linear_cross_entropy import LossSums
from fulltune.objectives.plain_head import is_plain, logit_scale, plain_head_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_INPUTS = (
    "input_ids", "attention_mask", "position_ids",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip


class CausalBatch(TypedDict):
    """A micro-batch for next-token prediction.

    input_ids:      int64 [1, T] packed documents, or [B, T] right-padded where packing is off.
    prediction_positions: int64 [N], into the flattened [B * T] tokens: where a target is predicted,
                    which is one token before it. Never the last token of a document.
    target_ids:     int64 [N], the token to be predicted there. There is no ignored value.
    document_targets: targets of each document, which stand in ``target_ids`` one after another.
    attention_mask: int64 [B, T], 1 on tokens and 0 on padding; absent when packed.
    position_ids, cu_seq_lens_q, ...: document boundaries, present when packed.
    """

    input_ids: Tensor
    prediction_positions: Tensor
    target_ids: Tensor
    document_targets: list[int]
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    cu_seq_lens_q: NotRequired[Tensor]
    cu_seq_lens_k: NotRequired[Tensor]
    max_length_q: NotRequired[int]
    max_length_k: NotRequired[int]


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction on the target tokens of each document.

    Args:
        tokenizer: a fast tokenizer, with a chat template where conversations are encoded.
        max_length: longest document in tokens.
        too_long: what happens to a longer conversation; a longer text is cut into windows that
            overlap by one token, so that each of its tokens but the first is a target exactly once.
        packing: whether the model isolates documents packed into one row.
        special_tokens: what happens to a message that holds the text of a special token.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    too_long: TooLong = "error"
    packing: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    special_tokens: Literal["error", "text"] = "text"

    @property
    def head(self) -> Literal["causal_lm"]:
        """The language-modelling head."""
        return "causal_lm"

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens."""
        return tokenizer_fingerprint(
            self.tokenizer,
            objective="causal_lm",
            max_length=self.max_length,
            too_long=self.too_long,
            special_tokens=self.special_tokens,
        )

    def encode(self, example: Example) -> list[EncodedExample]:
        """One encoded conversation, or the windows of a text.

        Raises:
            DataError: a conversation is longer than ``max_length`` and ``too_long`` is "error", or
                holds the text of a special token and ``special_tokens`` is "error".
        """
        if isinstance(example, ChatExample):
            return self._encode_chat(example)
        if isinstance(example, TextExample):
            return self._encode_text(example)
        raise TypeError(f"{type(example).__name__} has no next-token targets")

    def _encode_chat(self, example: ChatExample) -> list[EncodedExample]:
        if self.special_tokens == "error":
            refuse_special_text(self.tokenizer, example.messages, where=example.where)
        segments = render_conversation(self.tokenizer, example.messages, where=example.where)
        input_ids, targets = encode_segments(self.tokenizer, segments)
        if not input_ids:
            raise DataError(f"{example.where}: the conversation has no tokens")
        targets[0] = 0  # nothing stands before it to predict it from
        kept = len(input_ids)
        if kept > self.max_length:
            if self.too_long == "drop":
                return []
            if self.too_long == "error":
                raise too_long_error(example.where, kept, self.max_length)
            kept = self.max_length
        trained = [segment.text for segment in segments if segment.trained]
        context = [segment.text for segment in segments if not segment.trained]
        return [
            EncodedExample(
                input_ids=input_ids[:kept],
                targets=targets[:kept],
                token_type_ids=[],
                labels=[],
                num_removed=len(input_ids) - kept,
                num_removed_targets=sum(targets[kept:]),
                input_hash=content_hash(*context),
                example_hash=content_hash(*context, "\0answers", *trained),
                num_bytes=sum(len(text.encode()) for text in trained),
                where=example.where,
            )
        ]

    def _encode_text(self, example: TextExample) -> list[EncodedExample]:
        encoding = self.tokenizer.backend_tokenizer.encode(example.text, add_special_tokens=True)
        input_ids, offsets = list(encoding.ids), list(encoding.offsets)
        end = self.tokenizer.eos_token_id
        if end is not None and (not input_ids or input_ids[-1] != end):
            input_ids.append(end)  # the document ends here, and the model learns that
            offsets.append((len(example.text), len(example.text)))
        # Where the text ends that so many tokens stand for. Cut there, a character that two windows
        # share counts once and the space between two tokens counts too; an end token that the
        # tokenizer adds lies at (0, 0) and counts nothing.
        ends = list(accumulate((end for _, end in offsets), max, initial=0))
        document_hash = content_hash(example.text)
        windows: list[EncodedExample] = []
        for start in range(0, max(len(input_ids) - 1, 1), self.max_length - 1):
            window = input_ids[start : start + self.max_length]
            # Nothing predicts the window's first token, if it has any.
            first, last = ends[min(start + 1, len(input_ids))], ends[start + len(window)]
            windows.append(
                EncodedExample(
                    input_ids=window,
                    targets=[0, *[1] * (len(window) - 1)],
                    token_type_ids=[],
                    labels=[],
                    num_removed=0,
                    num_removed_targets=0,
                    input_hash=document_hash,
                    example_hash=content_hash(example.text, str(start)),
                    num_bytes=len(example.text[first:last].encode()),
                    where=example.where,
                )
            )
        return windows

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `CausalBatch`."""
        batch, starts_D = collate_tokens(
            examples, packing=self.packing, padding=self.tokenizer.pad_token_id or 0
        )
        positions_of = [
            [start + index for index, target in enumerate(example["targets"]) if target and index]
            for start, example in zip(starts_D.tolist(), examples, strict=True)
        ]
        target_positions = torch.tensor(list(chain.from_iterable(positions_of)), dtype=torch.int64)
        batch["target_ids"] = batch["input_ids"].flatten()[target_positions]
        batch["prediction_positions"] = target_positions - 1
        batch["document_targets"] = [len(positions) for positions in positions_of]
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Tokens of the batch that are predicted."""
        return int(batch["target_ids"].numel())

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Cross-entropy of every target, summed and not averaged: a float32 scalar."""
        return self._losses(model, batch).loss_sum

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """Plain cross-entropy (no smoothing, no z-loss) and how often the first guess was right.

        ``outputs`` are a `DocumentScore` for each document.
        """
        with torch.no_grad():
            sums = self._losses(model, batch)
        return token_scores(sums, batch["document_targets"])

    def _losses(self, model: PreTrainedModel, batch: Batch) -> LossSums:
        output = model.base_model(**model_inputs(batch, MODEL_INPUTS), use_cache=False)
        return plain_head_losses(
            model,
            batch,
            output.last_hidden_state,
            scale=logit_scale(model.config),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )


@torch.no_grad()
def require_plain_head(model: PreTrainedModel) -> None:
    """See that a model's logits are what the loss takes them for: hidden states times weights.

    RoFormer, BigBird and ModernBERT's decoder transform the hidden states once more in between.

    Raises:
        ModelError: they are not, found by trying on a few tokens.
    """
    device = next(model.parameters()).device
    ids_BT = torch.arange(min(8, model.config.get_text_config().vocab_size), device=device)[None]
    with evaluation_mode(model):
        own_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
        hidden_BTH = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    if not is_plain(model, hidden_BTH, own_BTV, scale=logit_scale(model.config)):
        raise ModelError(
            f"models of type `{model.config.model_type}` do not multiply the last hidden states by "
            "the output weights alone, as the loss does",
            hint="use a decoder such as Llama, Qwen, Gemma or GPT-2",
        )


def too_long_error(where: str, length: int, max_length: int) -> DataError:
    """The error of an example that does not fit."""
    return DataError(
        f"{where}: the example has {length:,} tokens, and at most {max_length:,} fit",
        hint="set `task.too_long` to `truncate` or `drop`, or raise `task.max_length` "
        "up to the model's context; `fulltune preview` lists the longest rows",
    )
