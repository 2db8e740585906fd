"""`scope` trains what it names, at the rate it names, or says why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fulltune.errors import ConfigError
from fulltune.models.families import layers_of, num_layers
from fulltune.models.scope import freeze, require_own_weights
from fulltune.optim.master_weights import MasterWeights
from fulltune.optim.optimizers import OptimizerConfig, group_parameters


def apply(model: PreTrainedModel, scope: str) -> frozenset[str]:
    return freeze(model, scope, layer_of=layers_of(model), num_layers=num_layers(model.config))


def trained(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def albert() -> PreTrainedModel:
    torch.manual_seed(0)
    return AlbertForSequenceClassification(
        AlbertConfig(
            vocab_size=60, embedding_size=8, hidden_size=16, intermediate_size=24,
            num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


@pytest.mark.parametrize("scope", ["last 1 layer", "last 4 layers"])
def test_some_layers_of_a_model_whose_layers_are_one_are_refused(
    albert: PreTrainedModel, scope: str
) -> None:
    with pytest.raises(ConfigError, match="4 layers of this model have 1 set") as caught:
        apply(albert, scope)
    assert "`scope: all`" in str(caught.value.hint)
    assert "`scope: head`" in str(caught.value.hint)


def test_all_and_the_head_of_such_a_model_are_trained(albert: PreTrainedModel) -> None:
    apply(albert, "head")
    modules = {name.rpartition(".")[0] for name in trained(albert)}
    assert modules == {"albert.pooler", "classifier"}
    apply(albert, "all")
    assert len(trained(albert)) == len(list(albert.parameters()))


def test_a_rate_for_each_layer_of_such_a_model_is_refused(albert: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"`optimizer\.layer_lr_decay` tells layers apart"):
        require_own_weights(
            layers_of(albert),
            num_layers(albert.config),
            setting="optimizer.layer_lr_decay",
            hint="leave it out",
        )


def test_layers_of_their_own_are_told_apart(tiny_llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    apply(model, "last 1 layer")
    assert {layers_of(model)[name] for name in trained(model)} == {1, "head"}


def test_a_tied_head_that_is_trained_as_the_head_has_the_rate_of_the_head(tiny_gpt2: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2)
    config = OptimizerConfig(lr=1e-3, layer_lr_decay=0.5)
    tied = "transformer.wte.weight"

    def rate(scope: str) -> float:
        tied_heads = apply(model, scope)
        groups = group_parameters(
            MasterWeights(model, torch.float32),
            config,
            layer_of=layers_of(model),
            num_layers=2,
            tied_heads=tied_heads,
        )
        [group] = [group for group in groups if tied in group.names]
        assert group.weight_decay == 0
        return group.lr

    assert rate("head") == rate("last 1 layer") == pytest.approx(1e-3)
    assert rate("all") == pytest.approx(1e-3 * 0.5**3)
