"""`pretrain` with spans of noise and with moved middles: runs learn, resume and are measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from fulltune.config import build_config
from fulltune.errors import ConfigError, ModelError
from fulltune.objectives.fill_in_the_middle import FIM_TOKENS
from fulltune.recipes import evaluate, pretrain
from fulltune.tracking import read_metrics


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred short documents, one a row."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [
        {"text": f"Day {day}. The river runs past the mill. 她在河边看书。It rains."}
        for day in range(100)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bytes of the tests' decoders, with the sentinels of T5, UL2 and fill-in-the-middle."""
    backend = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(32))]
    added = ["[NLU]", "[NLG]", "[S2S]", *FIM_TOKENS, *sentinels]
    backend.add_special_tokens([AddedToken(token, special=True) for token in added])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=256,
    ).save_pretrained(folder)
    return folder


SMALL: dict[str, dict[str, Any]] = {
    "t5-tiny": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4},
    "gpt2-tiny": {"n_embd": 32, "n_positions": 128},
}
CASES = [
    ("t5-tiny", {"length": 48}),
    ("t5-tiny", {"length": 48, "spans": {"mixture": "ul2"}}),
    ("gpt2-tiny", {"length": 32, "stream": True, "fim_rate": 0.5}),
]


def make_config(
    run_dir: Path, corpus: Path, tokenizer: Path, model: str, **changes: Any
) -> pretrain.Config:
    values: dict[str, Any] = {
        "model": model,
        "tokenizer": str(tokenizer),
        "architecture": SMALL[model],
        "task": {"kind": "text", "train": str(corpus), "validation": "10 examples"},
        "duration": "6 steps",
        "batch": "8 examples",
        "precision": "fp32",
        # Small GPT-2 starts with weights of 0.02: a share of them is too little for a short test.
        "optimizer": {"lr": 3e-3} if model == "gpt2-tiny" else {"name": "adamw_scaled", "lr": 0.02},
        "evaluate": {"every": "3 steps"},
        "save_every": "2 steps",
        "num_workers": 0,
        "run_dir": str(run_dir),
    }
    return build_config(pretrain.Config, {**values, **changes})


@pytest.mark.parametrize(("model", "objective"), CASES)
def test_a_new_model_learns_and_evaluate_finds_the_result_of_the_run(
    tmp_path: Path, corpus: Path, tokenizer: Path, model: str, objective: dict[str, Any]
) -> None:
    run_dir = tmp_path / "run"
    config = make_config(
        run_dir, corpus, tokenizer, model, objective=objective, duration="60 steps"
    )
    result = pretrain.run(config)
    events = read_metrics(run_dir / "metrics.jsonl")
    course = [event["loss"] for event in events if event["event"] == "step"]
    assert course[-1] < 0.8 * course[0]
    measured = evaluate.run(str(run_dir))
    assert measured.metrics["loss"] == pytest.approx(result.metrics["loss"], abs=1e-5)


@pytest.mark.parametrize(("model", "objective"), CASES)
def test_a_resumed_pretraining_equals_an_unbroken_one_bit_for_bit(
    tmp_path: Path, corpus: Path, tokenizer: Path, model: str, objective: dict[str, Any]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrain.run(make_config(whole, corpus, tokenizer, model, objective=objective))
    config = make_config(broken, corpus, tokenizer, model, objective=objective)
    pretrain.run(config)
    shutil.rmtree(broken / "checkpoints" / "step-00000006")
    shutil.rmtree(broken / "model")
    (broken / "manifest.json").unlink()
    assert pretrain.run(config, resume=True).ending == "finished"
    expected = load_file(whole / "model" / "model.safetensors")
    found = load_file(broken / "model" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        ({"fim_rate": 0.5}, "`objective.fim_rate` has no effect without"),
        ({"spans": {"mixture": "ul2", "mean_length": 5}}, "`objective.spans.mean_length` has no"),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    tmp_path: Path, corpus: Path, tokenizer: Path, objective: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        make_config(tmp_path / "run", corpus, tokenizer, "t5-tiny", objective=objective)


def test_a_tokenizer_without_sentinels_is_refused_before_anything_is_written(
    tmp_path: Path, corpus: Path, tiny_gpt2: Path
) -> None:
    config = make_config(tmp_path / "run", corpus, tiny_gpt2, "t5-tiny", objective={"length": 48})
    with pytest.raises(ModelError, match="0 sentinels"):
        pretrain.run(config)
    assert not (tmp_path / "run").exists()
