"""Which tokens XLNet predicts, in which order, and which token may see which.

Yang et al. 2019, "XLNet: Generalized Autoregressive Pretraining for Language Understanding", with
the numbers of the authors' code (zihangdai/xlnet, `data_utils.py`). All of it is numpy on one
sequence; nothing here knows a model.

Shape suffixes: V vocabulary, L tokens of the sequence.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BoolArray: TypeAlias = npt.NDArray[np.bool_]
IntArray: TypeAlias = npt.NDArray[np.int64]

VISIBLE = -1
"""Order of a token that is neither target nor functional: everything may see it."""

_WORD_MARKS = ("▁", "Ġ")
_CONTINUATION = "##"
# Scripts without spaces: no mark stands before their words, so each character begins one.
_UNSPACED = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF))


def word_starts(tokenizer: PreTrainedTokenizerBase) -> BoolArray:
    """Whether a token can begin a word: bool [V].

    As in the authors' code, a SentencePiece that begins with ``▁`` or ``<``, or is one ASCII
    punctuation mark. Byte-level BPE marks words with ``Ġ``; WordPiece marks what goes on with
    ``##``. Tokens that begin with a Chinese or Japanese character are starts too, since no mark
    stands before them. Where a vocabulary marks nothing, every token is a start.
    """
    vocabulary = tokenizer.get_vocab()
    starts_V = np.ones(max(vocabulary.values(), default=-1) + 1, dtype=np.bool_)
    # The commonest is the vocabulary's own: to another `Ġ` is a letter of Maltese, `##` a heading.
    num_marked = {
        each: sum(token.startswith(each) for token in vocabulary)
        for each in (*_WORD_MARKS, _CONTINUATION)
    }
    mark = max(num_marked, key=lambda each: num_marked[each])
    for token, index in vocabulary.items():
        if mark == _CONTINUATION or not num_marked[mark]:
            starts_V[index] = not (token.startswith(_CONTINUATION) and len(token) > 2)
        else:
            starts_V[index] = (
                token.startswith((mark, "<"))
                or (len(token) == 1 and token in string.punctuation)
                or any(first <= ord(token[:1] or " ") <= last for first, last in _UNSPACED)
            )
    return starts_V


def choose_targets(
    candidates_L: BoolArray,
    starts_L: BoolArray,
    num_targets: int,
    generator: np.random.Generator,
    *,
    mask_alpha: int = 6,
    mask_beta: int = 1,
    max_span: int = 5,
) -> BoolArray:
    """Choose exactly ``num_targets`` of the candidates, most of them in spans.

    From left to right: a span of n tokens, n in 1..``max_span`` with p(n) ~ 1/n, is put at the
    first word start after a random part of a context of ``n * mask_alpha / mask_beta`` tokens, the
    rest of which is left free after it. What is missing in the end is drawn from single tokens.

    A span is n *tokens* from a word start on and may end inside a word: this is what the authors'
    code does (it compares `seg[beg]` where the end of the n-th word would need `seg[end]`), so it
    is what their models were trained with.

    Args:
        candidates_L: tokens that may be predicted.
        starts_L: tokens that begin a word.
        num_targets: at most the number of candidates.
        generator: of all random choices.
        mask_alpha: tokens of context for each ``mask_beta`` of a span.
        mask_beta: see ``mask_alpha``; at most as large.
        max_span: longest span.

    Returns:
        bool [L], true at ``num_targets`` places.
    """
    chosen_L = np.zeros(len(candidates_L), dtype=np.bool_)
    begins = np.flatnonzero(candidates_L & starts_L)
    lengths = np.arange(1, max_span + 1)
    shares = 1 / lengths / (1 / lengths).sum()
    cursor, missing = 0, num_targets
    while missing:
        wanted = min(int(generator.choice(lengths, p=shares)), missing)
        context = wanted * mask_alpha // mask_beta
        left = int(generator.integers(context))
        place = int(np.searchsorted(begins, cursor + left))
        if place == len(begins):
            break
        begin = end = int(begins[place])
        while end < len(candidates_L) and end - begin < wanted and candidates_L[end]:
            end += 1
        chosen_L[begin:end] = True
        missing -= end - begin
        cursor = end + context - left
    if missing:
        free = np.flatnonzero(candidates_L & ~chosen_L)
        chosen_L[generator.choice(free, size=missing, replace=False)] = True
    return chosen_L


def draw_order(ordered_L: BoolArray, perm_size: int, generator: np.random.Generator) -> IntArray:
    """Draw the order in which targets and functional tokens come: int64 [L].

    Blocks of ``perm_size`` tokens follow each other from left to right and are permuted within.
    The authors draw one permutation for all blocks of a sequence; here each block has its own.

    Args:
        ordered_L: targets and functional tokens; all others get `VISIBLE`.
        perm_size: tokens of a block; the last one may be shorter.
        generator: of the permutations.
    """
    length = len(ordered_L)
    order_L = np.concatenate(
        [
            start + generator.permutation(min(perm_size, length - start))
            for start in range(0, length, perm_size)
        ]
    )
    return np.where(ordered_L, order_L, VISIBLE)


def permutation_mask(order_L: IntArray, targets_L: BoolArray) -> BoolArray:
    """Who may *not* see whom: bool [L, L], true at [i, j] where i must not see j.

    - A visible token (neither target nor functional) is seen by all.
    - A target is seen only by targets and functional tokens that come later in the order: not by
      itself, and by no visible token, whose states everything reads.
    - A functional token (separator, class) is seen by those and, unlike a target, by itself.

    So target i sees all visible tokens and exactly the targets and functional tokens before it.
    This is the mask of the query stream; in the content stream transformers lets each token see
    itself besides.

    Args:
        order_L: from `draw_order`.
        targets_L: the targets among the ordered tokens.
    """
    # A target has to be strictly later than what it sees; the others may see their own place.
    reach_L = np.where(targets_L, order_L, order_L + 1)
    hidden_LL: BoolArray = (reach_L[:, None] <= order_L[None]) & (order_L != VISIBLE)[None]
    return hidden_LL
