"""Which segments become pairs: labels say the truth, and no sentence is lost on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulltune.data.boundaries import sentence_starts
from fulltune.data.encoding import SENTENCE_START
from fulltune.data.sections import Sections
from fulltune.data.sentence_pairs import Pair, SentencePairs, SentencePairsConfig, draw_pairs
from fulltune.errors import DataError
from tests.conftest import DocumentsInMemory, encoded_example

START, SEPARATOR = 1, 2


def make_documents(sentences: Sequence[Sequence[int]]) -> DocumentsInMemory:
    """Documents whose sentences have the given lengths; every token is a number of its own."""
    return DocumentsInMemory(
        encoded_example(
            range(1000 * (number + 1), 1000 * (number + 1) + sum(lengths)),
            number,
            num_bytes=sum(lengths),
            boundaries=[
                SENTENCE_START * (index == 0) + 1 for length in lengths for index in range(length)
            ],
        )
        for number, lengths in enumerate(sentences)
    )


def make(
    sentences: Sequence[Sequence[int]], max_length: int = 23, seed: int = 0, **values: Any
) -> SentencePairs:
    documents = make_documents(sentences)
    return SentencePairs(
        documents,
        range(len(documents)),
        SentencePairsConfig(**values),
        max_length=max_length,
        start_id=START,
        separator_id=SEPARATOR,
        seed=seed,
    )


def test_of_long_documents_only_the_segments_are_read() -> None:
    documents = make_documents([[9] * 200, [7] * 300])
    pairs = SentencePairs(
        documents, [0, 1], SentencePairsConfig(), max_length=43, start_id=START,
        separator_id=SEPARATOR, seed=0,
    )  # fmt: skip
    documents.num_tokens_read = 0
    for index in range(len(pairs)):
        assert pairs[index]["where"] == pairs.where(index)
    assert documents.num_tokens_read == sum(pairs.lengths - 3)


CORPUS = st.lists(
    st.lists(st.integers(1, 12), min_size=1, max_size=12), min_size=2, max_size=6
).filter(lambda documents: max(map(len, documents)) > 1)


@settings(max_examples=150, deadline=None)
@given(
    sentences=CORPUS,
    max_length=st.integers(5, 40),
    seed=st.integers(0, 2**63),
    kind=st.sampled_from(["next", "order"]),
    short_share=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_labels_say_where_the_second_segment_is_from(
    sentences: list[list[int]], max_length: int, seed: int, kind: Any, short_share: float
) -> None:
    pairs = make(sentences, max_length, seed, kind=kind, short_share=short_share)
    assert len(pairs) == len(pairs.lengths) > 0
    for index in range(len(pairs)):
        first, second, label = pairs.pair(index)
        if label == 0:
            assert first.document == second.document
            assert first.end <= second.start
        elif kind == "next":
            assert first.document != second.document
        else:
            assert first.document == second.document
            assert second.end <= first.start
        for segment in (first, second):
            assert 0 <= segment.start < segment.end <= sum(sentences[segment.document])

        example = pairs[index]
        a = list(range(1000 * (first.document + 1), 1000 * (first.document + 2)))
        b = list(range(1000 * (second.document + 1), 1000 * (second.document + 2)))
        a, b = a[first.start : first.end], b[second.start : second.end]
        assert example["input_ids"] == [START, *a, SEPARATOR, *b, SEPARATOR]
        assert example["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert example["targets"] == [0, *[1] * len(a), 0, *[1] * len(b), 0]
        assert example["labels"] == [str(label)]
        assert example["where"] == pairs.where(index) == f"a.txt:{first.document + 1}"
        assert len(example["input_ids"]) == pairs.lengths[index] <= max_length


@settings(max_examples=100, deadline=None)
@given(sentences=CORPUS, seed=st.integers(0, 2**63))
def test_sentences_that_were_replaced_are_put_back_and_used_next(
    sentences: list[list[int]], seed: int
) -> None:
    """Nothing is too long here, so that only what is put back decides what is seen."""
    bounds = [np.cumsum([0, *lengths]).astype(np.int32) for lengths in sentences]
    generator = np.random.default_rng(seed)
    config = SentencePairsConfig(short_share=0)
    used: dict[int, list[tuple[int, int]]] = {}
    for first, second, label in draw_pairs(bounds, config, 1000, generator):
        own = [first] if label else [first, second]
        used.setdefault(first.document, []).extend((each.start, each.end) for each in own)
    for document, lengths in enumerate(sentences):
        spans = used[document]
        # One behind the other, without a gap or an overlap, from the first token to the last.
        assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1][1] == sum(lengths)


@settings(max_examples=100, deadline=None)
@given(sentences=CORPUS, seed=st.integers(0, 2**63))
def test_order_uses_each_sentence_once_but_a_last_one_left_alone(
    sentences: list[list[int]], seed: int
) -> None:
    bounds = [np.cumsum([0, *lengths]).astype(np.int32) for lengths in sentences]
    config = SentencePairsConfig(kind="order", short_share=0)
    ends = [0] * len(sentences)
    for pair in draw_pairs(bounds, config, 24, np.random.default_rng(seed)):
        early, late = sorted(pair[:2], key=lambda segment: segment.start)
        if early.num_tokens + late.num_tokens < 24:  # nothing was cut
            assert early.start in bounds[early.document]
            assert early.end == late.start
        ends[early.document] = late.end
    for document, lengths in enumerate(sentences):
        if len(lengths) == 1:
            assert ends[document] == 0


def test_half_of_the_pairs_are_wrong_and_one_in_ten_passes_is_short() -> None:
    sentences = [[5] * 20] * 60
    for kind in ("next", "order"):
        pairs = make(sentences, 53, kind=kind, copies=10, short_share=0.0)
        wrong = [pairs.pair(index).label for index in range(len(pairs))]
        # 1,200 pairs at least; six standard deviations are 9 points.
        assert np.mean(wrong) == pytest.approx(0.5, abs=0.09)
    full = make(sentences, 53, kind="order", copies=10, short_share=0.0)
    assert (full.lengths == 53).all()
    some = make(sentences, 53, kind="order", copies=10, short_share=0.1)
    assert 0 < (some.lengths < 53).mean() < 0.4


def test_copies_are_other_draws_and_the_seed_decides_all() -> None:
    def content(pairs: SentencePairs) -> list[Pair]:
        return [pairs.pair(index) for index in range(len(pairs))]

    sentences = [[3, 4, 5, 6] * 4] * 3
    once, twice = make(sentences), make(sentences, copies=2)
    assert content(twice)[: len(once)] == content(once)
    assert content(twice)[len(once) :] != content(once)
    assert content(make(sentences)) == content(once)
    assert content(make(sentences, seed=1)) != content(once)
    prints = {
        each.fingerprint
        for each in (once, twice, make(sentences, seed=1), make(sentences, kind="order"))
    }
    assert len(prints) == 4
    assert make(sentences).fingerprint == once.fingerprint


def test_what_is_too_long_is_cut_at_the_longer_segment_at_both_ends() -> None:
    pairs = make([[30, 4], [50, 4]], 23, kind="order", copies=60, short_share=0.0)
    firsts = set()
    for index in range(len(pairs)):
        long, short = sorted(pairs.pair(index)[:2], key=lambda segment: segment.start)
        assert (long.num_tokens, short.num_tokens) == (16, 4)
        firsts.add(long.start)
    assert len(firsts) > 10


@pytest.mark.parametrize("kind", ["next", "order"])
def test_documents_of_one_sentence_each_are_refused(kind: Any) -> None:
    with pytest.raises(DataError, match=r"a.txt:1: .* any of the other 2 has two sentences"):
        make([[5], [7], [9]], kind=kind)


def test_a_single_document_is_refused_for_next_sentences_only() -> None:
    with pytest.raises(DataError, match="no other one") as raised:
        make([[5, 5, 5]])
    assert "order" in str(raised.value.hint)
    assert len(make([[5, 5, 5]], kind="order")) == 1
    with pytest.raises(DataError, match="no documents"):
        make([])


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It rains. It pours!  Does it?", ["It rains.", "It pours!", "Does it?"]),
        ('He said "no." She left...', ['He said "no."', "She left..."]),
        ("It costs 3.50 a piece. Fine.", ["It costs 3.50 a piece.", "Fine."]),
        ("A title\nA line. \n\nAnother", ["A title", "A line.", "Another"]),
        ("今天下雨。你好！真的？是。", ["今天下雨。", "你好！", "真的？", "是。"]),
        ("他说：“走吧。”她走了。", ["他说：“走吧。”", "她走了。"]),
        ("no end", ["no end"]),
    ],
)
def test_sentences_end_where_a_reader_sees_it(text: str, sentences: list[str]) -> None:
    offsets = [(index, index + 1) for index, letter in enumerate(text) if not letter.isspace()]
    found: list[str] = []
    for start, (first, _) in zip(sentence_starts(text, offsets), offsets, strict=True):
        found += [""] if start else []
        found[-1] += text[first]
    assert found == ["".join(sentence.split()) for sentence in sentences]


def pairs_of_sections(documents: DocumentsInMemory, rows: Sequence[int]) -> SentencePairs:
    return SentencePairs(
        Sections(documents, 20), rows, SentencePairsConfig(copies=30), max_length=23,
        start_id=START, separator_id=SEPARATOR, seed=0,
    )  # fmt: skip


def test_a_wrong_next_sentence_is_of_another_document_where_sections_are_split() -> None:
    documents = make_documents([[5] * 20, [5] * 8, [4] * 10])  # 5, 2 and 2 sections
    rows = [0, 1, 3, 5, 6, 7, 8]
    pairs = pairs_of_sections(documents, rows)
    seen = set()
    for index in range(len(pairs)):
        pair = pairs.pair(index)
        first, second = (pairs[index]["input_ids"][place] // 1000 for place in (1, -2))
        assert (first == second) == (pair.label == 0)
        seen.add((first, second))
    assert seen == {(a, b) for a in (1, 2, 3) for b in (1, 2, 3)}


def test_of_one_document_a_wrong_next_sentence_is_not_of_the_section_that_follows() -> None:
    rows = [0, 1, 2, 4]
    pairs = pairs_of_sections(make_documents([[5] * 20]), rows)
    drawn = {
        (rows[pair.first.document], rows[pair.second.document])
        for pair in map(pairs.pair, range(len(pairs)))
        if pair.label == 1
    }
    everything = {(a, b) for a in rows for b in rows}
    assert drawn == everything - {(0, 0), (1, 1), (2, 2), (4, 4), (0, 1), (1, 2)}
    with pytest.raises(DataError, match="no other one to draw wrong next sentences from"):
        pairs_of_sections(make_documents([[5] * 20]), [2, 3])
