"""A stream has every token of its documents once, in an order that the seed decides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulltune.data.sections import Sections
from fulltune.data.streams import TokenStream
from fulltune.errors import DataError
from tests.conftest import DocumentsInMemory, encoded_example

END = -1


def make_documents(lengths: Sequence[int]) -> DocumentsInMemory:
    """Every token tells its document and its place there."""
    return DocumentsInMemory(
        encoded_example(
            [1000 * index + place for place in range(length)],
            index,
            num_bytes=3 * length + 1,
            where=f"text.txt:{index + 1}",
        )
        for index, length in enumerate(lengths)
    )


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(lengths, st.integers(2, 40), st.integers(-(2**63), 2**63))
def test_windows_end_to_end_are_whole_documents_each_with_its_end(
    lengths: list[int], window: int, seed: int
) -> None:
    documents = make_documents(lengths)
    stream = TokenStream(documents, range(len(lengths)), seed, window_tokens=window, end_id=END)
    windows = [stream[index] for index in range(len(stream))]
    assert [len(each["input_ids"]) for each in windows] == stream.lengths.tolist()
    assert set(stream.lengths[:-1].tolist()) <= {window}
    tokens = [token for each in windows for token in each["input_ids"]]
    if (sum(lengths) + len(lengths)) % window == 1:
        tokens.append(END)  # one token alone is no window
    seen: list[int] = []
    while tokens:
        end = tokens.index(END)
        document = tokens[0] // 1000
        assert tokens[:end] == documents[document]["input_ids"]
        seen.append(document)
        del tokens[: end + 1]
    assert sorted(seen) == list(range(len(lengths)))


@given(lengths, st.integers(2, 40))
def test_the_bytes_of_all_windows_are_those_of_the_documents_but_for_each_first_token(
    lengths: list[int], window: int
) -> None:
    stream = TokenStream(
        make_documents(lengths), range(len(lengths)), 0, window_tokens=window, end_id=END
    )

    def bytes_of(token: int) -> int:
        document, place = divmod(token, 1000)
        total = 3 * lengths[document] + 1
        return total * (place + 1) // lengths[document] - total * place // lengths[document]

    for index in range(len(stream)):
        example = stream[index]
        predicted = [token for token in example["input_ids"][1:] if token != END]
        assert example["num_bytes"] == sum(map(bytes_of, predicted))


def test_a_window_is_named_by_its_first_document_and_reads_only_its_own() -> None:
    documents = make_documents([7] * 50)
    stream = TokenStream(documents, range(50), 3, window_tokens=8, end_id=END)
    documents.num_tokens_read = 0
    example = stream[20]
    assert documents.num_tokens_read == 7
    document = example["input_ids"][0] // 1000
    assert example["where"] == stream.where(20) == f"text.txt:{document + 1}"
    assert example["input_ids"][-1] == END
    assert example["targets"] == [1] * 8
    assert stream[-1] == stream[len(stream) - 1]
    with pytest.raises(IndexError):
        stream[len(stream)]


def test_the_order_follows_from_the_seed_and_the_set_of_documents() -> None:
    documents = make_documents([5] * 40)

    def make(indices: list[int], seed: int) -> TokenStream:
        return TokenStream(documents, indices, seed, window_tokens=6, end_id=END)

    def windows(stream: TokenStream) -> list[list[int]]:
        return [stream[index]["input_ids"] for index in range(len(stream))]

    first, same = make(list(range(40)), 1), make(list(reversed(range(40))), 1)
    other = make(list(range(40)), 2)
    assert windows(first) == windows(same)
    assert windows(first) != windows(other)
    assert first.fingerprint == same.fingerprint
    assert len({first.fingerprint, other.fingerprint, make(list(range(39)), 1).fingerprint}) == 3
    assert len({first[index]["example_hash"] for index in range(len(first))}) == 40


def test_a_short_last_window_is_kept_unless_nothing_in_it_can_be_predicted() -> None:
    documents = make_documents([10, 10])
    kept = TokenStream(documents, [0, 1], 0, window_tokens=8, end_id=END)
    dropped = TokenStream(documents, [0, 1], 0, window_tokens=7, end_id=END)
    assert kept.lengths.tolist() == [8, 8, 6]
    assert dropped.lengths.tolist() == [7, 7, 7]


def test_too_little_text_for_one_window_is_said() -> None:
    with pytest.raises(DataError, match="0 documents of this split have 0 tokens"):
        TokenStream(make_documents([10]), [], 0, window_tokens=64, end_id=END)


def test_sections_of_a_document_follow_each_other_without_an_end_between() -> None:
    documents = make_documents([25, 7, 40])
    sections = Sections(documents, 10)  # 3, 1 and 4 of them
    for seed in range(20):
        kept = [index for index in range(len(sections)) if index not in (1, 7)]
        stream = TokenStream(sections, kept, seed, window_tokens=8, end_id=END)
        tokens = [token for index in range(len(stream)) for token in stream[index]["input_ids"]]
        ends = [tokens[place - 1] for place, token in enumerate(tokens) if token == END]
        # The third document's last section is not among them: it ends before.
        assert sorted(ends) == [24, 1006, 2029]
        texts = [token for token in tokens if token != END]
        for document, held in ((0, 15), (1, 7), (2, 30)):
            own = [token for token in texts if token // 1000 == document]
            assert own == sorted(own)
            assert len(own) == held
        changes = sum(a // 1000 != b // 1000 for a, b in pairwise(texts))
        assert changes == 2
    orders = {
        tuple(TokenStream(sections, range(8), seed, window_tokens=75, end_id=END)[0]["input_ids"])
        for seed in range(20)
    }
    assert len(orders) == 6


def test_sections_keep_the_bytes_and_boundaries_of_their_tokens() -> None:
    documents = make_documents([25, 7, 40])
    for example in documents.examples:
        example["boundaries"] = [token % 7 for token in example["input_ids"]]
    stream = TokenStream(
        Sections(documents, 10), range(8), 3, window_tokens=9, end_id=END, boundaries=True
    )
    for index in range(len(stream)):
        window = stream[index]
        assert window["boundaries"] == [
            0 if token == END else token % 7 for token in window["input_ids"]
        ]
    assert sum(map(int, stream.lengths)) == 25 + 7 + 40 + 3
