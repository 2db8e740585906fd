"""Permutation language modelling (XLNet): some tokens in a random order, each from those before it.

The content stream reads the tokens as they are. What a target must not know is kept from it by the
mask of who sees whom (`permutation_order`), never by `<mask>` in the input: a later target reads
the earlier ones, which is what tells the objective from masked language modelling.

Shape suffixes: B rows, L tokens of a window, P places for targets in a row, M tokens of memory,
N targets, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fulltune.data.arranged import Documents
from fulltune.data.boundaries import sentence_starts
from fulltune.data.encoding import SENTENCE_START, EncodedExample
from fulltune.data.streams import TokenStream
from fulltune.data.tasks import Example
from fulltune.errors import ConfigError, ModelError
from fulltune.objectives.base import Batch, Scores, token_scores, tokenizer_fingerprint
from fulltune.objectives.documents import encode_document
from fulltune.objectives.linear_cross_entropy import LossSums, linear_cross_entropy
from fulltune.objectives.permutation_noise import PermutationConfig, draw_window
from fulltune.objectives.permutation_order import BoolArray, word_starts
from fulltune.objectives.permutation_windows import PADDING_SEGMENT, Layout, PermutationWindows
from fulltune.objectives.two_streams import query_states, require_xlnet

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DOCUMENT_END = "<eod>"


class PermutationGroup(TypedDict):
    """Rows that go through the model together: nothing is padded, so no padding is remembered.

    rows:           of the batch.
    length:         tokens of their windows.
    memory_length:  tokens of their memories; 0 for none.
    """

    rows: list[int]
    length: int
    memory_length: int


class PermutationBatch(TypedDict):
    """A micro-batch of windows.

    input_ids:      int64 [B, L], ``[tokens ... <sep> <cls>]``, never masked, left-padded; with
                    pairs ``[tokens ... <sep> tokens ... <sep> <cls>]``.
    token_type_ids: int64 [B, L], 0 for tokens, 1 for those of a second segment, 2 for the class
                    token, 3 for padding.
    attention_mask: int64 [B, L], 1 on tokens and 0 on padding.
    perm_mask:      bool [B, L, L], true at [i, j] where i must not see j; of the query stream.
    target_mapping: float32 [B, P, L], one-hot rows: which token place p predicts. Rows of zeros
                    where an example has fewer than P targets.
    target_rows:    int64 [N], into the flattened [B * P]: the places that have a target.
    target_ids:     int64 [N], the token to be predicted there.
    document_targets: how many of them each window has, one after another.
    memory_ids:     int64 [B, M], the tokens read before each window, left-padded; with ``groups``.
    groups:         how the rows are run where examples have memories, else absent.
    backward:       bool [B], the rows whose text is reversed, its memory with it; absent where none
                    is.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    perm_mask: Tensor
    target_mapping: Tensor
    target_rows: Tensor
    target_ids: Tensor
    document_targets: list[int]
    memory_ids: NotRequired[Tensor]
    groups: NotRequired[list[PermutationGroup]]
    backward: NotRequired[Tensor]


@dataclass(frozen=True)
class PermutationLM:
    """Prediction of a share of each window's tokens in a random order.

    Args:
        tokenizer: a fast tokenizer with a separator and a class token: XLNet's or BERT's.
        max_length: tokens of a window with its separator and class token, without its memory.
        config: what is predicted, and the memory.

    Raises:
        ModelError: the tokenizer lacks one of the two tokens.
        ConfigError: a window has no room behind what is reused.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    config: PermutationConfig = field(default_factory=PermutationConfig)
    packing: Literal[False] = False

    def __post_init__(self) -> None:
        for token, name in (
            (self.tokenizer.sep_token_id, "separator (`<sep>`)"),
            (self.tokenizer.cls_token_id, "class (`<cls>`)"),
        ):
            if token is None:
                raise ModelError(
                    f"the tokenizer has no {name} token, which XLNet's windows end with",
                    hint="use the tokenizer of an XLNet or a BERT, or name the token in "
                    "tokenizer_config.json",
                )
        most = self._layout.text_tokens - (2 if self.config.pairs else 1)
        if self.config.reuse_length > most:
            raise ConfigError(
                f"`permutation.reuse_length` is {self.config.reuse_length:,}, which leaves no text "
                f"behind it in windows of {self.max_length:,} tokens",
                hint=f"give at most {most:,}; XLNet's is half of the window",
            )

    @property
    def head(self) -> Literal["permutation_lm"]:
        """XLNet with its language-modelling head."""
        return "permutation_lm"

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens."""
        return tokenizer_fingerprint(
            self.tokenizer, objective="permutation_lm", sentences=self.config.pairs
        )

    @cached_property
    def _starts_V(self) -> BoolArray:
        return word_starts(self.tokenizer)

    def encode(self, example: Example) -> list[EncodedExample]:
        """All tokens of a text, uncut and without special tokens; nothing where it has none."""
        boundaries = _sentence_boundaries if self.config.pairs else None
        return encode_document(self.tokenizer, example, boundaries=boundaries)

    def arrange(
        self, documents: Documents, indices: Sequence[int] | npt.NDArray[np.integer], seed: int
    ) -> PermutationWindows:
        """The windows of one split's documents, each document followed by its end token.

        The end token is ``<eod>`` where the tokenizer has it, as the authors' is, else ``<sep>``.
        """
        sep_id, cls_id = self._functional_ids
        stream = TokenStream(
            documents,
            indices,
            seed,
            window_tokens=self._layout.step,
            end_id=self.tokenizer.get_vocab().get(_DOCUMENT_END, sep_id),
            boundaries=self.config.pairs,
        )
        return PermutationWindows(stream, self._layout, seed=seed, sep_id=sep_id, cls_id=cls_id)

    @property
    def _layout(self) -> Layout:
        return Layout(
            self.max_length,
            memory_length=self.config.memory_length,
            reuse_length=self.config.reuse_length,
            pairs=self.config.pairs,
            backward=self.config.backward,
        )

    @property
    def _functional_ids(self) -> tuple[int, int]:
        return int(self.tokenizer.sep_token_id), int(self.tokenizer.cls_token_id)

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `PermutationBatch`.

        All chance of an example comes from its ``noise_seed``, or its hash in evaluation.
        """
        windows = [
            draw_window(
                example,
                self.config,
                starts_V=self._starts_V,
                functional_ids=self._functional_ids,
            )
            for example in examples
        ]
        length = max(len(window.ids_L) for window in windows)
        places = max(1, *(len(window.targets_P) for window in windows))
        shape = (len(windows), length)
        ids_BL = np.full(shape, self.tokenizer.pad_token_id or 0, dtype=np.int64)
        segments_BL = np.full(shape, PADDING_SEGMENT, dtype=np.int64)
        attention_BL = np.zeros(shape, dtype=np.int64)
        hidden_BLL = np.zeros((*shape, length), dtype=np.bool_)
        mapping_BPL = np.zeros((len(windows), places, length), dtype=np.float32)
        target_rows: list[npt.NDArray[np.int64]] = []
        for row, window in enumerate(windows):
            start = length - len(window.ids_L)
            ids_BL[row, start:] = window.ids_L
            segments_BL[row, start:] = window.segments_L
            attention_BL[row, start:] = 1
            hidden_BLL[row, start:, start:] = window.hidden_LL
            places_P = np.arange(len(window.targets_P))
            mapping_BPL[row, places_P, start + window.targets_P] = 1
            target_rows.append(row * places + places_P)
        batch: Batch = {
            "input_ids": torch.from_numpy(ids_BL),
            "token_type_ids": torch.from_numpy(segments_BL),
            "attention_mask": torch.from_numpy(attention_BL),
            "perm_mask": torch.from_numpy(hidden_BLL),
            "target_mapping": torch.from_numpy(mapping_BPL),
            "target_rows": torch.from_numpy(np.concatenate(target_rows)),
            "target_ids": torch.from_numpy(
                np.concatenate([window.ids_L[window.targets_P] for window in windows])
            ),
            "document_targets": [len(window.targets_P) for window in windows],
        }
        if any(window.backward for window in windows):
            batch["backward"] = torch.tensor([window.backward for window in windows])
        longest = max(len(window.memory_M) for window in windows)
        if longest:
            memory_BM = np.full((len(windows), longest), self.tokenizer.pad_token_id or 0, np.int64)
            groups: dict[tuple[int, int], list[int]] = {}
            for row, window in enumerate(windows):
                memory_BM[row, longest - len(window.memory_M) :] = window.memory_M
                groups.setdefault((len(window.ids_L), len(window.memory_M)), []).append(row)
            batch["memory_ids"] = torch.from_numpy(memory_BM)
            batch["groups"] = [
                PermutationGroup(rows=rows, length=tokens, memory_length=memory)
                for (tokens, memory), rows in sorted(groups.items())
            ]
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Tokens of the batch that are predicted."""
        return int(batch["target_ids"].numel())

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Cross-entropy of every target, summed and not averaged: a float32 scalar.

        Raises:
            ModelError: the model is no XLNet, or its config would change what it remembers.
        """
        return self._losses(model, batch).loss_sum

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """The same loss, and how often the first guess was right."""
        with torch.no_grad():
            sums = self._losses(model, batch)
        return token_scores(sums, batch["document_targets"])

    def _losses(self, model: PreTrainedModel, batch: Batch) -> LossSums:
        require_xlnet(model, batch)
        hidden_NH = query_states(model, batch).flatten(0, 1)[batch["target_rows"]]
        head = model.get_output_embeddings()
        return linear_cross_entropy(hidden_NH, head.weight, batch["target_ids"], bias_V=head.bias)


def _sentence_boundaries(encoding: Encoding, text: str) -> list[int]:
    starts = sentence_starts(text, encoding.offsets)
    return [SENTENCE_START * start for start in starts]
