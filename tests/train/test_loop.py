"""When something is due in the loop."""

from __future__ import annotations

import numpy as np
import pytest

from fulltune.config import Quantity
from fulltune.data.loader import Loader
from fulltune.train.loop import every


def uneven_loader() -> Loader:
    """Batches of tokens: the number of steps differs from epoch to epoch."""
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    loader = Loader(
        lengths, np.arange(100), batch=Quantity(100, "tokens"), micro_batch_tokens=100, seed=0,
        packing=True,
    )  # fmt: skip
    assert len({loader.steps_per_epoch(epoch) for epoch in range(8)}) > 1
    return loader


def due_steps(period: Quantity, loader: Loader, num_steps: int) -> list[int]:
    due = every(period, loader.epochs_after)
    return [step for step in range(1, num_steps + 1) if due.due(step, last=False)]


def test_a_period_of_an_epoch_ends_where_every_epoch_ends() -> None:
    loader = uneven_loader()
    ends = np.cumsum([loader.steps_per_epoch(epoch) for epoch in range(8)]).tolist()
    assert due_steps(Quantity(1, "epochs"), loader, ends[-1]) == ends
    assert due_steps(Quantity(2, "epochs"), loader, ends[-1]) == ends[1::2]


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_a_part_of_an_epoch_is_due_as_often_as_it_fits_and_at_the_end(parts: int) -> None:
    loader = uneven_loader()
    ends = np.cumsum([loader.steps_per_epoch(epoch) for epoch in range(8)]).tolist()
    due = due_steps(Quantity(1 / parts, "epochs"), loader, ends[-1])
    assert len(due) == 8 * parts
    assert set(ends) <= set(due)


def test_a_period_in_steps_and_the_last_step() -> None:
    loader = uneven_loader()
    assert due_steps(Quantity(5, "steps"), loader, 17) == [5, 10, 15]
    assert every(Quantity(5, "steps"), loader.epochs_after).due(17, last=True)
    assert every(Quantity(1, "epochs"), loader.epochs_after).due(17, last=True)
