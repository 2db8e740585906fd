"""The top layers of a model start with new weights; the others keep theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fulltune.config import build_config
from fulltune.errors import ConfigError
from fulltune.models.families import layers_of, num_layers
from fulltune.models.loading import load_model
from fulltune.models.reinitialize import reinitialize_layers
from fulltune.recipes import finetune


def loaded(path: Path, head: str = "classification") -> torch.nn.Module:
    labels = ["a", "b"] if head == "classification" else None
    return load_model(path, head=head, labels=labels, dtype=torch.float32)


def started_anew(path: Path, count: int, *, seed: int = 0, head: str = "classification"):
    model = loaded(path, head)
    new = reinitialize_layers(
        model, count, layer_of=layers_of(model), num_layers=num_layers(model.config), seed=seed
    )
    return model, new


@pytest.mark.parametrize(
    ("name", "head"),
    [("tiny_bert", "classification"), ("tiny_gpt2", "classification"), ("tiny_llama", "causal_lm")],
)
def test_only_the_top_layer_and_the_pooler_start_anew(
    request: pytest.FixtureRequest, name: str, head: str
) -> None:
    path = request.getfixturevalue(name)
    before = dict(loaded(path, head).named_parameters())
    model, new = started_anew(path, 1, head=head)
    layers = layers_of(model)
    assert new
    assert {layers[each] for each in new} <= {1, "head"}
    assert any("pooler" in each for each in new) == (name == "tiny_bert")
    for each, parameter in model.named_parameters():
        if each not in new:
            assert torch.equal(parameter, before[each]), each
        elif parameter.ndim > 1:
            assert not torch.equal(parameter, before[each]), each
            assert 0.005 < float(parameter.detach().std()) < 0.03, (
                each
            )  # 0.02, or 0.01 behind a sum


def test_new_layers_depend_on_the_seed_alone(tiny_bert: Path) -> None:
    torch.manual_seed(5)
    first, new = started_anew(tiny_bert, 2, seed=1)
    torch.manual_seed(6)
    drawn = torch.rand(1)
    torch.manual_seed(6)
    second, _ = started_anew(tiny_bert, 2, seed=1)
    assert torch.equal(torch.rand(1), drawn)
    other, _ = started_anew(tiny_bert, 2, seed=2)
    same, different = dict(second.named_parameters()), dict(other.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, same[name]), name
    assert any(
        not torch.equal(parameter, different[name])
        for name, parameter in first.named_parameters()
        if name in new
    )


def test_more_layers_than_the_model_has_are_refused(tiny_bert: Path) -> None:
    with pytest.raises(ConfigError, match="`reinitialize_layers` is 3, but the model has 2 layers"):
        started_anew(tiny_bert, 3)


@pytest.mark.parametrize("scope", ["head", "last 1 layer", "lora 4"])
def test_new_layers_that_would_not_be_trained_are_refused(scope: str) -> None:
    config = build_config(
        finetune.Config,
        {
            "model": "any", "task": {"kind": "classification", "train": "any.jsonl"},
            "scope": scope, "reinitialize_layers": 2, "run_dir": "any",
        },
    )  # fmt: skip
    with pytest.raises(ConfigError, match="would leave layers random"):
        finetune.check_settings(config)
