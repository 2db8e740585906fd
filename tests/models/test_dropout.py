"""Dropout from 15 random bits an element."""

from __future__ import annotations

import pytest
import torch

from fulltune.models.dropout import KeepMasks, dropout, mask_

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_share_of_zeros_is_the_probability_and_the_mean_stays(dtype, probability):
    torch.manual_seed(0)
    count = 1_000_003  # fills no whole number of 64 bits
    dropped = dropout(torch.ones(count, dtype=dtype), probability)
    share = float((dropped == 0).double().mean())
    deviation = (probability * (1 - probability) / count) ** 0.5
    assert abs(share - probability) < 5 * deviation + 2**-15
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / (1 - probability)], rel=1e-2)
    assert float(dropped.double().mean()) == pytest.approx(1.0, abs=0.02)


def test_neighbours_are_dropped_independently():
    states = torch.ones(1_000_000)
    torch.manual_seed(1)
    kept = (dropout(states, 0.5) > 0).double() - 0.5
    for distance in range(1, 9):
        assert abs(float((kept[distance:] * kept[:-distance]).mean())) < 0.0015


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_passes_where_the_value_passed(dtype):
    torch.manual_seed(2)
    states = torch.randn(33, 7, dtype=dtype).requires_grad_()
    dropped = dropout(states, 0.3)
    dropped.sum().backward()
    scale = (dropped / states).detach()
    torch.testing.assert_close(states.grad, scale, rtol=0.02, atol=0)
    assert ((states.grad == 0) == (dropped == 0)).all()


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_nothing_and_everything_can_be_dropped(probability):
    states = torch.randn(5, 4)
    assert torch.equal(dropout(states, probability), states * (1 - probability))


def test_what_is_dropped_is_zero_even_where_it_was_not_finite():
    masks = KeepMasks(0.5, seed=3)
    states = torch.full((1000,), torch.inf)
    mask_(states, masks.next(states.shape, states.dtype))
    assert set(states.tolist()) == {0.0, torch.inf}


def test_masks_of_one_seed_come_again_in_order_and_differ_from_each_other():
    draws = [KeepMasks(0.1, seed=4), KeepMasks(0.1, seed=4)]
    first, second = ([masks.next((50, 3), torch.float32) for _ in range(2)] for masks in draws)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
