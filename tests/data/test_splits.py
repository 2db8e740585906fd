from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulltune.data.splits import (
    CountOfTrain,
    ShareOfTrain,
    Source,
    parse_validation,
    split_dataset,
)
from fulltune.data.tasks import TaskKind
from fulltune.errors import ConfigError


@dataclass
class Examples:
    """The columns of an encoded data set that a split looks at."""

    kind: TaskKind
    input_hashes: npt.NDArray[np.int64]
    example_hashes: npt.NDArray[np.int64]


def examples(inputs: list[int], kind: TaskKind = "chat") -> Examples:
    hashes = np.array(inputs, dtype=np.int64)
    return Examples(kind, hashes, np.arange(len(inputs), dtype=np.int64))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5%", ShareOfTrain(0.05)),
        (" 12.5 % ", ShareOfTrain(0.125)),
        ("500 examples", CountOfTrain(500)),
        ("1 example", CountOfTrain(1)),
        ("10_000 examples", CountOfTrain(10_000)),
        ("1,000 examples", CountOfTrain(1_000)),
        ("12,345,678 examples", CountOfTrain(12_345_678)),
        ("data/validation.jsonl", Source("data/validation.jsonl")),
        ("hub:owner/name:validation", Source("hub:owner/name:validation")),
        ("5%.jsonl", Source("5%.jsonl")),
    ],
)
def test_validation_is_a_share_a_number_or_a_source(text: str, expected: object) -> None:
    assert parse_validation(text) == expected


@pytest.mark.parametrize("text", ["0%", "100%", "150%", "0 examples", "500", "0.05", ""])
def test_a_validation_setting_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"`task\.validation` is `") as caught:
        parse_validation(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    "text", ["1,5 examples", "1,50 examples", "0,500 examples", "1,0000 examples", "0,5%", "1,000%"]
)
def test_a_comma_that_does_not_part_thousands_is_no_number_of_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="a comma only parts thousands") as caught:
        parse_validation(text)
    assert text in str(caught.value)
    assert "`500 examples`" in str(caught.value.hint)


@given(
    inputs=st.lists(st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=60),
    validation=st.sampled_from(["1%", "5%", "30%", "1 example", "7 examples"]),
    seed=st.integers(0, 2**32),
)
def test_no_input_is_on_both_sides_and_none_is_lost(
    inputs: list[int], validation: str, seed: int
) -> None:
    data = examples(inputs)
    try:
        split = split_dataset(data, validation, seed=seed)
    except ConfigError:
        assert len(set(inputs)) == 1 or len(inputs) <= 7
        return
    both = np.concatenate([split.train, split.validation])
    assert sorted(both) == list(range(len(inputs)))
    assert len(split.train)
    assert len(split.validation)
    assert not {inputs[i] for i in split.train} & {inputs[i] for i in split.validation}


def test_the_split_does_not_depend_on_the_order_of_rows() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.integers(0, 700, 1000)
    order = generator.permutation(1000)
    first = split_dataset(examples(list(inputs)), "10%", seed=3)
    second = split_dataset(examples(list(inputs[order])), "10%", seed=3)
    assert set(order[second.validation]) == set(first.validation)
    other = split_dataset(examples(list(inputs)), "10%", seed=4)
    assert set(other.validation) != set(first.validation)


@pytest.mark.parametrize(("validation", "count"), [("5%", 50), ("123 examples", 123)])
def test_the_size_is_exact_where_inputs_allow_it(validation: str, count: int) -> None:
    assert len(split_dataset(examples(list(range(1000))), validation, seed=0).validation) == count
    paired = list(range(950)) + [0] * 50
    assert len(split_dataset(examples(paired), validation, seed=0).validation) == count


def test_at_least_one_example_is_set_aside() -> None:
    assert len(split_dataset(examples([1, 2, 3]), "1%", seed=0).validation) == 1


@pytest.mark.parametrize("validation", [None, "other.jsonl"])
def test_without_a_share_everything_is_for_training(validation: str | None) -> None:
    split = split_dataset(examples([1, 2]), validation, seed=0)
    assert split.train.tolist() == [0, 1]
    assert split.validation.tolist() == []


def test_a_side_without_examples_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        split_dataset(examples([1, 2, 3]), "3 examples", seed=0)
    assert str(caught.value) == (
        "`task.validation` is `3 examples`, which leaves none of the 3 examples for training"
    )
    with pytest.raises(ConfigError, match="all 3 examples have the same input"):
        split_dataset(examples([7, 7, 7]), "30%", seed=0)


def test_one_long_document_is_split_by_windows_and_says_so() -> None:
    split = split_dataset(examples([7] * 100, "text"), "5%", seed=0)
    assert len(split.validation) == 5
    assert split.note
    assert "windows of the same document" in split.note
    many = split_dataset(examples([i // 2 for i in range(100)], "text"), "5%", seed=0)
    assert many.note is None


def test_equal_windows_stay_on_one_side() -> None:
    data = examples([7] * 100, "text")
    data.example_hashes[:50] = 1
    split = split_dataset(data, "20%", seed=0)
    assert len(split.validation) == 20
    assert not set(split.validation) & set(range(50))
