from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulltune.data.packing import group_by_length, pack

LENGTHS = st.lists(st.integers(1, 40), max_size=60)
CAPACITY = st.integers(1, 50)


@given(lengths=LENGTHS, capacity=CAPACITY)
def test_packing_places_every_example_in_exactly_one_bin(lengths: list[int], capacity: int) -> None:
    bins = pack(np.array(lengths, dtype=np.int32), capacity)

    assert sorted(position for members in bins for position in members) == list(range(len(lengths)))


@given(lengths=LENGTHS, capacity=CAPACITY)
def test_only_a_lone_oversized_example_exceeds_the_capacity(
    lengths: list[int], capacity: int
) -> None:
    for members in pack(np.array(lengths, dtype=np.int64), capacity):
        assert len(members) > 0
        total = sum(lengths[position] for position in members)
        assert total <= capacity or len(members) == 1


@given(lengths=LENGTHS, capacity=CAPACITY)
def test_no_two_bins_could_have_been_one(lengths: list[int], capacity: int) -> None:
    bins = pack(np.array(lengths, dtype=np.int64), capacity)

    loads = sorted(sum(lengths[position] for position in members) for members in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


@given(
    pieces=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
)
def test_the_number_of_bins_is_near_the_optimum(pieces: list[list[int]], seed: int) -> None:
    capacity = max(sum(piece) for piece in pieces)
    # Every bin filled to the brim: the optimum is known, since no packing can do with fewer.
    full = [[*piece, capacity - sum(piece)] for piece in pieces]
    lengths = np.array([length for piece in full for length in piece if length > 0])
    np.random.default_rng(seed).shuffle(lengths)

    bins = pack(lengths, capacity)

    assert len(pieces) <= len(bins) <= 11 / 9 * len(pieces) + 1


@given(lengths=LENGTHS, capacity=CAPACITY)
def test_packing_twice_gives_the_same_bins(lengths: list[int], capacity: int) -> None:
    first, second = (pack(np.array(lengths, dtype=np.int64), capacity) for _ in range(2))

    assert [members.tolist() for members in first] == [members.tolist() for members in second]


def test_the_fullest_bin_that_fits_is_chosen() -> None:
    assert [members.tolist() for members in pack(np.array([7, 6, 3, 4]), 10)] == [[0, 2], [1, 3]]


def test_a_hundred_thousand_examples_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, size=100_000)

    start = time.process_time()
    bins = pack(lengths, 4096)

    assert time.process_time() - start < 5
    assert len(bins) * 4096 < lengths.sum() * 1.001


@given(lengths=LENGTHS, budget=CAPACITY)
def test_groups_partition_the_examples_within_the_padded_budget(
    lengths: list[int], budget: int
) -> None:
    groups = group_by_length(np.array(lengths, dtype=np.int64), token_budget=budget)

    assert sorted(position for group in groups for position in group) == list(range(len(lengths)))
    for group in groups:
        assert (
            max(lengths[position] for position in group) * len(group) <= budget or len(group) == 1
        )


@given(lengths=LENGTHS, budget=CAPACITY)
def test_groups_hold_examples_of_like_length(lengths: list[int], budget: int) -> None:
    groups = group_by_length(np.array(lengths, dtype=np.int64), token_budget=budget)

    in_order = [lengths[position] for group in groups for position in group]
    assert in_order == sorted(lengths, reverse=True)


def test_a_bin_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity is 0"):
        pack(np.array([1]), 0)
    with pytest.raises(ValueError, match="token_budget is 0"):
        group_by_length(np.array([1]), token_budget=0)
