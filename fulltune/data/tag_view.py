"""The preview of tagged words: entities with their labels, as a reader would mark them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from fulltune.data.joined import JoinedDataset
from fulltune.data.preview_view import TokenState, TokenView, view_states
from fulltune.data.tags import OUTSIDE


def view_tags(
    decode: Callable[[list[int]], str],
    input_ids: Sequence[int],
    targets: Sequence[int],
    tags: Sequence[str],
    num_kept: int,
    *,
    special_ids: Collection[int],
) -> list[TokenView]:
    """Tokens as text, all those of an entity together and its label behind them.

    Args:
        decode: as in `view_tokens`.
        input_ids: tokens of the example, before truncation.
        targets: 1 at the token of each word that its tag is learned at.
        tags: of the words, in IOB2.
        num_kept: how many tokens truncation keeps.
        special_ids: tokens that are of no word.
    """
    views: list[TokenView] = []
    run: list[int] = []
    before: list[int] = []
    state: TokenState = "context"
    label, label_of_run, word = "", "", 0

    def end_run() -> None:
        if run:
            found = view_states(decode, run, [state] * len(run), before=before)
            if state == "entity":
                first = found[0]
                if first.text.startswith(" "):  # the space is no part of the entity
                    views.append(TokenView(" ", "outside"))
                    found[0] = TokenView(first.text[1:], state)
                found.append(TokenView(f"/{label_of_run}", "label"))
            views.extend(found)
        before[:] = run[-1:] or before
        run.clear()

    for place, (token, target) in enumerate(zip(input_ids, targets, strict=True)):
        tag = ""
        if target:
            tag = tags[word]
            word += 1
        is_special = not target and int(token) in special_ids
        new: TokenState
        if place >= num_kept:
            new = "truncated"
        elif is_special or not word:
            new = "context"
        elif target:
            new, label = ("outside", "") if tag == OUTSIDE else ("entity", tag[2:])
        else:  # a further piece of the word before
            new = "entity" if label else "outside"
        if new != state or tag.startswith("B-"):
            end_run()
            state, label_of_run = new, label
        run.append(int(token))
    end_run()
    return views


def with_entities(dataset: JoinedDataset, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The examples among ``indices`` that hold an entity."""
    outside = [code for code, name in enumerate(dataset.label_names) if name == OUTSIDE]
    inside = np.concatenate([[0], np.cumsum(~np.isin(dataset.label_codes, outside))])
    counts = np.diff(inside[dataset.label_offsets])
    return indices[counts[indices] > 0]
