"""`pretrain` with `convert_to: xlnet`: an XLNet that goes on from a BERT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, XLNetLMHeadModel

from fulltune.config import build_config
from fulltune.data.tasks import TextExample
from fulltune.errors import ConfigError, FulltuneError, ModelError
from fulltune.recipes import evaluate, pretrain
from fulltune.recipes.finish import source_fingerprint_of_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [
        {"text": f"How many birds live near door {day}? Who painted the house? 今天天气很好。"}
        for day in range(60)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def settings(run_dir: Path, text: Path, model: Path | str, **changes: Any) -> pretrain.Config:
    values: dict[str, Any] = {
        "model": str(model),
        "convert_to": "xlnet",
        "task": {"kind": "text", "train": str(text), "validation": "8 examples"},
        "objective": {"length": 24},
        "duration": "6 steps",
        "batch": "8 examples",
        "precision": "fp32",
        "optimizer": {"lr": 3e-3},
        "save_every": "2 steps",
        "num_workers": 0,
        "run_dir": str(run_dir),
    }
    return build_config(pretrain.Config, {**values, **changes})


@pytest.fixture(scope="session")
def bert_run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, text: Path) -> Path:
    """A BERT with its masked-LM head, pre-trained for a few steps."""
    run_dir = tmp_path_factory.mktemp("bert") / "run"
    architecture = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        pretrain.run(
            settings(
                run_dir, text, "bert-tiny", convert_to=None, tokenizer=str(tiny_bert),
                architecture=architecture,
            )
        )  # fmt: skip
    return run_dir


def test_the_run_starts_from_the_weights_of_the_bert_and_names_it(
    tmp_path: Path, text: Path, bert_run: Path
) -> None:
    config = settings(tmp_path / "xlnet", text, bert_run, duration="30 steps")
    base, _ = pretrain.open_start(config)
    bert = AutoModelForMaskedLM.from_pretrained(bert_run / "model")
    start = load_file(base.path / "model.safetensors")
    words = bert.bert.embeddings.word_embeddings.weight
    assert torch.equal(start["transformer.word_embedding.weight"], words)
    assert torch.equal(start["lm_loss.bias"], bert.cls.predictions.bias)

    result = pretrain.run(config)
    measured = evaluate.run(str(tmp_path / "xlnet"))
    assert measured.metrics["loss"] == pytest.approx(result.metrics["loss"], abs=1e-5)
    manifest = json.loads((tmp_path / "xlnet" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["base_model"] == str(bert_run)
    assert manifest["settings"]["convert_to"] == "xlnet"
    assert manifest["base_model_hash"] == source_fingerprint_of_model(bert_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "xlnet" / "model")
    ids = tokenizer("今天 birds")["input_ids"]
    assert ids[-2:] == [tokenizer.sep_token_id, tokenizer.cls_token_id]
    XLNetLMHeadModel.from_pretrained(tmp_path / "xlnet" / "model")


def test_the_start_is_made_once_for_a_bert_and_a_seed(
    tmp_path: Path, text: Path, bert_run: Path
) -> None:
    def start(model: Path, seed: int) -> Path:
        return pretrain.open_start(settings(tmp_path / "run", text, model, seed=seed))[0].path

    first = start(bert_run, 0)
    copy = shutil.copytree(bert_run / "model", tmp_path / "elsewhere")
    assert start(bert_run, 0) == start(copy, 0) == first
    assert start(bert_run, 1) != first


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    tmp_path: Path, text: Path, bert_run: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrain.run(settings(whole, text, bert_run))
    config = settings(broken, text, bert_run)
    pretrain.run(config)
    # Back to the second checkpoint, as after a kill in the fifth step.
    shutil.rmtree(broken / "checkpoints" / "step-00000006")
    shutil.rmtree(broken / "model")
    (broken / "manifest.json").unlink()
    assert pretrain.run(config, resume=True).ending == "finished"
    expected = load_file(whole / "model" / "model.safetensors")
    found = load_file(broken / "model" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_xlnet_that_was_converted_goes_on_without_converting(
    tmp_path: Path, text: Path, bert_run: Path
) -> None:
    pretrain.run(settings(tmp_path / "first", text, bert_run))
    again = settings(tmp_path / "second", text, tmp_path / "first", convert_to=None)
    assert pretrain.run(again).ending == "finished"
    with pytest.raises(ModelError, match="is a `xlnet`, and an XLNet starts from a BERT"):
        pretrain.run(settings(tmp_path / "third", text, tmp_path / "first"))


def broken_copy(folder: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(folder / "model", tmp_path / "broken-bert")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return copy


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "bert-tiny"}, "`convert_to` has no effect with the new model `bert-tiny`"),
        ({"tokenizer": "elsewhere"}, "`tokenizer` has no effect"),
        ({"architecture": {"d_model": 64}}, "`architecture` has no effect"),
        ({"objective": {"masking": {"rate": 0.3}}}, "`objective.masking` has no effect"),
        ({"objective": {"name": "masked_lm"}}, "a `xlnet` model cannot do"),
        ({"convert_to": None, "objective": {"name": "permutation_lm"}}, "a `bert` model cannot do"),
        ({"model": "nowhere/"}, "does not exist"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_said_before_anything_is_written(
    tmp_path: Path, text: Path, bert_run: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError if "effect" in named else FulltuneError, match=named):
        pretrain.run(settings(tmp_path / "run", text, **{"model": bert_run, **changes}))
    assert not (tmp_path / "run").exists()


def test_what_is_no_whole_bert_is_refused(
    tmp_path: Path, text: Path, bert_run: Path, tiny_llama: Path
) -> None:
    with pytest.raises(ModelError, match="is a `llama`, and an XLNet starts from a BERT"):
        pretrain.run(settings(tmp_path / "run", text, tiny_llama))
    with pytest.raises(ModelError, match="corrupt or cut short"):
        pretrain.run(settings(tmp_path / "run", text, broken_copy(bert_run, tmp_path)))
    without_tokenizer = shutil.copytree(bert_run / "model", tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (without_tokenizer / name).unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        pretrain.run(settings(tmp_path / "run", text, without_tokenizer))
    assert not (tmp_path / "run").exists()


def test_a_bert_without_permutations_is_told_how_to_become_an_xlnet(
    tmp_path: Path, text: Path, bert_run: Path
) -> None:
    values = {"convert_to": None, "objective": {"name": "permutation_lm"}}
    with pytest.raises(ConfigError) as raised:
        pretrain.run(settings(tmp_path / "run", text, bert_run, **values))
    assert "`convert_to: xlnet`" in str(raised.value.hint)


@pytest.mark.network
def test_a_sentence_encoder_of_a_berts_layout_is_a_start(tmp_path: Path, text: Path) -> None:
    config = settings(tmp_path / "run", text, "asset:all-minilm-l6-v2", duration="1 steps")
    base, objective = pretrain.open_start(config)
    assert base.config.model_type == "xlnet"
    (document,) = objective.encode(TextExample("Birds live near 河.", "a"))
    pieces = base.tokenizer.convert_ids_to_tokens(document["input_ids"])
    assert pieces == ["birds", "live", "near", "河", "."]
