"""Fill-in-the-middle (Bavarian et al., 2022): a causal model learns to write between two texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fulltune.data.tokenizers import FIM_TOKENS
from fulltune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_ADDED = len(FIM_TOKENS)
"""Tokens that a document which is cut has more."""


def fill_in_the_middle(
    ids: Sequence[int],
    generator: np.random.Generator,
    *,
    rate: float,
    prefix_id: int,
    middle_id: int,
    suffix_id: int,
) -> list[int]:
    """A document with its middle moved to the end, or as it is.

    The document is cut at two places drawn uniformly from all, its ends included, so that each part
    may be empty. Half of the cut documents are written prefix-suffix-middle
    (``P prefix S suffix M middle``) and half suffix-prefix-middle (``P S suffix M prefix middle``).

    Args:
        ids: the tokens of a document without special tokens; the end token goes after the result.
        generator: of the choice, the cuts and the order.
        rate: share of the documents that are cut.
        prefix_id: the sentinel P.
        middle_id: the sentinel M.
        suffix_id: the sentinel S.

    Returns:
        ``len(ids) + 3`` tokens, or ``ids``.
    """
    if generator.random() >= rate:
        return list(ids)
    first, second = sorted(int(place) for place in generator.integers(0, len(ids) + 1, 2))
    prefix, middle, suffix = ids[:first], ids[first:second], ids[second:]
    if generator.random() < 0.5:
        return [prefix_id, *prefix, suffix_id, *suffix, middle_id, *middle]
    return [prefix_id, suffix_id, *suffix, middle_id, *prefix, *middle]


def fill_in_each_document(
    ids: Sequence[int],
    generator: np.random.Generator,
    *,
    rate: float,
    prefix_id: int,
    middle_id: int,
    suffix_id: int,
    end_id: int,
    room: int,
) -> list[int]:
    """`fill_in_the_middle` of each part of a window that ``end_id`` ends, and of the last part.

    This is the paper's way for documents joined to windows (its "context level"), but that nothing
    is trimmed: windows are cut with room for the sentinels.

    Args:
        ids: the tokens of a window.
        generator: of what is drawn for each part.
        rate: share of the parts that are cut; one without any token is left as it is.
        prefix_id: the sentinel P.
        middle_id: the sentinel M.
        suffix_id: the sentinel S.
        end_id: the token that follows each document.
        room: tokens that may be added in all. Where end tokens stand in the text itself there are
            more parts than documents, and those that no room is left for stay as they are.

    Returns:
        All of ``ids``, each part in its place, and at most ``room`` tokens more.
    """
    rearranged: list[int] = []
    start = 0
    while start < len(ids):
        end = start
        while end < len(ids) and ids[end] != end_id:
            end += 1
        part = list(ids[start:end])
        if part and len(rearranged) - start + NUM_ADDED <= room:
            part = fill_in_the_middle(
                part,
                generator,
                rate=rate,
                prefix_id=prefix_id,
                middle_id=middle_id,
                suffix_id=suffix_id,
            )
        rearranged += [*part, *ids[end : end + 1]]
        start = end + 1
    return rearranged


def fim_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """Ids of the sentinels for prefix, middle and suffix.

    Raises:
        ModelError: the tokenizer lacks one.
    """
    ids = tokenizer.get_vocab()
    missing = [f"`{token}`" for token in FIM_TOKENS if token not in ids]
    if missing:
        raise ModelError(
            f"the tokenizer has no {' and no '.join(missing)}, which fill-in-the-middle needs",
            hint="train one by `fulltune tokenizer train --family gpt --fill-in-the-middle`, or "
            "leave `objective.fim_rate` out",
        )
    prefix, middle, suffix = (ids[token] for token in FIM_TOKENS)
    return prefix, middle, suffix
