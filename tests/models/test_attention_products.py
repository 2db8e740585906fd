"""Attention of documents by plain products, with dropout and without."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fulltune.models import attention_products
from fulltune.models.document_attention import DocumentAttention
from fulltune.models.document_groups import plan_groups

RAGGED = (7, 6, 7, 30, 33, 5)
SCALE = 0.3


def make_states(lengths, dtype, heads=(4, 2, 2), size=8):
    torch.manual_seed(0)
    return [torch.randn(1, count, sum(lengths), size).to(dtype).requires_grad_() for count in heads]


def attend(states, lengths, *, causal=True, window=None, dropout=0.0, seed=3):
    torch.manual_seed(seed)
    groups = plan_groups((0, *accumulate(lengths)), causal, window)
    return DocumentAttention.apply(*states, groups, causal, SCALE, dropout)


def reference(states, lengths, *, causal):
    parts = zip(*(each.double().split(lengths, dim=2) for each in states), strict=True)
    mixed = [
        scaled_dot_product_attention(*part, is_causal=causal, scale=SCALE, enable_gqa=True)
        for part in parts
    ]
    return torch.cat(mixed, dim=2).transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", [RAGGED, (16, 16, 32)])
def test_gradients_with_dropout_are_those_of_finite_differences(lengths, causal, window):
    states = make_states(lengths, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *inputs: attend(
            inputs, lengths, causal=causal, window=window, dropout=0.25
        ),
        states,
    )  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [RAGGED, (64, 64, 128), (192,)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=["fp32", "bf16"]
)
def test_without_dropout_it_is_attention_forward_and_backward(lengths, causal, dtype, tolerance):
    states = make_states(lengths, dtype)
    out, expected = (
        attend(states, lengths, causal=causal),
        reference(states, lengths, causal=causal),
    )
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((out * weights).sum(), states)
    wanted = torch.autograd.grad((expected * weights).sum(), states)
    for each, exact in zip((out, *found), (expected, *wanted), strict=True):
        assert (each - exact).norm() < tolerance * exact.norm()


def test_dropout_keeps_the_mean():
    states = make_states(RAGGED, torch.float32)
    with torch.no_grad():
        plain = attend(states, RAGGED)
        dropped = [attend(states, RAGGED, dropout=0.2, seed=seed) for seed in range(400)]
    assert not torch.equal(dropped[0], dropped[1])
    error = (torch.stack(dropped).mean(0) - plain).abs().mean() / plain.abs().mean()
    assert error < 0.05


def test_the_masks_do_not_depend_on_what_else_is_computed_together(monkeypatch):
    lengths = (128,) * 5
    states = make_states(lengths, torch.float32)
    whole = attend(states, lengths, dropout=0.3)
    monkeypatch.setattr(attention_products, "_ELEMENTS", 3 * 128 * 128)
    torch.testing.assert_close(attend(states, lengths, dropout=0.3), whole)


def sizes_kept(states, lengths, *, dropout=0.0) -> list[int]:
    kept: list[int] = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attend(states, lengths, dropout=dropout)
    return kept


def test_nothing_as_large_as_the_weights_is_kept():
    states = make_states((256,), torch.float32, heads=(2, 2, 2), size=4)
    assert max(sizes_kept(states, (256,), dropout=0.1)) < 256 * 256


def test_sums_are_kept_only_of_documents_that_go_through_the_kernels():
    lengths = (64, 64, 200)
    states = make_states(lengths, torch.float32, heads=(4, 2, 2))
    inputs_and_output = [*(each.numel() for each in states), states[0].numel()]
    assert sizes_kept(states, lengths, dropout=0.1) == inputs_and_output
    assert sizes_kept(states, lengths) == [*inputs_and_output, 4 * 200]
