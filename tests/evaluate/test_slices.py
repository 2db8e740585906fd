"""Slices hold every example once, and the worst errors are the surest wrong ones."""

from __future__ import annotations

import numpy as np
import pytest

from fulltune.evaluate.additive import mean_parts
from fulltune.evaluate.slices import length_buckets, slices_of, worst_places


def test_buckets_of_length_hold_every_example_once_and_are_named_by_what_is_in_them() -> None:
    lengths = np.random.default_rng(0).integers(3, 40, size=200)
    buckets = length_buckets(lengths)
    assert sorted(np.concatenate(list(buckets.values()))) == list(range(200))
    assert len(buckets) == 4
    assert all(35 <= len(members) <= 70 for members in buckets.values())
    for name, members in buckets.items():
        low, high = map(int, name.split(" to "))
        assert (lengths[members].min(), lengths[members].max()) == (low, high)


def test_examples_of_one_length_are_one_bucket() -> None:
    assert list(length_buckets([7] * 9)) == ["7"]
    assert {name: members.tolist() for name, members in length_buckets([5, 5, 5, 9]).items()} == {
        "5": [0, 1, 2],
        "9": [3],
    }
    assert length_buckets([]) == {}


def test_a_slice_has_the_metrics_of_its_examples() -> None:
    parts = mean_parts({"accuracy": [1, 1, 0, 0, 1], "loss": [0.1, 0.2, 2.0, 1.0, 0.3]})
    short, long = slices_of(parts, {"short": np.array([0, 1, 4]), "long": np.array([2, 3])})
    assert short.metrics == pytest.approx({"accuracy": 1.0, "loss": 0.2})
    assert long.metrics == pytest.approx({"accuracy": 0.0, "loss": 1.5})
    assert long.num_examples == 2
    assert short.intervals["accuracy"].high == 1.0
    assert short.as_json()["intervals"]["accuracy"]["method"] == "wilson"


def test_the_worst_errors_are_wrong_and_in_the_order_of_their_loss() -> None:
    losses = np.array([0.1, 3.0, 0.7, 5.0, 3.0])
    wrong = np.array([True, True, False, False, True])
    assert worst_places(losses, wrong) == [1, 4, 0]
    assert worst_places(losses, wrong, 1) == [1]
    assert worst_places(losses, ~wrong & False) == []
