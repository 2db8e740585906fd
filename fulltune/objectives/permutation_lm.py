"""Permutation language modelling (XLNet): some tokens in a random order, each from those before it.

The content stream reads the tokens as they are. What a target must not know is kept from it by the
mask of who sees whom (`permutation_order`), never by `<mask>` in the input: a later target reads
the earlier ones, which is what tells the objective from masked language modelling.

Shape suffixes: B rows, L tokens of a window, P places for targets in a row, M tokens of memory,
N targets, H hidden size, G rows of one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Self, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from fulltune.config import Settings
from fulltune.data.arranged import Documents
from fulltune.data.encoding import EncodedExample
from fulltune.data.streams import TokenStream
from fulltune.data.tasks import Example
from fulltune.errors import ModelError
from fulltune.objectives.base import Batch, Scores, token_scores, tokenizer_fingerprint
from fulltune.objectives.documents import encode_document
from fulltune.objectives.linear_cross_entropy import LossSums, linear_cross_entropy
from fulltune.objectives.noise import noise_generator
from fulltune.objectives.permutation_order import (
    BoolArray,
    choose_targets,
    draw_order,
    permutation_mask,
    word_starts,
)
from fulltune.objectives.permutation_windows import (
    PADDING_SEGMENT,
    TEXT_SEGMENT,
    PermutationWindows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DOCUMENT_END = "<eod>"


class PermutationConfig(Settings):
    """What is predicted, in which order, and from how much text before it."""

    predict_share: Annotated[float, Field(gt=0, le=1)] = 1 / 6
    """Share of a window's tokens that are predicted: 85 of 512."""
    mask_alpha: Annotated[int, Field(ge=1)] = 6
    """Tokens of context for each `mask_beta` tokens of a predicted span."""
    mask_beta: Annotated[int, Field(ge=1)] = 1
    """See `mask_alpha`."""
    max_span: Annotated[int, Field(ge=1)] = 5
    """Longest span; its length n is drawn with a probability in proportion to 1/n."""
    perm_size: Annotated[int, Field(ge=1)] = 256
    """Tokens that are permuted among themselves; such blocks follow each other in order."""
    memory_length: Annotated[int, Field(ge=0)] = 0
    """Most tokens before a window that it can look back on; they are read without gradient."""

    @model_validator(mode="after")
    def _spans_have_context(self) -> Self:
        if self.mask_alpha < self.mask_beta:
            raise ValueError("`mask_alpha` must be at least `mask_beta`")
        return self


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

    input_ids:      int64 [B, L], ``[tokens ... <sep> <cls>]``, never masked, left-padded.
    token_type_ids: int64 [B, L], 0 for tokens, 2 for the class token, 3 for padding.
    attention_mask: int64 [B, L], 1 on tokens and 0 on padding.
    perm_mask:      bool [B, L, L], true at [i, j] where i must not see j; of the query stream.
    target_mapping: float32 [B, P, L], one-hot rows: which token place p predicts. Rows of zeros
                    where an example has fewer than P targets.
    target_rows:    int64 [N], into the flattened [B * P]: the places that have a target.
    target_ids:     int64 [N], the token to be predicted there.
    memory_ids:     int64 [B, M], the tokens before each window, left-padded; with ``groups``.
    groups:         how the rows are run where examples have memories, else absent.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    perm_mask: Tensor
    target_mapping: Tensor
    target_rows: Tensor
    target_ids: Tensor
    memory_ids: NotRequired[Tensor]
    groups: NotRequired[list[PermutationGroup]]


@dataclass(frozen=True)
class PermutationLM:
    """Prediction of a share of each window's tokens in a random order.

    Args:
        tokenizer: a fast tokenizer with a separator and a class token: XLNet's or BERT's.
        max_length: tokens of a window with its separator and class token, without its memory.
        config: what is predicted, and the memory.

    Raises:
        ModelError: the tokenizer lacks one of the two tokens.
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

    @property
    def head(self) -> Literal["permutation_lm"]:
        """XLNet with its language-modelling head."""
        return "permutation_lm"

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens."""
        return tokenizer_fingerprint(self.tokenizer, objective="permutation_lm")

    @cached_property
    def _starts_V(self) -> BoolArray:
        return word_starts(self.tokenizer)

    def encode(self, example: Example) -> list[EncodedExample]:
        """All tokens of a text, uncut and without special tokens; nothing where it has none."""
        return encode_document(self.tokenizer, example)

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
            window_tokens=self.max_length - 2,
            end_id=self.tokenizer.get_vocab().get(_DOCUMENT_END, sep_id),
        )
        return PermutationWindows(
            stream, memory_length=self.config.memory_length, sep_id=sep_id, cls_id=cls_id
        )

    @property
    def _functional_ids(self) -> tuple[int, int]:
        return int(self.tokenizer.sep_token_id), int(self.tokenizer.cls_token_id)

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `PermutationBatch`.

        All chance of an example comes from its ``noise_seed``, or its hash in evaluation.
        """
        windows = [self._window(example) for example in examples]
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
        }
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

    def _window(self, example: EncodedExample) -> _Window:
        ids = np.asarray(example["input_ids"], dtype=np.int64)
        allowed = np.asarray(example["targets"], dtype=np.bool_)
        memory = int(allowed.argmax())  # 0 also where nothing may be predicted
        ids_L, allowed_L = ids[memory:], allowed[memory:]
        functional_L = np.isin(ids_L, self._functional_ids)
        candidates_L = allowed_L & ~functional_L
        num_candidates = int(candidates_L.sum())
        num_targets = max(1, round(self.config.predict_share * num_candidates))
        if not memory and not (~functional_L & ~candidates_L).any():
            # The first target in the order needs something to see: with all that it could see
            # masked, the softmax would spread over everything, the target itself among it.
            num_targets = min(num_targets, num_candidates - 1)
        num_targets = max(0, min(num_targets, num_candidates))

        generator = noise_generator(example)
        targets_L = choose_targets(
            candidates_L,
            self._starts_V[ids_L],
            num_targets,
            generator,
            mask_alpha=self.config.mask_alpha,
            mask_beta=self.config.mask_beta,
            max_span=self.config.max_span,
        )
        order_L = draw_order(targets_L | functional_L, self.config.perm_size, generator)
        return _Window(
            memory_M=ids[:memory],
            ids_L=ids_L,
            segments_L=np.asarray(example["token_type_ids"], dtype=np.int64)[memory:],
            targets_P=np.flatnonzero(targets_L),
            hidden_LL=permutation_mask(order_L, targets_L),
        )

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
        return token_scores(sums, self.num_targets(batch))

    def _losses(self, model: PreTrainedModel, batch: Batch) -> LossSums:
        _require_xlnet(model, batch)
        with _positions_in_own_dtype(model):
            hidden_NH = query_states(model, batch).flatten(0, 1)[batch["target_rows"]]
        head = model.get_output_embeddings()
        return linear_cross_entropy(hidden_NH, head.weight, batch["target_ids"], bias_V=head.bias)


@dataclass(frozen=True, eq=False)
class _Window:
    """One example with its noise drawn."""

    memory_M: npt.NDArray[np.int64]
    ids_L: npt.NDArray[np.int64]
    segments_L: npt.NDArray[np.int64]
    targets_P: npt.NDArray[np.int64]
    hidden_LL: BoolArray


def query_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states of the query stream: [B, P, H]; places without a target mean nothing."""
    masks = {name: batch[name].to(model.dtype) for name in ("perm_mask", "target_mapping")}
    if "groups" not in batch:
        inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        output = model.base_model(**inputs, **masks, use_mems=False)
        states_BPH: Tensor = output.last_hidden_state
        return states_BPH
    # transformers lets every token see every place of the memory, padding too, and counts
    # distances over padding between memory and window: so only rows of like lengths run together.
    parts: list[Tensor] = []
    for group in batch["groups"]:
        rows, start = group["rows"], batch["input_ids"].shape[1] - group["length"]
        output = model.base_model(
            input_ids=batch["input_ids"][rows, start:],
            token_type_ids=batch["token_type_ids"][rows, start:],
            perm_mask=masks["perm_mask"][rows, start:, start:],
            target_mapping=masks["target_mapping"][rows, :, start:],
            mems=_memory(model, batch["memory_ids"][rows], group["memory_length"]),
            use_mems=False,
        )
        parts.append(output.last_hidden_state)
    order = [row for group in batch["groups"] for row in group["rows"]]
    return torch.cat(parts)[np.argsort(order).tolist()]


@torch.no_grad()
def _memory(model: PreTrainedModel, ids_GM: Tensor, length: int) -> list[Tensor] | None:
    """What each layer would read of the tokens before the windows: per layer [M, G, H]."""
    if not length:
        return None
    ids_GM = ids_GM[:, ids_GM.shape[1] - length :]
    segments_GM = torch.full_like(ids_GM, TEXT_SEGMENT)
    output = model.base_model(input_ids=ids_GM, token_type_ids=segments_GM, use_mems=True)
    return list(output.mems)


@contextmanager
def _positions_in_own_dtype(model: PreTrainedModel) -> Iterator[None]:
    """Hand each layer the positions in the dtype of its weights.

    With one stream transformers does so itself; with two it multiplies float32 positions by weights
    of any dtype, which torch refuses.
    """

    def cast(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "r": kwargs["r"].to(layer.rel_attn.r.dtype)}

    layers: Any = model.base_model.layer
    hooks = [layer.register_forward_pre_hook(cast, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _require_xlnet(model: PreTrainedModel, batch: Batch) -> None:
    config = model.config
    if config.model_type != "xlnet":
        raise ModelError(
            f"models of type `{config.model_type}` have no query stream to predict from",
            hint="use an XLNet; `convert_to: xlnet` of `fulltune pretrain` makes one of a BERT",
        )
    if config.attn_type != "bi" or config.bi_data:
        raise ModelError(
            f"this XLNet has `attn_type: {config.attn_type}` and `bi_data: {config.bi_data}` in "
            "config.json, with which tokens do not see what the order of prediction lets them see",
            hint="set `attn_type` to `bi` and `bi_data` to false",
        )
    longest = max((group["memory_length"] for group in batch.get("groups", ())), default=0)
    for name in ("mem_len", "reuse_len"):
        limit = getattr(config, name)
        if limit and limit < longest:
            raise ModelError(
                f"a memory of {longest:,} tokens is asked for, but `{name}` in config.json lets "
                f"the model keep {limit:,}",
                hint=f"set `{name}` to null, or lower `memory_length`",
            )
