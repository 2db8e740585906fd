"""float32 masters: nothing small is lost, and a float32 model is left alone."""

from __future__ import annotations

import torch
from torch import nn

from fulltune.optim.master_weights import MasterWeights, RoundingProbe


def _tied_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.embedding = nn.Embedding(11, 8)
    model.head = nn.Linear(8, 11, bias=False)
    model.head.weight = model.embedding.weight
    return model


def test_an_update_too_small_for_bfloat16_is_kept_and_comes_through_in_the_end() -> None:
    model = nn.Linear(4, 4, bias=False)
    nn.init.ones_(model.weight)
    masters = MasterWeights(model, torch.bfloat16)
    for _ in range(100):
        for master in masters.tensors():
            master.sub_(1e-4)
        masters.write_back()
    assert model.weight.dtype == torch.bfloat16
    torch.testing.assert_close(masters.tensors()[0], torch.full((4, 4), 0.99), atol=1e-5, rtol=0)
    assert model.weight[0, 0].item() == float(torch.tensor(0.99).bfloat16())


def test_gradients_of_many_micro_batches_add_up_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False)
    masters = MasterWeights(model, torch.bfloat16)
    for _ in range(1000):
        model(torch.full((1, 1), 1.0, dtype=torch.bfloat16)).sum().backward()
    (master,) = masters.tensors()
    assert master.grad is not None
    assert master.grad.item() == 1000.0  # bfloat16 would have stopped at 256
    assert model.weight.grad is None


def test_a_tied_weight_has_one_master_with_the_gradients_of_both_uses() -> None:
    model = _tied_model()
    reference = _tied_model()
    masters = MasterWeights(model, torch.bfloat16)
    tokens = torch.tensor([1, 2, 3])
    for each in (model, reference):
        each.head(each.embedding(tokens)).float().square().sum().backward()
    assert len(masters) == 1
    (master,) = masters.tensors()
    expected = reference.embedding.weight.grad
    assert expected is not None
    assert master.grad is not None
    torch.testing.assert_close(master.grad, expected, rtol=0.03, atol=0.03)  # bfloat16 forward
    assert model.embedding.weight is model.head.weight


def test_a_float32_model_is_its_own_master() -> None:
    model = nn.Linear(2, 2)
    masters = MasterWeights(model, torch.float32)
    assert [id(tensor) for tensor in masters.tensors()] == [id(p) for p in model.parameters()]


def test_frozen_parameters_have_no_master() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    masters = MasterWeights(model, torch.bfloat16)
    assert [name for name, _ in masters.items()] == ["weight"]
    assert model.bias.dtype == torch.bfloat16


def test_the_share_of_lost_updates_is_one_for_tiny_and_zero_for_large_updates() -> None:
    model = nn.Linear(64, 64, bias=False)
    masters = MasterWeights(model, torch.bfloat16)
    for update, share in ((1e-9, 1.0), (1.0, 0.0)):
        probe = RoundingProbe(masters)
        masters.tensors()[0].add_(torch.where(masters.tensors()[0] > 0.01, update, 0.0))
        assert abs(probe.share_lost() - share) < 0.02
