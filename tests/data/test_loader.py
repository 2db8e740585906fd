from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulltune.config import Quantity
from fulltune.data.loader import Loader, StepPlan, num_steps, prefetch
from fulltune.errors import CheckpointError, ConfigError, DataError

LENGTHS = np.random.default_rng(0).integers(1, 60, size=300)
INDICES = np.arange(0, 300, 2)


def make_loader(**changes: Any) -> Loader:
    settings: dict[str, Any] = {
        "lengths": LENGTHS,
        "indices": INDICES,
        "batch": Quantity(200, "tokens"),
        "micro_batch_tokens": 100,
        "seed": 5,
        "packing": True,
    }
    settings |= changes
    return Loader(settings.pop("lengths"), settings.pop("indices"), **settings)


def epoch_of(loader: Loader, epoch: int = 0) -> list[StepPlan]:
    plans = islice(loader, sum(loader.steps_per_epoch(number) for number in range(epoch + 1)))
    return [plan for plan in plans if plan.epoch == epoch]


def examples_of(plan: StepPlan) -> list[int]:
    return [int(index) for batch in plan.micro_batches for index in batch]


def steps_of(loader: Loader, epoch: int = 0) -> list[list[int]]:
    return [sorted(examples_of(plan)) for plan in epoch_of(loader, epoch)]


@pytest.mark.parametrize("batch", [Quantity(200, "tokens"), Quantity(16, "examples")])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_takes_every_example_once(batch: Quantity, epoch: int) -> None:
    steps = steps_of(make_loader(batch=batch), epoch)

    assert sorted(index for step in steps for index in step) == INDICES.tolist()


def test_a_step_of_tokens_ends_before_the_example_that_would_exceed_it() -> None:
    loader = make_loader(
        shuffle=False,
        lengths=np.array([4, 6, 3, 9, 30, 2, 2]),
        indices=np.arange(7),
        batch=Quantity(10, "tokens"),
    )

    assert steps_of(loader) == [[0, 1], [2], [3], [4], [5, 6]]


def test_the_last_step_of_an_epoch_holds_what_is_left() -> None:
    plans = epoch_of(make_loader(batch=Quantity(64, "examples")))

    assert [plan.num_examples for plan in plans] == [64, 64, 22]


@settings(max_examples=20, deadline=None)
@given(
    micro_batch_tokens=st.integers(1, 500),
    packing=st.booleans(),
    world_size=st.integers(1, 5),
    batch=st.sampled_from([Quantity(200, "tokens"), Quantity(7, "examples")]),
)
def test_the_examples_of_a_step_depend_on_neither_micro_batches_nor_ranks(
    micro_batch_tokens: int, packing: bool, world_size: int, batch: Quantity
) -> None:
    plain = steps_of(make_loader(batch=batch))
    ranks = [
        epoch_of(
            make_loader(
                batch=batch,
                micro_batch_tokens=micro_batch_tokens,
                packing=packing,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]

    together = [
        sorted(index for plan in plans for index in examples_of(plan))
        for plans in zip(*ranks, strict=True)
    ]

    assert together == plain
    for plans in zip(*ranks, strict=True):
        assert len({(plan.num_examples, plan.num_tokens) for plan in plans}) == 1


def test_ranks_have_nearly_the_same_number_of_tokens() -> None:
    loaders = [
        make_loader(batch=Quantity(60, "examples"), rank=rank, world_size=4) for rank in range(4)
    ]
    for plans in zip(*map(epoch_of, loaders), strict=True):
        tokens = [sum(LENGTHS[examples_of(plan)]) for plan in plans]
        assert max(tokens) - min(tokens) <= LENGTHS.max()


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_stay_within_their_tokens(packing: bool) -> None:
    for plan in epoch_of(make_loader(packing=packing)):
        for batch in plan.micro_batches:
            lengths = LENGTHS[batch]
            assert (lengths.sum() if packing else lengths.max() * len(batch)) <= 100


def test_every_epoch_and_seed_has_its_own_order() -> None:
    loader = make_loader()

    assert steps_of(loader, 0) == steps_of(make_loader(), 0)
    assert steps_of(loader, 0) != steps_of(loader, 1)
    assert steps_of(loader, 0) != steps_of(make_loader(seed=6), 0)


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    loader = make_loader(
        lengths=np.ones(8, dtype=int), indices=np.arange(8), batch=Quantity(1, "examples"), seed=1
    )

    assert [examples_of(plan)[0] for plan in islice(loader, 8)] == [2, 4, 7, 5, 0, 6, 3, 1]


def test_counts_of_a_step_are_those_of_its_examples() -> None:
    for plan in epoch_of(make_loader()):
        assert plan.num_examples == len(examples_of(plan))
        assert plan.num_tokens == LENGTHS[examples_of(plan)].sum()


@pytest.mark.parametrize("taken", [0, 3, 30, 45])
def test_a_resumed_loader_goes_on_where_the_saved_one_stood(taken: int) -> None:
    loader = make_loader()
    plans = iter(loader)
    for _ in range(taken):
        loader.advance(next(plans))

    resumed = make_loader(micro_batch_tokens=70, packing=False)
    resumed.load_state(json.loads(json.dumps(loader.state())))

    for expected, plan in zip(islice(plans, 40), resumed, strict=False):
        assert sorted(examples_of(plan)) == sorted(examples_of(expected))
        assert (plan.epoch, plan.step_in_epoch) == (expected.epoch, expected.step_in_epoch)


def test_the_place_does_not_move_before_the_step_is_taken() -> None:
    loader = make_loader()
    plan = next(iter(loader))

    assert loader.state()["step_in_epoch"] == 0
    loader.advance(plan)
    assert loader.state()["step_in_epoch"] == 1
    with pytest.raises(ValueError, match="not the next one"):
        loader.advance(plan)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 6}, "the seed was `5` and is now `6`"),
        (
            {"batch": Quantity(64, "examples")},
            "the batch was `200 tokens` and is now `64 examples`",
        ),
        ({"shuffle": False}, "shuffling was `True` and is now `False`"),
        ({"indices": INDICES[:-1]}, "the number of examples was `150` and is now `149`"),
        ({"lengths": LENGTHS + 1}, "the fingerprint of the examples was"),
        ({"dataset_fingerprint": "other text"}, "the fingerprint of the examples was"),
    ],
)
def test_a_place_in_other_data_is_refused_with_what_differs(
    changes: dict[str, Any], named: str
) -> None:
    state = make_loader().state()

    with pytest.raises(CheckpointError) as caught:
        make_loader(**changes).load_state(state)

    assert named in str(caught.value)


@pytest.mark.parametrize(
    "damage", [{"epoch": -1}, {"step_in_epoch": 10_000}, {"step_in_epoch": None}]
)
def test_a_damaged_place_is_refused(damage: dict[str, Any]) -> None:
    loader = make_loader()

    with pytest.raises(CheckpointError, match="is none"):
        loader.load_state(loader.state() | damage)


def test_a_split_without_examples_is_refused() -> None:
    with pytest.raises(DataError, match="no example to train on"):
        make_loader(indices=np.array([], dtype=np.int64))


@pytest.mark.parametrize("batch", [Quantity(0.5, "examples"), Quantity(3, "epochs")])
def test_a_batch_that_is_no_step_is_refused(batch: Quantity) -> None:
    with pytest.raises(ConfigError, match="is no step"):
        make_loader(batch=batch)


@pytest.mark.parametrize("batch", [Quantity(200, "tokens"), Quantity(16, "examples")])
def test_steps_per_epoch_is_the_number_of_plans(batch: Quantity) -> None:
    loader = make_loader(batch=batch)
    epochs = [plan.epoch for plan in islice(loader, 120)]

    assert [loader.steps_per_epoch(epoch) for epoch in range(2)] == [
        epochs.count(0),
        epochs.count(1),
    ]


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (Quantity(1, "epochs"), 10),
        (Quantity(0.3, "epochs"), 3),
        (Quantity(2.55, "epochs"), 26),
        (Quantity(0.001, "epochs"), 1),
        (Quantity(7, "steps"), 7),
        (Quantity(1, "tokens"), 1),
        (Quantity(64, "tokens"), 2),
        (Quantity(65, "tokens"), 3),
        (Quantity(320, "tokens"), 10),
        (Quantity(321, "tokens"), 11),
    ],
)
def test_a_duration_in_any_unit_is_a_number_of_steps(duration: Quantity, expected: int) -> None:
    loader = make_loader(
        lengths=np.full(40, 8), indices=np.arange(40), batch=Quantity(4, "examples")
    )

    assert num_steps(duration, loader) == expected


@given(tokens=st.integers(1, 12_000))
@settings(max_examples=30, deadline=None)
def test_a_duration_in_tokens_ends_with_the_step_that_reaches_them(tokens: int) -> None:
    loader = make_loader()
    steps = num_steps(Quantity(tokens, "tokens"), loader)
    seen = np.cumsum([plan.num_tokens for plan in islice(loader, steps)])

    assert seen[-1] >= tokens
    assert steps == 1 or seen[-2] < tokens


def test_a_duration_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="`0 epochs` has no step"):
        num_steps(Quantity(0, "epochs"), make_loader())


def test_a_million_examples_are_ordered_and_cut_quickly() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, size=1_000_000)
    loader = make_loader(
        lengths=lengths, indices=np.arange(1_000_000), batch=Quantity(32768, "tokens")
    )

    start = time.process_time()
    loader.steps_per_epoch()
    next(iter(loader))

    assert time.process_time() - start < 5


# -- prefetch --------------------------------------------------------------------------------------


def test_prefetching_keeps_items_and_their_order() -> None:
    with prefetch(iter(range(100)), depth=3) as items:
        assert list(items) == list(range(100))


def test_no_more_than_the_depth_is_made_ahead() -> None:
    made: list[int] = []
    waiting = threading.Event()

    def source() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            if number == 2:
                waiting.set()
            yield number

    with prefetch(source(), depth=2) as items:
        assert waiting.wait(timeout=10)
        time.sleep(0.05)
        assert made == [0, 1, 2]  # two ready, and one in hand
        assert next(items) == 0


def test_an_error_of_the_source_reaches_the_consumer_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise DataError("row 2 is broken")

    with prefetch(source(), depth=4) as items:
        assert next(items) == 1
        with pytest.raises(DataError, match="row 2 is broken"):
            next(items)
        with pytest.raises(StopIteration):
            next(items)


def test_closing_early_ends_the_thread_of_an_endless_source() -> None:
    before = threading.active_count()
    with prefetch(iter(make_loader()), depth=2) as items:
        next(items)
        assert threading.active_count() == before + 1

    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(items)


def test_the_saved_place_is_that_of_the_consumed_steps() -> None:
    loader = make_loader()
    with prefetch(iter(loader), depth=8) as plans:
        for _ in range(5):
            loader.advance(next(plans))
        assert loader.state()["step_in_epoch"] == 5


def test_a_depth_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="depth is 0"):
        prefetch(iter([]), depth=0)
