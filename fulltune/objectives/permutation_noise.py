"""One window of XLNet's with its noise drawn: what is predicted, and who sees whom.

Shape suffixes: L tokens of a window, P places for targets, M tokens of memory, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from fulltune.config import Settings
from fulltune.data.encoding import EncodedExample
from fulltune.objectives.noise import noise_generator
from fulltune.objectives.permutation_order import (
    VISIBLE,
    BoolArray,
    IntArray,
    choose_targets,
    draw_order,
    permutation_mask,
)
from fulltune.objectives.permutation_windows import BACKWARD


class PermutationConfig(Settings):
    """What is predicted, in which order, and from which text.

    XLNet as published: `objective.length: 512` with `{reuse_length: 256, memory_length: 384, pairs:
    true, backward: true}`.
    """

    predict_share: Annotated[float, Field(gt=0, le=1)] = 1 / 6
    """Share of a window's tokens that are predicted: 85 of 512."""
    evaluate_share: Annotated[float, Field(gt=0, le=1)] = 1 / 6
    """The same of held-out text: fixed, so that runs trained with different shares can be compared.
    """
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
    reuse_length: Annotated[int, Field(ge=0)] = 0
    """Tokens at the front of a window after which the next one begins, so that what is behind them
    is read again. They see nothing of it, and it sees all of them. 0: windows do not overlap."""
    pairs: bool = False
    """Whether the text behind the reused tokens is two segments, the second of which is from
    elsewhere in half of the windows, so that the encodings of segments are trained."""
    backward: bool = False
    """Whether all text is read a second time from its end, so that memory is what follows."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.mask_alpha < self.mask_beta:
            raise ValueError("`mask_alpha` must be at least `mask_beta`")
        if self.reuse_length == 1:
            raise ValueError("`reuse_length` must be 0 or at least 2")
        return self


@dataclass(frozen=True, eq=False)
class DrawnWindow:
    """One example with its noise drawn."""

    memory_M: IntArray
    ids_L: IntArray
    segments_L: IntArray
    targets_P: IntArray
    hidden_LL: BoolArray
    backward: bool


def draw_window(
    example: EncodedExample,
    config: PermutationConfig,
    *,
    starts_V: BoolArray,
    functional_ids: tuple[int, int],
) -> DrawnWindow:
    """Draw the targets of a window and their order; all chance comes from the example.

    With a reused part, that part and the rest have their share of the targets each, and an order
    each, that of the reused part coming first.

    Args:
        example: of `PermutationWindows`.
        config: how many targets, and in which spans.
        starts_V: tokens that begin a word.
        functional_ids: the separator and the class token.
    """
    ids = np.asarray(example["input_ids"], dtype=np.int64)
    allowed = np.asarray(example["targets"], dtype=np.bool_)
    memory = int(allowed.argmax())  # 0 also where nothing may be predicted
    ids_L, allowed_L = ids[memory:], allowed[memory:]
    functional_L = np.isin(ids_L, functional_ids)
    candidates_L = allowed_L & ~functional_L
    begins_L = starts_V[ids_L]
    backward = BACKWARD in example["labels"]
    # The last windows of a text can be shorter than what is to be reused.
    reused = min(config.reuse_length, int(allowed_L.argmin()))
    parts = [slice(0, reused), slice(reused, len(ids_L))] if reused else [slice(0, len(ids_L))]

    generator = noise_generator(example)
    targets_L = np.zeros(len(ids_L), dtype=np.bool_)
    share = config.predict_share if "noise_seed" in example else config.evaluate_share
    missing = max(1, round(share * int(candidates_L.sum())))
    for number, part in enumerate(parts):
        num_candidates = int(candidates_L[part].sum())
        left = num_candidates + int(candidates_L[part.stop :].sum())
        num_targets = min(num_candidates, -(-missing * num_candidates // max(1, left)))
        if not memory and not number and not (~functional_L & ~candidates_L)[part].any():
            # The first target in the order needs something to see: with all that it could see
            # masked, the softmax would spread over everything, the target itself among it.
            num_targets = max(0, min(num_targets, num_candidates - 1))
        missing -= num_targets
        # Spans begin where words do, which is their end where the text is read backward.
        turn = slice(None, None, -1 if backward else 1)
        targets_L[part] = choose_targets(
            candidates_L[part][turn],
            begins_L[part][turn],
            num_targets,
            generator,
            mask_alpha=config.mask_alpha,
            mask_beta=config.mask_beta,
            max_span=config.max_span,
        )[turn]
    order_L = np.full(len(ids_L), VISIBLE)
    for part in parts:
        order = draw_order((targets_L | functional_L)[part], config.perm_size, generator)
        order_L[part] = np.where(order == VISIBLE, VISIBLE, order + part.start)
    hidden_LL = permutation_mask(order_L, targets_L)
    # All of the reused part comes before all of the rest, also where they are no targets.
    hidden_LL[:reused, reused:] = True
    hidden_LL[reused:, :reused] = False
    return DrawnWindow(
        memory_M=ids[:memory],
        ids_L=ids_L,
        segments_L=np.asarray(example["token_type_ids"], dtype=np.int64)[memory:],
        targets_P=np.flatnonzero(targets_L),
        hidden_LL=hidden_LL,
        backward=backward,
    )
