"""Each family's values agree with what transformers' own models do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

from fulltune.errors import ModelError
from fulltune.models.families import (
    FAMILIES,
    classification_logits,
    family_of,
    layers_of,
    masked_hidden_states,
    num_layers,
    sentence_logits,
)

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "embedding_size": 16,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "cls_token_id": 0,
    "sep_token_id": 2,
    "pooler_hidden_size": 16,
    "d_model": 16,
    "d_inner": 24,
    "d_kv": 8,
    "d_ff": 24,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_layers": 2,
    "n_heads": 2,
    "dim": 16,
    "hidden_dim": 24,
    "num_layers": 2,
    "num_heads": 2,
}
HEADS = (
    *("llama", "gpt2", "bert", "albert", "distilbert", "electra", "ernie", "modernbert"),
    *("megatron-bert", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
    *("camembert", "data2vec-text", "mpnet", "deberta", "deberta-v2", "xlnet"),
)


def small_config(model_type: str) -> Any:
    default = AutoConfig.for_model(model_type)
    # XLNet raises on this one: it has no longest length.
    known = set(default.to_dict()) | set(default.attribute_map)
    fields = {name: value for name, value in SMALL.items() if name in known}
    config = AutoConfig.for_model(model_type, **fields, num_labels=3)
    for name, value in family_of(config).config_values.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("model_type", HEADS)
def test_head_on_pooled_vectors_equals_the_models_own_forward(model_type: str) -> None:
    config = small_config(model_type)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    family = family_of(config)
    at = {"first": 0, "last": -1}[family.pooling]
    with torch.no_grad():
        for length in (3, 7):
            input_ids = torch.randint(5, 60, (1, length))
            hidden_DH = model.base_model(input_ids=input_ids).last_hidden_state[:, at]
            torch.testing.assert_close(
                classification_logits(model, hidden_DH), model(input_ids=input_ids).logits
            )


@pytest.mark.parametrize("model_type", HEADS[2:-1])
def test_masked_lm_head_equals_the_models_own_forward(model_type: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(small_config(model_type)).eval()
    decoder = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # biases start at 0, or would match
        input_ids = torch.randint(5, 60, (1, 7))
        hidden_NH = model.base_model(input_ids=input_ids).last_hidden_state[0]
        logits_NV = decoder(masked_hidden_states(model, hidden_NH))
        torch.testing.assert_close(logits_NV, model(input_ids=input_ids).logits[0])


@pytest.mark.parametrize(
    ("model_type", "output"),
    [
        ("bert", "seq_relationship_logits"),
        ("albert", "sop_logits"),
        ("ernie", "seq_relationship_logits"),
        ("megatron-bert", "seq_relationship_logits"),
    ],
)
def test_sentence_head_equals_the_models_own_forward(model_type: str, output: str) -> None:
    config = small_config(model_type)
    config.num_labels = 2
    torch.manual_seed(0)
    model = AutoModelForPreTraining.from_config(config).eval()
    with torch.no_grad():
        input_ids = torch.randint(5, 60, (2, 7))
        hidden_DH = model.base_model(input_ids=input_ids).last_hidden_state[:, 0]
        own = model(input_ids=input_ids)
        torch.testing.assert_close(sentence_logits(model, hidden_DH), getattr(own, output))


def test_heads_that_a_model_lacks_are_named() -> None:
    model = AutoModelForCausalLM.from_config(small_config("llama"))
    with pytest.raises(ModelError, match="masked-LM head of `llama`"):
        masked_hidden_states(model, torch.zeros(1, 16))
    with pytest.raises(ModelError, match="`llama` has no head for pairs"):
        sentence_logits(model, torch.zeros(1, 16))


def test_every_parameter_of_llama_has_its_part() -> None:
    model = AutoModelForCausalLM.from_config(small_config("llama"))
    parts = layers_of(model)
    assert parts["model.embed_tokens.weight"] == "embeddings"
    assert parts["model.layers.1.mlp.up_proj.weight"] == 1
    assert parts["model.norm.weight"] == parts["lm_head.weight"] == "head"
    assert set(parts.values()) == {"embeddings", 0, 1, "head"}


@pytest.mark.parametrize("model_type", HEADS)
def test_parts_of_a_classifier_are_embeddings_all_layers_and_head(model_type: str) -> None:
    config = small_config(model_type)
    model = AutoModelForSequenceClassification.from_config(config)
    parts = layers_of(model)
    shared = model_type == "albert"  # one set of weights serves all layers
    layers = {0} if shared else set(range(num_layers(config)))
    assert set(parts.values()) - {"embeddings", "head"} == layers
    assert "embeddings" in parts.values()
    assert any(
        part == "head"
        for name, part in parts.items()
        if "classif" in name or "score" in name or "logits" in name
    )
    embedded = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)
    }
    for name, part in parts.items():
        if (
            name.removesuffix(".weight") in embedded
            and ".layer" not in name
            and "relative" not in name
            and "rel_emb" not in name
        ):
            assert part == "embeddings", name


def test_decoders_outside_the_table_are_gpt_without_packing() -> None:
    family = family_of(AutoConfig.for_model("bloom"))
    assert (family.name, family.can_pack, family.pooling) == ("gpt", False, "last")


def test_padding_based_positions_are_not_packed() -> None:
    assert not FAMILIES["roberta"].can_pack
    assert FAMILIES["llama"].can_pack
    assert FAMILIES["bert"].can_pack


@pytest.mark.parametrize("model_type", ["vit", "bart"])
def test_other_types_are_refused_with_the_list(model_type: str) -> None:
    with pytest.raises(ModelError, match=f"`{model_type}`") as caught:
        family_of(AutoConfig.for_model(model_type))
    assert "bert" in str(caught.value.hint)
