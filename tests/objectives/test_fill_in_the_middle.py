"""Fill-in-the-middle moves text and loses none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulltune.data.tasks import TextExample
from fulltune.errors import ModelError
from fulltune.models.loading import load_tokenizer
from fulltune.objectives.causal_lm import CausalLM
from fulltune.objectives.causal_stream import CausalStream
from fulltune.objectives.fill_in_the_middle import (
    FIM_TOKENS,
    fill_in_each_document,
    fill_in_the_middle,
    fim_ids,
)

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


@given(documents, st.lists(documents, max_size=4), st.integers(0, 2**64))
def test_each_document_of_a_window_is_cut_on_its_own(
    last: list[int], earlier: list[list[int]], seed: int
) -> None:
    end = 2000
    window = [token for document in earlier for token in [*document, end]] + last
    tokens = fill_in_each_document(
        window,
        np.random.default_rng(seed),
        rate=1.0,
        prefix_id=PREFIX,
        middle_id=MIDDLE,
        suffix_id=SUFFIX,
        end_id=end,
    )
    for document in earlier:
        place = tokens.index(end)
        assert splice(tokens[:place]) == document
        del tokens[: place + 1]
    assert tokens == [] if not last else splice(tokens) == last


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
    assert moved["input_ids"].shape == plain["input_ids"].shape
    assert again["input_ids"][0].tolist() == moved["input_ids"][0].tolist()
    assert stream.num_targets(moved) == stream.num_targets(plain)


def test_missing_sentinels_are_named(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    with pytest.raises(ModelError, match="`<fim_prefix>` and no `<fim_middle>` and no"):
        fim_ids(tokenizer)
    tokenizer.add_tokens(list(FIM_TOKENS))
    assert fim_ids(tokenizer) == tuple(tokenizer.convert_tokens_to_ids(FIM_TOKENS))
