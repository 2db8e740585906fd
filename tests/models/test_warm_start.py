"""An XLNet that starts from a BERT does with content what the BERT did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertTokenizer,
    XLNetConfig,
    XLNetLMHeadModel,
)

from fulltune.errors import ModelError
from fulltune.models.loading import load_model_config
from fulltune.models.warm_start import WarmStart, save_warm_start, warm_start_xlnet, xlnet_config_of
from fulltune.objectives.permutation_lm import PermutationLM
from tests.conftest import DocumentsInMemory

HEADS, HEAD_SIZE = 4, 8


def make_bert(**values: Any) -> BertForPreTraining:
    """A small BERT whose biases are not zero and whose norms are not one."""
    torch.manual_seed(0)
    model = BertForPreTraining(
        BertConfig(
            vocab_size=60,
            hidden_size=HEADS * HEAD_SIZE,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            attn_implementation="eager",
            **values,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def bert() -> BertForPreTraining:
    return make_bert()


@pytest.fixture(scope="module")
def folder(bert: BertForPreTraining, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    bert.save_pretrained(directory)
    return directory


def start_of(folder: Path, **values: Any) -> tuple[WarmStart, XLNetLMHeadModel]:
    config = xlnet_config_of(load_model_config(folder))
    start = warm_start_xlnet(folder, config, **values)
    model = XLNetLMHeadModel(config)
    model.load_state_dict(start.state)
    return start, model.eval()


def without_positions(model: XLNetLMHeadModel) -> XLNetLMHeadModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".r", ".r_r_bias", ".r_s_bias", ".seg_embed")):
                parameter.zero_()
    return model


def run_layer(layer: Any, hidden_BLH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An XLNet layer on its content stream: output [B, L, H], attention [B, A, L, L]."""
    length = hidden_BLH.shape[1]
    positions = torch.randn(2 * length, hidden_BLH.shape[0], hidden_BLH.shape[2])
    segments = torch.zeros(length, length, hidden_BLH.shape[0], 2)
    segments[..., 0] = 1
    output, _, attention = layer(
        hidden_BLH.transpose(0, 1), None, None, None, positions, segments, output_attentions=True
    )
    return output.transpose(0, 1), attention.permute(2, 3, 0, 1)


@torch.no_grad()
def test_content_scores_are_those_of_the_bert(bert: BertForPreTraining, folder: Path) -> None:
    _, model = start_of(folder)
    hidden_BLH = torch.randn(3, 7, HEADS * HEAD_SIZE)
    for layer, own in enumerate(bert.bert.encoder.layer):
        attention = model.transformer.layer[layer].rel_attn
        query = torch.einsum("blh,hnd->blnd", hidden_BLH, attention.q) + attention.r_w_bias
        key = torch.einsum("blh,hnd->blnd", hidden_BLH, attention.k)
        scores = torch.einsum("bind,bjnd->bnij", query, key) * attention.scale

        projections = own.attention.self
        split = (3, 7, HEADS, HEAD_SIZE)
        bert_query = projections.query(hidden_BLH).view(split)
        bert_key = (hidden_BLH @ projections.key.weight.T).view(split)
        expected = torch.einsum("bind,bjnd->bnij", bert_query, bert_key) / HEAD_SIZE**0.5
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_positions_and_segments_attention_is_the_berts_with_its_key_bias(
    bert: BertForPreTraining, folder: Path
) -> None:
    _, model = start_of(folder)
    without_positions(model)
    hidden_BLH = torch.randn(3, 7, HEADS * HEAD_SIZE)
    for layer, own in enumerate(bert.bert.encoder.layer):
        _, attention = run_layer(model.transformer.layer[layer], hidden_BLH)
        expected = own.attention.self(hidden_BLH)[1]
        torch.testing.assert_close(attention, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_the_two_biases_that_have_no_place_a_whole_layer_is_the_berts(
    tmp_path: Path,
) -> None:
    bert = make_bert()
    for layer in bert.bert.encoder.layer:
        layer.attention.self.value.bias.zero_()
        layer.attention.output.dense.bias.zero_()
    bert.save_pretrained(tmp_path)
    _, model = start_of(tmp_path)
    without_positions(model)
    hidden_BLH = torch.randn(3, 7, HEADS * HEAD_SIZE)
    for number, own in enumerate(bert.bert.encoder.layer):
        output, _ = run_layer(model.transformer.layer[number], hidden_BLH)
        expected = own(hidden_BLH)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_every_parameter_is_accounted_for(bert: BertForPreTraining, folder: Path) -> None:
    start, model = start_of(folder)
    names = set(model.state_dict())
    assert set(start.copied) | set(start.new) == names == set(start.state)
    assert not set(start.copied) & set(start.new)
    assert {name.rpartition(".")[2] for name in start.new} == {
        *("r", "r_r_bias", "r_s_bias", "seg_embed", "mask_emb")
    }
    assert len(start.new) == 2 * 4 + 1
    assert torch.equal(model.lm_loss.bias, bert.cls.predictions.bias)
    assert torch.equal(model.lm_loss.weight, bert.bert.embeddings.word_embeddings.weight)

    own = {name.removeprefix("bert.") for name, _ in bert.named_parameters()}
    left = set(start.left_behind)
    assert left < own
    assert len(own - left) == 2 + 2 * 13  # words, the head's bias, and 13 a layer
    assert {name for name in left if ".layer." in name} == {
        f"encoder.layer.{layer}.attention.{name}.bias"
        for layer in range(2)
        for name in ("self.key", "self.value", "output.dense")
    }


def test_new_weights_come_from_the_seed_alone(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = xlnet_config_of(load_model_config(folder))
    first = warm_start_xlnet(folder, config, seed=1)
    torch.manual_seed(6)
    second = warm_start_xlnet(folder, config, seed=1)
    torch.manual_seed(5)
    other = warm_start_xlnet(folder, config, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    for name in first.new:
        assert torch.equal(first.state[name], second.state[name])
        assert not torch.equal(first.state[name], other.state[name])
        # XLNet's own deviation, from the BERT's config; at least 32 numbers each.
        assert first.state[name].std() == pytest.approx(config.initializer_range, rel=0.5)
    for name in first.copied:
        assert torch.equal(first.state[name], other.state[name])


def test_names_of_2018_are_read(bert: BertForPreTraining, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in weights.items()
    }
    save_file(old, tmp_path / "model.safetensors")
    bert.config.save_pretrained(tmp_path)
    start, expected = start_of(tmp_path)[0], start_of(folder)[0]
    assert start.copied == expected.copied
    assert all(torch.equal(start.state[name], expected.state[name]) for name in start.state)


def test_the_saved_folder_trains_as_xlnet_and_takes_a_classification_head(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """A body without a head, with the BERT's tokenizer in XLNet's layout."""
    start = save_warm_start(tiny_bert, tmp_path / "xlnet", seed=3)
    assert "lm_loss.bias" in start.new
    assert (
        "transformer.mask_emb"
        in json.loads((tmp_path / "xlnet/fulltune.json").read_text())["warm_start"]["new"]
    )
    model = XLNetLMHeadModel.from_pretrained(tmp_path / "xlnet")
    for name, value in model.state_dict().items():
        assert torch.equal(value, start.state[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "xlnet")
    objective = PermutationLM(tokenizer, 32)
    text = "How many birds live near the river in Rome?"
    documents = DocumentsInMemory.of_texts(objective, [text])
    batch = objective.collate([objective.arrange(documents, [0], 0)[0]])
    assert batch["input_ids"][0, -2:].tolist() == [tokenizer.sep_token_id, tokenizer.cls_token_id]
    loss = objective.loss_sum(model, batch)
    loss.backward()
    assert loss > 0
    assert torch.isfinite(model.transformer.mask_emb.grad).all()
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "xlnet") is not None


def test_the_berts_tokenizer_is_saved_in_xlnets_layout(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "fox", "##es", "河"]
    bert = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    make_bert().save_pretrained(tmp_path / "bert")
    bert.save_pretrained(tmp_path / "bert")
    save_warm_start(tmp_path / "bert", tmp_path / "xlnet")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "xlnet")
    assert tokenizer.tokenize("Red foxes 河") == bert.tokenize("Red foxes 河")
    tokens = tokenizer(["red", "red foxes"], ["fox", "河"], padding=True)
    assert [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in tokens["input_ids"]] == [
        "[PAD] [PAD] red [SEP] fox [SEP] [CLS]",
        "red fox ##es [SEP] 河 [SEP] [CLS]",
    ]
    # The segment of padding is read by nobody.
    assert tokens["token_type_ids"] == [[0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1, 2]]


def test_what_does_not_fit_is_refused(folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    config = xlnet_config_of(load_model_config(folder))
    with pytest.raises(ModelError, match="`llama`"):
        warm_start_xlnet(tiny_llama, config)
    wide = XLNetConfig(**{**config.to_dict(), "d_inner": 64})
    with pytest.raises(ModelError, match="`d_inner` is 64"):
        warm_start_xlnet(folder, wide)
    load_model_config(folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no weights"):
        warm_start_xlnet(tmp_path, config)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="cannot be read"):
        warm_start_xlnet(tmp_path, config)
