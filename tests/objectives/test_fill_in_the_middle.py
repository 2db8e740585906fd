"""Fill-in-the-middle moves text and loses none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fulltune.data.encoding import EncodedExample
from fulltune.data.streams import TokenStream
from fulltune.data.tasks import TextExample
from fulltune.data.tokenizers import FIM_TOKENS
from fulltune.errors import DataError, ModelError
from fulltune.models.loading import load_tokenizer
from fulltune.objectives.causal_lm import CausalLM
from fulltune.objectives.causal_stream import CausalStream
from fulltune.objectives.fill_in_the_middle import (
    fill_in_each_document,
    fill_in_the_middle,
    fim_ids,
)
from tests.conftest import DocumentsInMemory

PREFIX, MIDDLE, SUFFIX = 1000, 1001, 1002
documents = st.lists(st.integers(0, 999), max_size=60)


def rearrange(ids: list[int], seed: int, rate: float = 1.0) -> list[int]:
    return fill_in_the_middle(
        ids,
        np.random.default_rng(seed),
        rate=rate,
        prefix_id=PREFIX,
        middle_id=MIDDLE,
        suffix_id=SUFFIX,
    )


def splice(tokens: list[int]) -> list[int]:
    suffix, middle = tokens.index(SUFFIX), tokens.index(MIDDLE)
    assert tokens[0] == PREFIX
    return tokens[1:suffix] + tokens[middle + 1 :] + tokens[suffix + 1 : middle]


@given(documents, st.integers(0, 2**64))
def test_the_parts_in_their_old_order_are_the_document(ids: list[int], seed: int) -> None:
    tokens = rearrange(ids, seed)
    assert len(tokens) == len(ids) + 3
    assert splice(tokens) == ids
    assert tokens == rearrange(ids, seed)


@given(documents, st.integers(0, 2**64))
def test_a_rate_of_zero_changes_nothing(ids: list[int], seed: int) -> None:
    assert rearrange(ids, seed, rate=0.0) == ids


def test_documents_are_cut_at_all_places_and_half_of_them_begin_with_the_prefix() -> None:
    ids = list(range(10))
    drawn = [rearrange(ids, seed, rate=0.5) for seed in range(4000)]
    cut = [tokens for tokens in drawn if tokens != ids]
    # Four standard deviations of the shares of 4000 and 2000 draws.
    assert len(cut) / 4000 == pytest.approx(0.5, abs=0.032)
    # Two of 11 places are both not the first in (10/11)^2 of all draws.
    prefix_first = sum(tokens[1] != SUFFIX for tokens in cut)
    assert prefix_first / len(cut) == pytest.approx(0.5 * (10 / 11) ** 2, abs=0.044)
    # 66 pairs of places; suffix first looks like an empty prefix.
    assert len({tuple(tokens) for tokens in cut}) == 66


END = 2000


def in_parts(window: list[int]) -> list[list[int]]:
    """What end tokens part; what follows the last one may be empty."""
    parts: list[list[int]] = [[]]
    for token in window:
        if token == END:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def restored(tokens: list[int]) -> list[int]:
    """A window as it was before fill-in-the-middle."""
    parts = [splice(part) if part[:1] == [PREFIX] else part for part in in_parts(tokens)]
    return [token for part in parts for token in [END, *part]][1:]


def rearrange_window(ids: list[int], seed: int, *, rate: float, room: int) -> list[int]:
    return fill_in_each_document(
        ids,
        np.random.default_rng(seed),
        rate=rate,
        prefix_id=PREFIX,
        middle_id=MIDDLE,
        suffix_id=SUFFIX,
        end_id=END,
        room=room,
    )


@given(documents, st.lists(documents, max_size=4), st.integers(0, 2**64))
def test_each_document_of_a_window_is_cut_on_its_own(
    last: list[int], earlier: list[list[int]], seed: int
) -> None:
    window = [token for document in earlier for token in [*document, END]] + last
    tokens = rearrange_window(window, seed, rate=1.0, room=len(window) + 15)
    for before, after in zip([*earlier, last], in_parts(tokens), strict=True):
        assert len(after) == (len(before) + 3 if before else 0)
        assert (splice(after) if after else []) == before


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(8, 48),
    st.integers(0, 2**32),
    st.sampled_from([0.1, 0.5, 1.0]),
)
def test_no_token_of_a_stream_is_lost_or_repeated_and_every_window_fits(
    lengths: list[int], window: int, seed: int, rate: float
) -> None:
    """Each window, put back in order, is the next part of the stream without fill-in-the-middle."""
    documents = DocumentsInMemory(
        EncodedExample(
            # Every token is another one; the middle of some documents holds an end token.
            input_ids=[
                END if place == 20 and number % 3 == 0 else 10_000 + 100 * number + place
                for place in range(length)
            ],
            targets=[1] * length,
            token_type_ids=[],
            labels=[],
            num_removed=0,
            num_removed_targets=0,
            input_hash=number,
            example_hash=number,
            num_bytes=length,
            where=f"text.txt:{number + 1}",
        )
        for number, length in enumerate(lengths)
    )
    total = sum(lengths) + len(lengths)
    assume(total >= 2)
    indices = range(len(lengths))
    (whole,) = list(TokenStream(documents, indices, seed, window_tokens=max(total, 8), end_id=END))
    stream = TokenStream(documents, indices, seed, window_tokens=window, end_id=END, room=3)
    seen: list[int] = []
    for number in range(len(stream)):
        text = stream[number]["input_ids"]
        tokens = rearrange_window(text, seed + number, rate=rate, room=window - len(text))
        assert len(text) <= len(tokens) <= window
        assert len(text) == stream.lengths[number]
        assert len(text) + 3 <= window
        assert restored(tokens) == text
        seen += text
    # One token alone at the end is no window.
    assert seen == whole["input_ids"][: len(seen)]
    assert len(whole["input_ids"]) - len(seen) <= 1


@given(documents, st.integers(0, 2**64), st.integers(0, 12))
def test_a_part_that_no_room_is_left_for_stays_as_it_is(
    ids: list[int], seed: int, room: int
) -> None:
    window = [*ids, END, *ids, END, END, *ids]
    tokens = rearrange_window(window, seed, rate=1.0, room=room)
    assert len(tokens) - len(window) == (min(room // 3, 3) * 3 if ids else 0)
    assert restored(tokens) == window


def test_a_stream_is_rearranged_in_training_and_left_alone_in_evaluation(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.add_tokens(list(FIM_TOKENS))
    stream = CausalStream(CausalLM(tokenizer, 64, packing=False), fim_rate=1.0)
    (example,) = stream.encode(TextExample("The dog sleeps. 今天天气很好。", "here"))
    plain = stream.collate([example])
    moved = stream.collate([{**example, "noise_seed": 3}])
    again = stream.collate([{**example, "noise_seed": 3}, {**example, "noise_seed": 4}])
    assert plain["input_ids"][0].tolist() == example["input_ids"]
    assert moved["input_ids"][0, 0] == fim_ids(tokenizer)[0]
    assert moved["input_ids"].shape[1] == plain["input_ids"].shape[1] + 3
    assert again["input_ids"][0].tolist() == moved["input_ids"][0].tolist()
    assert stream.num_targets(moved) == stream.num_targets(plain) + 3


def test_a_text_that_holds_a_sentinel_is_named_with_its_line(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.add_tokens(list(FIM_TOKENS))
    example = TextExample("A <fim_middle> here.", "a.txt:7")
    stream = CausalStream(CausalLM(tokenizer, 64, packing=False), fim_rate=0.5)
    with pytest.raises(DataError, match=r"a\.txt:7: the text holds a token such as"):
        stream.encode(example)
    assert stream.held_out.encode(example)
    assert stream.held_out.fingerprint != stream.fingerprint


def test_missing_sentinels_are_named(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    with pytest.raises(ModelError, match="`<fim_prefix>` and no `<fim_middle>` and no"):
        fim_ids(tokenizer)
    tokenizer.add_tokens(list(FIM_TOKENS))
    assert fim_ids(tokenizer) == tuple(tokenizer.convert_tokens_to_ids(FIM_TOKENS))
