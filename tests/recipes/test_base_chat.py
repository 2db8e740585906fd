"""A base model that is given the built-in chat template learns to take turns, and to end them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fulltune.config import build_config
from fulltune.inference import GenerationSettings
from fulltune.models.chat_template import set_chat_template
from fulltune.models.loading import load_tokenizer
from fulltune.models.vocabulary import add_markers
from fulltune.recipes import finetune, predict
from fulltune.recipes import tokenizer as tokenizer_recipe
from fulltune.tracking import read_metrics

MARKERS = ["<|im_end|>", "<|im_start|>"]
ANSWERS = {"red?": "It is a colour.", "Rome?": "It is a city.", "河？": "是水。", "7?": "Odd."}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def base_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and one token that ends a document: no chat template, no marker of a turn."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        ["user assistant system im start end It is a colour. It is a city."] * 4,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", model_max_length=128
    )


@pytest.fixture(scope="module", params=["untied, as many rows as tokens", "tied, rows to spare"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = base_tokenizer()
    torch.manual_seed(1)
    common = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model: Any
    if request.param.startswith("untied"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
                num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, **common,
            )
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer) + 20, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                **common,
            )
        )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = (json.dumps({"prompt": key, "completion": text}) for key, text in ANSWERS.items())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_config(run_dir: Path, model: Path, data: Path, **changes: Any) -> finetune.Config:
    values: dict[str, Any] = {
        "model": str(model),
        "task": {"kind": "chat", "train": str(data), "validation": None, "template": "chatml"},
        "duration": "60 steps",
        "batch": "4 examples",
        "precision": "fp32",
        "dropout": None,
        "optimizer": {"lr": 1e-2, "schedule": "constant", "weight_decay": 0.0},
        "save_every": "40 steps",
        "num_workers": 0,
        "run_dir": str(run_dir),
    }
    return build_config(finetune.Config, {**values, **changes})


def test_a_base_model_learns_to_end_its_turn(tmp_path: Path, base: Path, rows: Path) -> None:
    run_dir = tmp_path / "run"
    before = load_tokenizer(base)
    assert len(before.encode("<|im_end|>")) > 1
    dropout = None if "Llama" in (base / "config.json").read_text() else 0.0
    finetune.run(make_config(run_dir, base, rows, dropout=dropout))

    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    assert sorted(manifest["new_tokens"]) == MARKERS
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    [end] = tokenizer.encode("<|im_end|>")
    assert end == len(before) or end == len(before) + 1
    assert end in model.generation_config.eos_token_id
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size > end

    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": key}) + "\n" for key in ANSWERS))
    predict.run(
        str(run_dir), str(questions), output=tmp_path / "answers.jsonl",
        settings=GenerationSettings(max_new_tokens=40),
    )  # fmt: skip
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == [
        {"answer": answer, "stopped": True} for answer in ANSWERS.values()
    ]


def test_a_new_marker_begins_as_the_mean_of_the_pieces_that_spelled_it(
    tmp_path: Path, base: Path, rows: Path
) -> None:
    """A step of almost no size moves nothing, so the start of the run is what is written."""
    config = make_config(
        tmp_path / "run", base, rows, duration="1 step", optimizer={"lr": 1e-30, "warmup": "0%"}
    )
    finetune.run(config)
    name = "transformer.wte.weight"
    old, new = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
    )
    name = name if name in old else "model.embed_tokens.weight"
    before = load_tokenizer(base)
    after = load_tokenizer(tmp_path / "run" / "model")
    for marker in MARKERS:
        pieces = before.encode(marker)
        [number] = after.encode(marker)
        torch.testing.assert_close(new[name][number], old[name][pieces].mean(dim=0))
    kept = len(before)
    assert torch.equal(new[name][:kept], old[name][:kept])


def test_a_killed_run_with_new_tokens_goes_on_to_the_same_weights(
    tmp_path: Path, base: Path, rows: Path
) -> None:
    whole = make_config(tmp_path / "whole", base, rows, duration="4 steps", save_every="2 steps")
    finetune.run(whole)
    cut = make_config(tmp_path / "cut", base, rows, duration="4 steps", save_every="2 steps")
    finetune.run(cut)
    (tmp_path / "cut" / "manifest.json").unlink()
    for path in sorted((tmp_path / "cut" / "checkpoints").glob("step-00000004/*")):
        path.unlink()
    (tmp_path / "cut" / "checkpoints" / "step-00000004").rmdir()
    finetune.run(cut, resume=True)
    weights = [
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_new_tokens_are_said_and_logged(
    tmp_path: Path, base: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.run(make_config(tmp_path / "run", base, rows, duration="1 step"))
    said = " ".join(capsys.readouterr().err.split())
    assert "`task.template: chatml` writes `<|im_end|>` and `<|im_start|>`" in said
    start = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert start["new_tokens"] == MARKERS


def test_a_marker_that_is_a_token_already_keeps_its_id_and_is_made_special(
    tmp_path: Path, base: Path
) -> None:
    extended = tokenizer_recipe.extend(str(base), MARKERS, tmp_path / "extended").folder
    tokenizer = load_tokenizer(extended)
    numbers = tokenizer.convert_tokens_to_ids(MARKERS)
    set_chat_template(tokenizer, "chatml")
    assert add_markers(tokenizer) == {}
    assert tokenizer.convert_tokens_to_ids(MARKERS) == numbers
    assert set(MARKERS) <= set(tokenizer.all_special_tokens)
    assert add_markers(tokenizer) == {}


def test_a_model_that_has_the_markers_gets_no_new_tokens(
    tmp_path: Path, tiny_llama: Path, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        finetune.run(make_config(tmp_path / "run", tiny_llama, rows, duration="1 step"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["new_tokens"] == []
    old = load_tokenizer(tiny_llama)
    assert len(load_tokenizer(tmp_path / "run" / "model")) == len(old)
