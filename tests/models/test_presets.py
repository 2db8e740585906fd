"""New models by size: every size makes a config, published sizes have the published weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from fulltune.errors import ConfigError, ModelError
from fulltune.models.presets import PRESETS, make_config, make_model

PUBLISHED = {
    # Without the vocabulary's embeddings, in millions: the papers' own shapes.
    "gpt2-small": 85.8, "gpt2-xl": 1477.0, "bert-base": 85.6, "bert-large": 303.3,
    "bert-tiny": 0.48, "llama-135m": 106.2, "modernbert-base": 110.0,
}  # fmt: skip


@pytest.mark.parametrize("size", PRESETS)
def test_every_size_makes_a_config_that_fits_the_tokenizer(size: str, tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = make_config(size, tokenizer, {})
    assert config.vocab_size == len(tokenizer)
    assert config.pad_token_id == tokenizer.pad_token_id
    assert getattr(config, "cls_token_id", None) in (None, tokenizer.cls_token_id)


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_published_size_has_the_published_number_of_weights(size: str, tiny_bert: Path) -> None:
    config = make_config(size, AutoTokenizer.from_pretrained(tiny_bert), {})
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    embeddings = model.get_input_embeddings().weight.numel()
    count = sum(parameter.numel() for parameter in model.parameters()) - embeddings
    assert count / 1e6 == pytest.approx(PUBLISHED[size], rel=0.02)


def test_a_config_file_is_taken_with_what_differs(tmp_path: Path, tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 3}), "utf-8"
    )
    config = make_config(str(tmp_path / "config.json"), tokenizer, {"n_layer": 5})
    assert (config.n_embd, config.n_layer) == (64, 5)
    with pytest.raises(ModelError, match=r"not the path of a config.json"):
        make_config(str(tmp_path / "other.json"), tokenizer, {})
    with pytest.raises(ConfigError, match="does not fit together"):
        make_config("xlnet-tiny", tokenizer, {"d_head": 7})


def test_what_the_tokenizer_says_is_no_setting(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    for name in ("vocab_size", "pad_token_id", "sep_token_id"):
        with pytest.raises(ConfigError, match=f"`architecture.{name}` has no effect"):
            make_config("modernbert-tiny", tokenizer, {name: 5})


def test_a_model_type_without_the_head_is_told_from_fields_that_do_not_fit(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = make_config("gpt2-tiny", tokenizer, {})
    with pytest.raises(ModelError, match="`gpt2` model has no head"):
        make_model(config, tokenizer, head="masked_lm", seed=0)
    uneven = make_config("gpt2-tiny", tokenizer, {"n_embd": 33})
    with pytest.raises(ConfigError, match=r"does not fit together: .*divisible"):
        make_model(uneven, tokenizer, head="causal_lm", seed=0)


def test_another_chat_template_or_special_token_is_another_new_model(tiny_bert: Path) -> None:
    folders = set()
    for values in ({}, {"chat_template": "{{ messages }}"}, {"mask_token": "[SEP]"}):
        tokenizer = AutoTokenizer.from_pretrained(tiny_bert, **values)
        config = make_config("bert-tiny", tokenizer, {"hidden_size": 32})
        folders.add(make_model(config, tokenizer, head="masked_lm", seed=0))
    assert len(folders) == 3
