"""The likeliest tags that are valid together: `I-X` only behind `B-X` or `I-X` of the same label.

Taking the likeliest tag of each word alone can give an entity without a beginning. Viterbi's search
over all valid sequences costs no more than the largest score of each word, as all else may follow
all else.

Shape suffixes: D documents, T words, C tags, I tags that go on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def decode_tags(log_probabilities: Sequence[Tensor], labels: Sequence[str]) -> list[list[int]]:
    """The valid tags of each document with the largest product of probabilities.

    Args:
        log_probabilities: float32 [T, C] of each document, on the CPU.
        labels: the tags of IOB2, in the order of C; each ``I-`` with its ``B-``.

    Returns:
        For each document, the place in ``labels`` of each word's tag.
    """
    if not any(len(scores_TC) for scores_TC in log_probabilities):
        return [[] for _ in log_probabilities]
    places = {label: place for place, label in enumerate(labels)}
    inside = [place for place, label in enumerate(labels) if label.startswith("I-")]
    begin_of = [places[f"B-{labels[place][2:]}"] for place in inside]
    inside_I = torch.tensor(inside, dtype=torch.int64)
    begin_I = torch.tensor(begin_of, dtype=torch.int64)
    lengths = [len(scores_TC) for scores_TC in log_probabilities]
    padded_DTC = torch.nn.utils.rnn.pad_sequence(list(log_probabilities), batch_first=True)
    scores_DC = padded_DTC[:, 0].clone()
    scores_DC[:, inside_I] = -torch.inf
    came_from: list[Tensor] = []
    at: list[Tensor] = [scores_DC]
    for word in range(1, padded_DTC.shape[1]):
        best_D, best_tag_D = scores_DC.max(dim=1)
        from_DC = best_tag_D[:, None].repeat(1, len(labels))
        before_DC = best_D[:, None].repeat(1, len(labels))
        begun_DI, going_DI = scores_DC[:, begin_I], scores_DC[:, inside_I]
        before_DC[:, inside_I] = torch.maximum(begun_DI, going_DI)
        from_DC[:, inside_I] = torch.where(going_DI > begun_DI, inside_I, begin_I)
        scores_DC = before_DC + padded_DTC[:, word]
        came_from.append(from_DC)
        at.append(scores_DC)
    decoded: list[list[int]] = []
    for document, length in enumerate(lengths):
        if not length:
            decoded.append([])
            continue
        tag = int(at[length - 1][document].argmax())
        tags = [tag]
        for from_DC in reversed(came_from[: length - 1]):
            tag = int(from_DC[document, tag])
            tags.append(tag)
        decoded.append(tags[::-1])
    return decoded
