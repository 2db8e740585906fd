"""Schedules: where they start, where they end, and that they are functions of the step alone."""

from __future__ import annotations

import itertools

import pytest

from fulltune.optim.schedules import SCHEDULES, lr_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up_to_its_peak_and_never_rises_again(schedule: str) -> None:
    factors = [
        lr_factor(schedule, step, num_steps=100, warmup_steps=10)  # type: ignore[arg-type]
        for step in range(100)
    ]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == pytest.approx(1.0)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(factors[9:]))


@pytest.mark.parametrize(
    ("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5), ("wsd", 1.0), ("constant", 1.0)]
)
def test_the_middle_of_a_run_is_as_published(schedule: str, middle: float) -> None:
    factor = lr_factor(schedule, 50, num_steps=100, warmup_steps=0)  # type: ignore[arg-type]
    assert factor == pytest.approx(middle)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_a_falling_schedule_ends_at_its_floor(schedule: str) -> None:
    end = lr_factor(schedule, 100, num_steps=100, warmup_steps=5, floor=0.1)  # type: ignore[arg-type]
    assert end == pytest.approx(0.1)


def test_wsd_falls_only_in_its_last_share() -> None:
    factors = [
        lr_factor("wsd", step, num_steps=100, warmup_steps=10, decay=0.2) for step in range(101)
    ]
    assert set(factors[10:81]) == {1.0}
    assert factors[90] == pytest.approx(0.5)


def test_inverse_root_halves_after_four_times_the_warmup() -> None:
    assert lr_factor("inverse_sqrt", 40, num_steps=1000, warmup_steps=10) == pytest.approx(0.5)
