"""AdamW in proportion to each weight's size: its formula, and its state through a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from fulltune.optim.master_weights import MasterWeights
from fulltune.optim.optimizers import Optimizer, OptimizerConfig, group_parameters
from fulltune.optim.scaled_adamw import SMALLEST_SCALE


def make(size: float = 0.05, decay: float = 0.0) -> tuple[nn.Module, MasterWeights, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(size)
        model[0].bias.zero_()
    masters = MasterWeights(model, torch.float32)
    config = OptimizerConfig(
        name="adamw_scaled", lr=0.02, weight_decay=decay, schedule="constant", warmup="0 steps"
    )
    groups = group_parameters(
        masters, config, layer_of={name: 0 for name, _ in masters.items()}, num_layers=1
    )
    return model, masters, Optimizer(masters, groups, config, num_steps=20)


def run(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step(step)


@pytest.mark.parametrize("size", [0.05, 3.0])
def test_one_step_is_adamw_with_the_rate_times_the_root_mean_square(size: float) -> None:
    model, masters, optimizer = make(size)
    reference, _, _ = make(size)
    rates = {
        name: 0.02 * max(SMALLEST_SCALE, float(each.detach().square().mean().sqrt()))
        for name, each in reference.named_parameters()
    }
    assert rates["0.bias"] == 0.02 * SMALLEST_SCALE
    inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    reference(inputs).square().sum().backward()
    torch.optim.AdamW(
        [{"params": [each], "lr": rates[name]} for name, each in reference.named_parameters()],
        weight_decay=0.0,
    ).step()
    run(model, optimizer, range(1))
    expected = dict(reference.named_parameters())
    for name, master in masters.items():
        # The root mean square is rounded in float32 by another sum.
        torch.testing.assert_close(master, expected[name], rtol=1e-6, atol=1e-8)


def test_the_decay_is_a_share_of_the_weight_whatever_its_size() -> None:
    for size in (0.05, 3.0):
        plain, _, without = make(size)
        decayed, _, with_decay = make(size, decay=0.1)
        before = plain[0].weight.detach().clone()
        run(plain, without, range(1))
        run(decayed, with_decay, range(1))
        lost = plain[0].weight.detach() - decayed[0].weight.detach()
        # The difference of nearly equal float32 numbers keeps four digits.
        torch.testing.assert_close(lost, before * 0.02 * 0.1, rtol=1e-3, atol=3e-7 * size)


def test_a_resumed_run_equals_an_unbroken_one() -> None:
    model, masters, optimizer = make(decay=0.1)
    run(model, optimizer, range(12))

    first, first_masters, first_optimizer = make(decay=0.1)
    run(first, first_optimizer, range(5))
    weights: Mapping[str, Tensor] = {
        name: master.detach().clone() for name, master in first_masters.items()
    }
    state = {name: tensor.clone() for name, tensor in first_optimizer.state()}
    assert {name.rpartition("/")[2] for name in state} == {"step", "exp_avg", "exp_avg_sq"}

    resumed, resumed_masters, resumed_optimizer = make(decay=0.1)
    resumed_masters.load(weights)
    resumed_optimizer.load_state(state)
    run(resumed, resumed_optimizer, range(5, 12))
    for name, master in masters.items():
        assert torch.equal(master, dict(resumed_masters.items())[name]), name


def test_the_settings_of_adamw_have_an_effect() -> None:
    assert OptimizerConfig(name="adamw_scaled", betas=(0.9, 0.95)).betas == (0.9, 0.95)
    with pytest.raises(ValueError, match="momentum"):
        OptimizerConfig(name="adamw_scaled", momentum=0.5)
