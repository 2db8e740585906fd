"""Prediction of masked tokens (BERT, Devlin et al. 2019).

Shape suffixes: B rows, T tokens, H hidden size, E size of the output embedding, N masked positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Self, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from fulltune.config import Settings
from fulltune.data.arranged import ArrangedExamples, Documents
from fulltune.data.boundaries import join_chinese_words, sentence_starts, word_starts
from fulltune.data.encoding import SENTENCE_START, WORD_START, EncodedExample
from fulltune.data.tasks import Example
from fulltune.data.windows import Windows
from fulltune.errors import ConfigError, ModelError
from fulltune.models.families import masked_hidden_states
from fulltune.objectives.base import (
    Batch,
    Scores,
    collate_tokens,
    model_inputs,
    token_scores,
    tokenizer_fingerprint,
)
from fulltune.objectives.documents import encode_document
from fulltune.objectives.linear_cross_entropy import LossSums, linear_cross_entropy
from fulltune.objectives.noise import noise_generator

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_INPUTS = (
    "input_ids", "token_type_ids", "attention_mask", "position_ids",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip

MASK_SHARE = 0.8
KEEP_SHARE = 0.1
"""What becomes of a chosen token: the mask, itself, or else any ordinary token."""


class MaskingConfig(Settings):
    """Which tokens are hidden from the model."""

    rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens of each example that are predicted, at least one token; with
    `whole_words` as many words as fit into it, so that of an example of long words none may."""
    evaluate_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """The same of held-out text: fixed, so that runs trained at different rates can be compared
    (ModernBERT trains at 0.3 and is measured at 0.15)."""
    max_masked: Annotated[int, Field(ge=1)] | None = None
    """Most predicted tokens of an example; null is no limit."""
    whole_words: bool = False
    """Whether all pieces of a word are predicted, or none."""
    max_ngram: Annotated[int, Field(ge=1)] = 1
    """With `whole_words`: most words that are chosen at once, side by side; their number n is drawn
    with a probability in proportion to 1/n (ALBERT: 3)."""
    chinese_words: bool = False
    """Whether Chinese characters make words of several, as `jieba` cuts them (the extra `chinese`);
    with `whole_words` only."""

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self) -> Self:
        for name in ("max_ngram", "chinese_words"):
            if (
                not self.whole_words
                and getattr(self, name) != type(self).model_fields[name].default
            ):
                raise ValueError(f"`{name}` has no effect without `whole_words: true`; set it")
        return self


class MaskedBatch(TypedDict):
    """A micro-batch for masked tokens.

    input_ids:        int64 [1, T] packed examples, or [B, T] right-padded where packing is off,
                      with masks and random tokens in place.
    target_positions: int64 [N], into the flattened [B * T] tokens: where a token is predicted.
    target_ids:       int64 [N], the token that stood there. There is no ignored value.
    document_targets: how many of them each example has, one after another.
    token_type_ids:   int64 as ``input_ids``, for pairs of segments only.
    attention_mask:   int64 [B, T], 1 on tokens and 0 on padding; absent when packed.
    position_ids, cu_seq_lens_q, ...: boundaries of the examples, present when packed.
    """

    input_ids: Tensor
    target_positions: Tensor
    target_ids: Tensor
    document_targets: list[int]
    token_type_ids: NotRequired[Tensor]
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    cu_seq_lens_q: NotRequired[Tensor]
    cu_seq_lens_k: NotRequired[Tensor]
    max_length_q: NotRequired[int]
    max_length_k: NotRequired[int]


@dataclass(frozen=True)
class MaskedLM:
    """Cross-entropy of the tokens chosen in each example, from what stands around them.

    The chosen tokens are drawn anew in each epoch (RoBERTa, Liu et al. 2019).

    Args:
        tokenizer: a fast tokenizer with tokens for mask, start and separator.
        max_length: longest example in tokens, special tokens included.
        masking: how many tokens are chosen, and in which groups.
        packing: whether the model isolates examples packed into one row.

    Raises:
        ModelError: the tokenizer lacks one of the tokens.
        ConfigError: ``max_length`` leaves no room for a token.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    packing: bool = True

    def __post_init__(self) -> None:
        for name in ("mask_token", "cls_token", "sep_token"):
            if getattr(self.tokenizer, name) is None:
                raise ModelError(
                    f"the tokenizer of `{self.tokenizer.name_or_path}` has no `{name}`, which "
                    "masked-token training needs",
                    hint="choose an encoder such as BERT, RoBERTa or ModernBERT with its tokenizer",
                )
        if self.max_length < 3:
            raise ConfigError(
                f"`max_length` is {self.max_length}: two special tokens leave no room for text",
                hint="set it to 3 or more",
            )

    @property
    def head(self) -> Literal["masked_lm"]:
        """The masked-LM head."""
        return "masked_lm"

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens."""
        return tokenizer_fingerprint(
            self.tokenizer, objective="masked_lm", chinese_words=self._joins_chinese
        )

    @property
    def _joins_chinese(self) -> bool:
        return self.masking.whole_words and self.masking.chinese_words

    def encode(self, example: Example) -> list[EncodedExample]:
        """The whole document without special tokens, with its words and sentences marked.

        There is none where the text has no token.
        """
        return encode_document(self.tokenizer, example, boundaries=self._boundaries)

    def _boundaries(self, encoding: Encoding, text: str) -> list[int]:
        words = word_starts(encoding)
        if self._joins_chinese:
            words = join_chinese_words(words, encoding.offsets, text)
        sentences = sentence_starts(text, encoding.offsets)
        return [
            WORD_START * word + SENTENCE_START * sentence
            for word, sentence in zip(words, sentences, strict=True)
        ]

    def arrange(
        self, documents: Documents, indices: Sequence[int] | npt.NDArray[Any], seed: int
    ) -> ArrangedExamples:
        """Windows of the documents between the tokenizer's start and separator; no draw is made."""
        return Windows(
            documents,
            indices,
            num_tokens=self.max_length - 2,
            before=[self.tokenizer.cls_token_id],
            after=[self.tokenizer.sep_token_id],
        )

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `MaskedBatch`."""
        batch, _, num_masked = self.collate_masked(examples)
        batch["document_targets"] = num_masked
        return batch

    def collate_masked(self, examples: Sequence[EncodedExample]) -> tuple[Batch, Tensor, list[int]]:
        """The batch, where each example starts in it (int64 [D]), and its masked tokens each."""
        hidden, positions = [], []
        for example in examples:
            chosen, input_ids = self._mask(example)
            hidden.append(cast(EncodedExample, {**example, "input_ids": input_ids}))
            positions.append(chosen)
        batch, starts_D = collate_tokens(
            hidden, packing=self.packing, padding=self.tokenizer.pad_token_id or 0
        )
        pairs = list(zip(examples, positions, strict=True))
        batch["target_positions"] = torch.tensor(
            [
                start + position
                for start, chosen in zip(starts_D.tolist(), positions, strict=True)
                for position in chosen
            ],
            dtype=torch.int64,
        )
        batch["target_ids"] = torch.tensor(
            [example["input_ids"][position] for example, chosen in pairs for position in chosen],
            dtype=torch.int64,
        )
        return batch, starts_D, [len(chosen) for chosen in positions]

    def _mask(self, example: EncodedExample) -> tuple[list[int], list[int]]:
        """The chosen positions of an example in order, and its tokens with those replaced."""
        generator = noise_generator(example)
        input_ids = np.array(example["input_ids"], dtype=np.int64)
        allowed = np.array(example["targets"], dtype=bool) & ~np.isin(input_ids, self._special_ids)
        maskable = np.flatnonzero(allowed)
        # As many in every example of a length, and not each token by chance.
        rate = self.masking.rate if "noise_seed" in example else self.masking.evaluate_rate
        budget = min(
            self.masking.max_masked or len(maskable),
            max(1, round(rate * len(maskable))),
            len(maskable),
        )
        if self.masking.whole_words:
            chosen = _choose_words(
                maskable,
                example.get("boundaries", []),
                budget,
                generator,
                max_ngram=self.masking.max_ngram,
            )
        else:
            chosen = np.sort(generator.permutation(maskable)[:budget])
        draw = generator.random(len(chosen))
        others = generator.choice(self._ordinary_ids, len(chosen))
        replaced = np.where(draw < MASK_SHARE, self.tokenizer.mask_token_id, others)
        kept = (draw >= MASK_SHARE) & (draw < MASK_SHARE + KEEP_SHARE)
        input_ids[chosen] = np.where(kept, input_ids[chosen], replaced)
        return chosen.tolist(), input_ids.tolist()

    @cached_property
    def _special_ids(self) -> npt.NDArray[np.int64]:
        return np.array(sorted(set(self.tokenizer.all_special_ids)), dtype=np.int64)

    @cached_property
    def _ordinary_ids(self) -> npt.NDArray[np.int64]:
        ids = set(self.tokenizer.get_vocab().values()) - set(self.tokenizer.all_special_ids)
        return np.array(sorted(ids), dtype=np.int64)

    def num_targets(self, batch: Batch) -> int:
        """Tokens of the batch that are predicted."""
        return int(batch["target_ids"].numel())

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Cross-entropy of every target, summed and not averaged: a float32 scalar."""
        return masked_losses(model, batch, last_hidden_states(model, batch)).loss_sum

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """The same loss, and how often the first guess was the hidden token."""
        with torch.no_grad():
            sums = masked_losses(model, batch, last_hidden_states(model, batch))
        return token_scores(sums, batch["document_targets"])


def last_hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The body's last hidden states at all tokens, [B * T, H]."""
    output = model.base_model(**model_inputs(batch, MODEL_INPUTS))
    hidden_TH: Tensor = output.last_hidden_state.flatten(0, 1)
    return hidden_TH


def masked_losses(model: PreTrainedModel, batch: Batch, hidden_TH: Tensor) -> LossSums:
    """The head's loss on the masked tokens of a batch."""
    hidden_NE = masked_hidden_states(model, hidden_TH[batch["target_positions"]])
    decoder = model.get_output_embeddings()
    return linear_cross_entropy(
        hidden_NE, decoder.weight, batch["target_ids"], bias_V=getattr(decoder, "bias", None)
    )


def _choose_words(
    maskable: npt.NDArray[np.int64],
    boundaries: Sequence[int],
    budget: int,
    generator: np.random.Generator,
    *,
    max_ngram: int = 1,
) -> npt.NDArray[np.int64]:
    """Positions of words drawn one after another, each taken if it still fits the budget.

    Each is the first of a run of n words, n in 1..``max_ngram`` with p(n) ~ 1/n. Of a run that does
    not fit, or that meets one taken before, as many words are taken as can be.
    """
    marks = np.array(boundaries, dtype=np.int64)[maskable]
    begins = (marks & WORD_START).astype(bool)
    # What stood between was a special token, so a word does not go on behind it.
    apart = np.append(True, np.diff(maskable) > 1)
    begins |= apart
    words = np.split(maskable, np.flatnonzero(begins[1:]) + 1)
    is_first = apart[np.flatnonzero(begins)]
    shares = 1 / np.arange(1, max_ngram + 1)
    shares /= shares.sum()
    taken = np.zeros(len(words), dtype=bool)
    for index in generator.permutation(len(words)).tolist():
        # Words of one are drawn as they always were.
        count = 1 if max_ngram == 1 else 1 + int(generator.choice(max_ngram, p=shares))
        for word in range(index, min(index + count, len(words))):
            parted = word > index and is_first[word]
            if taken[word] or parted or len(words[word]) > budget:
                break
            taken[word] = True
            budget -= len(words[word])
        if not budget:
            break
    chosen = [word for word, is_taken in zip(words, taken, strict=True) if is_taken]
    return np.concatenate(chosen) if chosen else maskable[:0]
