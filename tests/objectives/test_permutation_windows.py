"""XLNet's windows as published: reused tokens, pairs of segments, and text read from its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, XLNetConfig, XLNetLMHeadModel

from fulltune.data.encoding import SENTENCE_START, EncodedExample
from fulltune.data.streams import TokenStream
from fulltune.errors import ConfigError
from fulltune.objectives.permutation_lm import PermutationLM
from fulltune.objectives.permutation_noise import PermutationConfig
from fulltune.objectives.permutation_order import word_starts
from fulltune.objectives.permutation_windows import BACKWARD
from fulltune.objectives.two_streams import query_states
from tests.conftest import DocumentsInMemory

SENTENCES = (
    "The capital of the country is a city by the river.", "There are seven apples.",
    "How many apples are there in the basket?", "She sells sea shells by the sea shore.",
    "法国的首都是巴黎。", "你好，世界！", "The fox sleeps on.",
)  # fmt: skip
PUBLISHED = {"reuse_length": 12, "memory_length": 18, "pairs": True, "backward": True}


def documents_for(objective: PermutationLM) -> DocumentsInMemory:
    texts = [" ".join(SENTENCES[line * step % 7] for step in range(1, 6)) for line in range(1, 31)]
    return DocumentsInMemory.of_texts(objective, texts)


def windows_of(
    tokenizer: PreTrainedTokenizerBase, length: int, **config: Any
) -> tuple[list[EncodedExample], list[int], list[int]]:
    """The windows of a text, all of its tokens, and where its sentences begin."""
    objective = PermutationLM(tokenizer, length, PermutationConfig(**config))
    documents = documents_for(objective)
    examples = objective.arrange(documents, range(len(documents)), seed=4)
    windows = [examples[index] for index in range(len(examples))]
    assert [len(window["input_ids"]) for window in windows] == examples.lengths.tolist()
    assert all(
        len(window["targets"]) == len(window["token_type_ids"]) == len(window["input_ids"])
        for window in windows
    )
    # The same documents in the same order, in one window.
    marked = documents_for(PermutationLM(tokenizer, 64, PermutationConfig(pairs=True)))
    stream = TokenStream(
        marked, range(len(marked)), 4, window_tokens=10_000, end_id=tokenizer.sep_token_id,
        boundaries=True,
    )  # fmt: skip
    assert len(stream) == 1
    whole = stream[0]
    begins = [place for place, mark in enumerate(whole["boundaries"]) if mark & SENTENCE_START]
    return windows, whole["input_ids"], begins


def parts_of(window: EncodedExample) -> tuple[list[int], list[int], list[int]]:
    """Memory, text of the first segment and text of the second."""
    ids, targets = window["input_ids"], window["targets"]
    memory = targets.index(1)
    text = [place for place in range(memory, len(ids)) if targets[place]]
    second = [ids[place] for place in text if window["token_type_ids"][place]]
    return ids[:memory], [ids[place] for place in text][: len(text) - len(second)], second


def where_in(text: Sequence[int], part: Sequence[int]) -> list[int]:
    count = len(part)
    return [start for start in range(len(text) - count + 1) if text[start : start + count] == part]


@pytest.mark.parametrize(("reuse", "memory"), [(8, 0), (8, 13), (15, 40), (20, 5)])
def test_the_next_window_begins_behind_the_reused_tokens(
    tokenizer: PreTrainedTokenizerBase, reuse: int, memory: int
) -> None:
    windows, text, _ = windows_of(tokenizer, 24, reuse_length=reuse, memory_length=memory)
    assert len(windows) == -(-len(text) // reuse)
    for number, window in enumerate(windows):
        start = number * reuse
        before, first, second = parts_of(window)
        assert first == text[start : start + 22]
        assert before == text[max(0, start - memory) : start]
        assert not second
        assert window["input_ids"][-2:] == [tokenizer.sep_token_id, tokenizer.cls_token_id]


def test_the_second_segment_follows_the_first_or_is_from_elsewhere_each_in_half_of_the_windows(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    windows, text, begins = windows_of(tokenizer, 64, reuse_length=6, pairs=True)
    full = [number for number, each in enumerate(windows) if len(each["input_ids"]) == 64]
    assert len(full) > 100
    follows = 0
    for number in full:
        window = windows[number]
        _, first, second = parts_of(window)
        start = number * 6
        assert first == text[start : start + len(first)]
        assert len(first) > 6
        assert len(first) + len(second) == 61
        # The text's sentences are shorter than what is cut, so each cut is between two.
        assert start + len(first) in begins
        assert set(where_in(text, second)) & set(begins)
        follows += second == text[start + len(first) : start + 61]
        expected = [0] * (len(first) + 1) + [1] * (len(second) + 1) + [2]
        assert window["token_type_ids"] == expected
        ids = window["input_ids"]
        assert ids[len(first)] == ids[-2] == tokenizer.sep_token_id
        assert ids[-1] == tokenizer.cls_token_id
    # A standard deviation of the share is below 0.05.
    assert follows / len(full) == pytest.approx(0.5, abs=0.15)


def test_pairs_come_from_the_seed_and_the_number_of_the_window(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    objective = PermutationLM(tokenizer, 40, PermutationConfig(pairs=True))
    documents = documents_for(objective)
    first, again, other = (
        objective.arrange(documents, range(len(documents)), seed=seed) for seed in (1, 1, 2)
    )
    assert [first[index] for index in range(9)] == [again[index] for index in reversed(range(9))][
        ::-1
    ]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    plain = PermutationLM(tokenizer, 40)
    assert plain.fingerprint != objective.fingerprint


@pytest.mark.parametrize(
    "config", [{}, {"memory_length": 7}, {"reuse_length": 9, "memory_length": 30}]
)
def test_read_backward_each_window_is_reversed_and_remembers_what_follows(
    tokenizer: PreTrainedTokenizerBase, config: dict[str, int]
) -> None:
    windows, text, _ = windows_of(tokenizer, 24, backward=True, **config)
    forward, backward = windows[: len(windows) // 2], windows[len(windows) // 2 :]
    assert [window["labels"] for window in (*forward, *backward)] == [
        *[[]] * len(forward), *[[BACKWARD]] * len(forward),
    ]  # fmt: skip
    turned = text[::-1]
    step, memory = config.get("reuse_length") or 22, config.get("memory_length", 0)
    for number, window in enumerate(backward):
        start = number * step
        before, first, _ = parts_of(window)
        assert first == turned[start : start + 22]
        assert before == turned[max(0, start - memory) : start]


def test_sentences_read_backward_are_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    windows, text, begins = windows_of(tokenizer, 64, pairs=True, backward=True)
    ends = {len(text) - place for place in (*begins, len(text))}  # as places of the reversed text
    turned = text[::-1]
    for number, window in enumerate(windows[len(windows) // 2 :][:-1]):
        _, first, second = parts_of(window)
        assert number * 61 + len(first) in ends
        assert set(where_in(turned, second)) & ends


# -- who sees whom ---------------------------------------------------------------------------------


def test_reused_tokens_and_the_rest_have_their_share_of_targets_and_the_first_see_nothing_behind(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """43 and 42 of the 85 targets of 512 tokens, as in the authors' data."""
    config = PermutationConfig(reuse_length=256, pairs=True)
    objective = PermutationLM(tokenizer, 512, config)
    documents = documents_for(objective)
    window = objective.arrange(documents, range(30), seed=0)[0]
    # Here documents end with a separator, which is never predicted; XLNet's end with <eod>.
    pairs = zip(window["input_ids"], window["targets"], strict=True)
    window["input_ids"] = [10 if target else token for token, target in pairs]
    batch = objective.collate([window])
    places = batch["target_mapping"][0].argmax(-1)
    assert batch["target_mapping"].shape == (1, 85, 512)
    assert int((places < 256).sum()) == 43
    sees = ~batch["perm_mask"][0]
    assert not sees[:256, 256:].any()
    assert sees[256:, :256].all()
    # An order of its own each: a target of the rest sees some, and not all, of the rest.
    rest = places[places >= 256]
    assert not sees[rest, rest].any()
    ranks = sees[rest][:, rest].sum(-1)
    assert sorted(ranks.tolist()) == list(range(42))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**40), st.integers(2, 19), st.booleans(), st.floats(0.05, 1))
def test_every_target_sees_something_and_none_sees_itself(
    tokenizer: PreTrainedTokenizerBase, seed: int, reuse: int, pairs: bool, share: float
) -> None:
    config = PermutationConfig(
        reuse_length=reuse, pairs=pairs, backward=True, predict_share=share, perm_size=7
    )
    objective = PermutationLM(tokenizer, 24, config)
    documents = documents_for(objective)
    examples = objective.arrange(documents, range(3), seed=seed)
    for index in {0, seed % len(examples), len(examples) // 2, len(examples) - 1}:
        example = {**examples[index], "noise_seed": seed}
        batch = objective.collate([example])  # type: ignore[list-item]
        places = batch["target_mapping"][0].argmax(-1)[: objective.num_targets(batch)]
        hidden = batch["perm_mask"][0][places]
        assert not hidden.all(-1).any()
        assert hidden[torch.arange(len(places)), places].all()
        assert (batch["input_ids"][0, places] == batch["target_ids"]).all()


def test_spans_of_reversed_text_begin_where_words_do(tokenizer: PreTrainedTokenizerBase) -> None:
    objective = PermutationLM(tokenizer, 400, PermutationConfig(backward=True, evaluate_share=0.05))
    documents = documents_for(objective)
    examples = objective.arrange(documents, range(30), seed=0)
    starts = word_starts(tokenizer)
    for index in range(len(examples) // 2, len(examples) - 1):
        batch = objective.collate([examples[index]])
        ids = batch["input_ids"][0].flip(0)
        chosen = batch["target_mapping"][0].sum(0).flip(0).numpy()
        begins = np.flatnonzero(np.diff(chosen, prepend=0) == 1)
        assert starts[ids[begins].numpy()].all()


# -- through the model -----------------------------------------------------------------------------


def make_model(tokenizer: PreTrainedTokenizerBase) -> XLNetLMHeadModel:
    torch.manual_seed(0)
    small = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "dropout": 0.0}
    # Large weights, so that what is read shows.
    config = XLNetConfig(vocab_size=len(tokenizer), **small, mem_len=None, initializer_range=0.2)
    return XLNetLMHeadModel(config).eval()


@torch.no_grad()
def test_what_is_reused_is_predicted_without_what_follows_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    objective = PermutationLM(tokenizer, 40, PermutationConfig(reuse_length=20, evaluate_share=0.5))
    documents = documents_for(objective)
    batch = objective.collate([objective.arrange(documents, range(30), seed=0)[2]])
    places = batch["target_mapping"][0].argmax(-1)
    model = make_model(tokenizer)
    before = query_states(model, batch)[0]
    # Not the separators that documents end with: they are in the order.
    ids = batch["input_ids"][0]
    functional = {tokenizer.sep_token_id, tokenizer.cls_token_id}
    visible = [
        place for place in range(38) if place not in places and int(ids[place]) not in functional
    ]
    for changed in visible:
        ids = batch["input_ids"].clone()
        ids[0, changed] = 7 if ids[0, changed] != 7 else 8
        moved = (query_states(model, {**batch, "input_ids": ids})[0] - before).abs().amax(-1) > 0
        assert moved[places >= 20].all()
        assert moved[places < 20].all() == moved[places < 20].any() == (changed < 20)
    target = int(places[0])  # of the reused part: all of the rest may read it
    ids = batch["input_ids"].clone()
    ids[0, target] = 7 if ids[0, target] != 7 else 8
    moved = (query_states(model, {**batch, "input_ids": ids})[0] - before).abs().amax(-1) > 0
    assert moved[places >= 20].all()
    assert not moved[0]


@torch.no_grad()
@pytest.mark.parametrize("memory", [0, 9])
def test_backward_rows_have_the_positions_of_transformers_bi_data(
    tokenizer: PreTrainedTokenizerBase, memory: int
) -> None:
    """Its flag takes the first half of a batch as read forward and the second as backward."""
    config = PermutationConfig(backward=True, memory_length=memory, reuse_length=10)
    objective = PermutationLM(tokenizer, 24, config)
    documents = documents_for(objective)
    examples = objective.arrange(documents, range(30), seed=0)
    half = len(examples) // 2
    batch = objective.collate([examples[3], examples[half + 4]])
    assert batch["backward"].tolist() == [False, True]
    model = make_model(tokenizer)
    found = query_states(model, batch)

    body: Any = model.base_model
    body.bi_data = True
    mems = None
    if memory:
        past = batch["memory_ids"]
        mems = model.base_model(past, token_type_ids=torch.zeros_like(past), use_mems=True).mems
    expected = model.base_model(
        batch["input_ids"],
        token_type_ids=batch["token_type_ids"],
        perm_mask=batch["perm_mask"].float(),
        target_mapping=batch["target_mapping"],
        mems=mems,
        use_mems=False,
    ).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    body.bi_data = False
    forward_only = query_states(model, {**batch, "backward": torch.tensor([False, False])})
    assert not torch.allclose(forward_only[1], found[1], atol=1e-3)
    torch.testing.assert_close(forward_only[0], found[0])


def test_the_loss_of_windows_as_published_is_that_of_each_alone(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    objective = PermutationLM(tokenizer, 30, PermutationConfig(**PUBLISHED))
    documents = documents_for(objective)
    examples = objective.arrange(documents, range(30), seed=0)
    half = len(examples) // 2
    some = [examples[index] for index in (0, 1, half, half + 7, len(examples) - 1)]
    model = make_model(tokenizer)
    alone = sum(objective.score(model, objective.collate([each])).loss_sum for each in some)
    together = objective.score(model, objective.collate(some)).loss_sum
    assert together == pytest.approx(alone, rel=1e-5)


def test_reused_tokens_leave_room_for_text(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"`permutation\.reuse_length` is 22, which leaves"):
        PermutationLM(tokenizer, 24, PermutationConfig(reuse_length=22))
    with pytest.raises(ConfigError, match="leaves no text"):
        PermutationLM(tokenizer, 24, PermutationConfig(reuse_length=20, pairs=True))
    PermutationLM(tokenizer, 24, PermutationConfig(reuse_length=19, pairs=True))
    with pytest.raises(ValueError, match="must be 0 or at least 2"):
        PermutationConfig(reuse_length=1)
