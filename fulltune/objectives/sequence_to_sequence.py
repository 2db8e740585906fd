"""Text to text on an encoder-decoder (T5): the encoder reads the source, the decoder the target.

Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer
(2020). Shape suffixes: B rows, S tokens of the sources, T tokens of the targets, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.data.special_text import encode_between, refuse_special_text_in
from fulltune.data.tasks import Example, SourceTargetExample
from fulltune.errors import DataError, ModelError
from fulltune.objectives.base import Batch, Scores, TooLong, token_scores, tokenizer_fingerprint
from fulltune.objectives.causal_lm import too_long_error
from fulltune.objectives.linear_cross_entropy import LossSums
from fulltune.objectives.plain_head import plain_head_losses
from fulltune.objectives.span_corruption import (
    collate_pairs,
    decoder_hidden_states,
    decoder_logit_scale,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SequenceToSequence:
    """Write the target of each source.

    An encoded example is the tokens of its source and then those of its target, each with its end
    token; only those of the target have a loss.

    Args:
        tokenizer: with an end and a padding token.
        max_length: longest source in tokens, prefix and end token included.
        max_target_length: longest target in tokens, its end token included.
        prefix: stands before every source; special tokens in it are the tokens, such as the mode
            tokens of UL2.
        too_long: what happens to a longer source or target. A source that is truncated keeps its
            end token; a target does not, so that no text is learned to end where it was cut.
        special_tokens: what happens to a source or target that holds the text of a special token.

    Raises:
        ModelError: the tokenizer has no end or no padding token.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_target_length: int
    prefix: str = ""
    too_long: TooLong = "error"
    special_tokens: Literal["error", "text"] = "text"
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("eos_token", "pad_token"):
            if getattr(self.tokenizer, name) is None:
                raise ModelError(
                    f"the tokenizer has no `{name}`, which source and target need",
                    hint="use a tokenizer made for T5",
                )

    @property
    def head(self) -> Literal["sequence_to_sequence"]:
        """The language-modelling head over a decoder."""
        return "sequence_to_sequence"

    @property
    def packing(self) -> bool:
        """Never: a decoder attends to all of its encoder's row."""
        return False

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens."""
        return tokenizer_fingerprint(
            self.tokenizer,
            objective="sequence_to_sequence",
            prefix=self.prefix,
            max_length=self.max_length,
            max_target_length=self.max_target_length,
            too_long=self.too_long,
            special_tokens=self.special_tokens,
        )

    @property
    def info(self) -> dict[str, Any]:
        """What `fulltune.json` must hold for predictions to be encoded as training was."""
        return {"prefix": self.prefix, "max_target_length": self.max_target_length}

    def encode(self, example: Example) -> list[EncodedExample]:
        """One encoded pair, or none where it is dropped.

        Raises:
            DataError: a side has no tokens, is too long and ``too_long`` is "error", or holds the
                text of a special token and ``special_tokens`` is "error".
        """
        assert isinstance(example, SourceTargetExample)
        assert example.target is not None, "only prediction does without the target"
        sources, whole_length = self._encode_source(example)
        refuse = self.special_tokens == "error"
        targets, _ = encode_text(
            self.tokenizer, example.target, name="target", where=example.where, refuse=refuse
        )
        targets.append(self._end)
        num_targets = len(targets)
        is_long = whole_length > self.max_length or num_targets > self.max_target_length
        if is_long and self.too_long == "drop":
            return []
        if is_long and self.too_long == "error":
            raise pair_too_long_error(
                example.where, whole_length, self.max_length, num_targets, self.max_target_length
            )
        targets = targets[: self.max_target_length]
        source = self.prefix + example.source
        return [
            EncodedExample(
                input_ids=[*sources, *targets],
                targets=[*[0] * len(sources), *[1] * len(targets)],
                token_type_ids=[],
                labels=[],
                num_removed=whole_length - len(sources) + num_targets - len(targets),
                num_removed_targets=num_targets - len(targets),
                input_hash=content_hash(source),
                example_hash=content_hash(source, "\0target", example.target),
                num_bytes=len(example.target.encode()),
                where=example.where,
                reference=example.target,
            )
        ]

    def prompt_ids(self, example: SourceTargetExample) -> list[int]:
        """What the encoder reads to answer a source.

        Raises:
            DataError: it has no tokens, or is too long and ``too_long`` is not "truncate".
        """
        sources, whole_length = self._encode_source(example)
        if whole_length > self.max_length and self.too_long != "truncate":
            raise too_long_error(example.where, whole_length, self.max_length)
        return sources

    def _encode_source(self, example: SourceTargetExample) -> tuple[list[int], int]:
        """Tokens of a source as far as they fit, and how many it has."""
        ids, _ = encode_text(
            self.tokenizer,
            example.source,
            before=self.prefix,
            name="source",
            where=example.where,
            refuse=self.special_tokens == "error",
        )
        return [*ids[: self.max_length - 1], self._end], len(ids) + 1

    @property
    def _end(self) -> int:
        end = self.tokenizer.eos_token_id
        assert isinstance(end, int)
        return end

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `SpanCorruptionBatch`."""
        padding = self.tokenizer.pad_token_id
        assert isinstance(padding, int)
        return collate_pairs([split_pair(example) for example in examples], padding=padding)

    def num_targets(self, batch: Batch) -> int:
        """Tokens of the targets, end tokens included."""
        return int(batch["target_ids"].numel())

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Cross-entropy of every target, summed and not averaged: a float32 scalar."""
        return self._losses(model, batch).loss_sum

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """Plain cross-entropy (no smoothing, no z-loss) and how often the first guess was right."""
        with torch.no_grad():
            sums = self._losses(model, batch)
        return token_scores(sums, batch["document_targets"])

    def _losses(self, model: PreTrainedModel, batch: Batch) -> LossSums:
        return plain_head_losses(
            model,
            batch,
            decoder_hidden_states(model, batch),
            scale=decoder_logit_scale(model.config),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )


def split_pair(example: EncodedExample) -> tuple[list[int], list[int]]:
    """Tokens of the source, or of the prompt up to the target, and of the target."""
    ids, targets = example["input_ids"], example["targets"]
    start = targets.index(1) if 1 in targets else len(targets)
    stop = start + sum(targets)  # a chat template may write layout after the answer
    return ids[:start], ids[start:stop]


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    before: str = "",
    after: str = "",
    name: str,
    where: str,
    refuse: bool,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a source or target between two texts of the settings, and their places.

    Args:
        tokenizer: a fast tokenizer.
        text: of the row; special tokens in it are letters, or refused.
        before: of the settings, in which special tokens are the tokens; and ``after`` likewise.
        after: see ``before``.
        name: the field, for errors.
        where: file and line, for errors.
        refuse: whether the text of a special token in ``text`` is an error.

    Raises:
        DataError: no token comes of it, or it holds the text of a special token.
    """
    if refuse:
        refuse_special_text_in(tokenizer, text, name=name, where=where)
    ids, offsets = encode_between(tokenizer, text, before=before, after=after)
    begin, stop = len(before), len(before) + len(text)
    # The token of a first word may begin with the space before it.
    if not any(start < stop and end > max(start, begin) for start, end in offsets):
        raise DataError(
            f"{where}: `{name}` has no tokens", hint="drop the row, or fill the field in"
        )
    return ids, offsets


def pair_too_long_error(
    where: str, source_length: int, max_length: int, target_length: int, max_target_length: int
) -> DataError:
    """The error of a source or target that does not fit."""
    if source_length > max_length:
        return too_long_error(where, source_length, max_length)
    return DataError(
        f"{where}: the target has {target_length:,} tokens, and at most {max_target_length:,} fit",
        hint="set `task.too_long` to `truncate` or `drop`, or raise `task.max_target_length`",
    )
