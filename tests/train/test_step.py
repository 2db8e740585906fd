"""The step: the same update however it is cut, and none where the loss is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from fulltune.data.encoding import EncodedExample
from fulltune.data.tasks import ChatExample, Message
from fulltune.models.families import layers_of, num_layers
from fulltune.models.loading import load_model, load_tokenizer
from fulltune.objectives.causal_lm import CausalLM
from fulltune.optim.master_weights import MasterWeights
from fulltune.optim.optimizers import Optimizer, OptimizerConfig, group_parameters
from fulltune.runtime import Runtime
from fulltune.train.health import NonFiniteError, SpikeDetector, nonfinite_rows
from fulltune.train.step import MicroBatch, train_step

CPU = Runtime(torch.device("cpu"))
PROMPTS = (
    "Hello",
    "Where is Paris?",
    "What is the answer to the question?",
    "你好",
    "Tell me all of it",
)
ANSWERS = (
    "Yes.",
    "In France, by the river.",
    "巴黎。",
    "No, there are seven apples in the basket.",
)


def make_objective(model_dir: Path, *, packing: bool = True) -> CausalLM:
    return CausalLM(load_tokenizer(model_dir), max_length=128, packing=packing)


def make_examples(objective: CausalLM, count: int = 8) -> list[EncodedExample]:
    return [
        encoded
        for index in range(count)
        for encoded in objective.encode(
            ChatExample(
                (
                    Message("user", PROMPTS[index % len(PROMPTS)]),
                    Message("assistant", ANSWERS[index % len(ANSWERS)]),
                ),
                f"test.jsonl:{index + 1}",
            )
        )
    ]


def load_without_dropout(model_dir: Path) -> PreTrainedModel:
    return load_model(
        model_dir,
        head="causal_lm",
        labels=None,
        dtype=torch.float32,
        attention="fulltune",
        dropout=0.0,
        seed=0,
    )


def make_optimizer(model: torch.nn.Module, dtype: torch.dtype) -> Optimizer:
    masters = MasterWeights(model, dtype)
    config = OptimizerConfig(lr=1e-2, schedule="constant")
    layers = layers_of(model)
    groups = group_parameters(
        masters,
        config,
        layer_of=layers,
        num_layers=num_layers(model.config),  # type: ignore[arg-type]
    )
    return Optimizer(masters, groups, config, num_steps=10)


def step_with_cut(
    model_dir: Path, sizes: list[int], *, packing: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    objective = make_objective(model_dir, packing=packing)
    examples = make_examples(objective)
    model = load_without_dropout(model_dir)
    optimizer = make_optimizer(model, dtype)
    micro_batches, start = [], 0
    for size in sizes:
        chosen = examples[start : start + size]
        micro_batches.append(MicroBatch(objective.collate(chosen), chosen))
        start += size
    assert start == len(examples)
    result = train_step(
        model,
        objective,
        micro_batches,
        optimizer,
        0,
        runtime=CPU,
        clip_norm=0.5,
        measure_rounding=False,
    )
    assert result.num_targets == sum(sum(example["targets"]) for example in examples)
    assert result.grad_norm > 0.5  # the bound binds, so that clipping is part of what is compared
    return {name: tensor.detach().clone() for name, tensor in optimizer.masters.items()}


@pytest.mark.parametrize("sizes", [[4, 4], [1, 7], [2, 2, 2, 2], [1] * 8])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_the_update_does_not_depend_on_how_the_step_is_cut(
    request: pytest.FixtureRequest, family: str, sizes: list[int]
) -> None:
    model_dir = request.getfixturevalue(family)
    whole, cut = step_with_cut(model_dir, [8]), step_with_cut(model_dir, sizes)
    for name, expected in whole.items():
        # AdamW's first update divides a gradient by itself: only the tiniest gradients can differ.
        torch.testing.assert_close(cut[name], expected, rtol=1e-4, atol=2e-5, msg=name)


def test_packed_and_padded_rows_give_the_same_update(tiny_llama: Path) -> None:
    packed, padded = step_with_cut(tiny_llama, [8]), step_with_cut(tiny_llama, [8], packing=False)
    for name, expected in packed.items():
        torch.testing.assert_close(padded[name], expected, rtol=1e-4, atol=2e-5, msg=name)


def test_a_step_without_any_target_changes_nothing_and_is_not_nan(tiny_llama: Path) -> None:
    objective = make_objective(tiny_llama)
    examples = [
        {**example, "targets": [0] * len(example["targets"])}
        for example in make_examples(objective)
    ]
    model = load_without_dropout(tiny_llama)
    optimizer = make_optimizer(model, torch.float32)
    for group in optimizer._optimizers[0].param_groups:
        group["weight_decay"] = 0.0
    before = {name: tensor.detach().clone() for name, tensor in optimizer.masters.items()}
    micro = MicroBatch(objective.collate(examples), examples)  # type: ignore[arg-type]
    result = train_step(
        model, objective, [micro], optimizer, 0, runtime=CPU, clip_norm=1.0, measure_rounding=False
    )
    assert (result.loss, result.num_targets) == (0.0, 0)
    for name, tensor in optimizer.masters.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_row(
    tiny_llama: Path, dtype: torch.dtype
) -> None:
    objective = make_objective(tiny_llama)
    examples = make_examples(objective)
    model = load_without_dropout(tiny_llama)
    rare = set(examples[3]["input_ids"]).difference(
        *(example["input_ids"] for index, example in enumerate(examples) if index != 3)
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[rare.pop()] = float("inf")
    optimizer = make_optimizer(model, dtype)
    before = {name: tensor.detach().clone() for name, tensor in optimizer.masters.items()}
    micro_batches = [
        MicroBatch(objective.collate(examples[:2]), examples[:2]),
        MicroBatch(objective.collate(examples[2:]), examples[2:]),
    ]
    with pytest.raises(
        NonFiniteError, match="step 1: loss is nan; the update was not made"
    ) as caught:
        train_step(
            model,
            objective,
            micro_batches,
            optimizer,
            0,
            runtime=CPU,
            clip_norm=1.0,
            measure_rounding=False,
        )
    for name, tensor in optimizer.masters.items():
        assert torch.equal(tensor, before[name]), name
    assert caught.value.micro_batches == (1,)
    rows = nonfinite_rows(model, objective, examples[2:], optimizer.masters, CPU.device)
    assert rows == ["test.jsonl:4"]


def test_a_jump_of_the_loss_is_a_spike_and_its_noise_is_not() -> None:
    detector = SpikeDetector()
    assert not any(detector.is_spike(2.0 + 0.05 * (-1) ** step) for step in range(100))
    assert detector.is_spike(4.0)
    assert not detector.is_spike(2.02)


def test_the_hard_rows_of_a_nearly_learned_task_are_not_reported_again_and_again() -> None:
    detector = SpikeDetector()
    losses = [0.015 if step % 6 else 0.2 for step in range(120)]
    assert not any(detector.is_spike(loss) for loss in losses)
    assert detector.is_spike(1.0)
