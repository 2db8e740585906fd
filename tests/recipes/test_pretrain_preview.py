"""`preview` of pre-training shows what the model reads and what it must predict, and no more."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fulltune.data.preview_facts import PreviewFacts
from fulltune.data.tokenizers import (
    FIM_TOKENS,
    TokenizerConfig,
    TokenizerFamily,
    train_tokenizer,
    write_tokenizer,
)
from fulltune.errors import ConfigError
from fulltune.objectives.causal_stream import CausalStream
from fulltune.objectives.fill_in_the_middle import fim_ids
from fulltune.objectives.noise import noise_seed
from fulltune.recipes import finetune, pretrain, preview
from fulltune.recipes.noise_view import NoisyObjective, count_examples, show
from fulltune.tracking import read_metrics

TEXTS = [
    f"Day {day}. The river runs past mill number {day}. 她在河边看书。It rains on the water."
    for day in range(60)
]
MODELS: dict[TokenizerFamily, str] = {
    "gpt": "gpt2-tiny",
    "bert": "bert-tiny",
    "xlnet": "xlnet-tiny",
    "t5": "t5-tiny",
}
CASES: list[tuple[TokenizerFamily, dict[str, Any]]] = [
    ("gpt", {"stream": True}),
    ("bert", {"masking": {"rate": 0.3}}),
    ("bert", {"name": "sentence_pairs"}),
    ("xlnet", {}),
    ("t5", {}),
    ("t5", {"spans": {"mixture": "ul2"}}),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a character tokenizer of each family."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for family in MODELS:
        config = TokenizerConfig(
            family=family, algorithm="characters", fill_in_the_middle=family == "gpt"
        )
        write_tokenizer(train_tokenizer(TEXTS, config), folder / family, info={})
    return folder


def write_config(
    folder: Path, tokenizers: Path, family: TokenizerFamily, objective: dict[str, Any]
) -> Path:
    data = folder / "corpus.jsonl"
    rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS]
    data.write_text("".join(rows), encoding="utf-8")
    values = {
        "model": MODELS[family],
        "tokenizer": str(tokenizers / family),
        "task": {"kind": "text", "train": str(data), "validation": "10 examples"},
        "objective": {"length": 64, **objective},
        "duration": "6 steps",
        "batch": "8 examples",
        "num_workers": 0,
        "run_dir": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def shown(path: Path, *overrides: str) -> str:
    console = Console(file=io.StringIO(), width=200, no_color=True)
    assert preview.run(preview.read_config(path, overrides), console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(("family", "objective"), CASES)
def test_what_is_shown_without_its_replacements_is_the_example(
    tmp_path: Path, tokenizers: Path, family: TokenizerFamily, objective: dict[str, Any]
) -> None:
    config = preview.read_config(write_config(tmp_path, tokenizers, family, objective), [])
    assert isinstance(config, pretrain.Config)
    _, made = pretrain.open_start(config, with_weights=False)
    prepared = pretrain.prepare(config, made, lambda done: None)
    noisy = prepared.objective
    assert isinstance(noisy, NoisyObjective)
    for index in prepared.train[:8].tolist():
        example = prepared.dataset[index]
        example["noise_seed"] = noise_seed(config.seed, 0, index)
        tokens = show(noisy, example)
        whole = [token for token, state in tokens if state != "replaced"]
        # Span corruption adds an end token to its inputs and to its targets, and UL2 a mode token.
        added = {noisy.tokenizer.eos_token_id, *getattr(noisy, "mode_ids", {}).values()}
        if family == "t5":
            whole = [token for token in whole if token not in added]
        expected = [token for token in example["input_ids"] if family != "t5" or token not in added]
        assert whole == expected
        batch = noisy.collate([example])
        num_trained = sum(state == "trained" for _, state in tokens)
        num_sentinels = sum(state == "replaced" for _, state in tokens) if family == "t5" else 0
        assert num_trained == noisy.num_targets(batch) - num_sentinels


@pytest.mark.parametrize(("family", "objective"), CASES)
def test_a_preview_of_pretraining_counts_and_shows_examples_and_writes_nothing(
    tmp_path: Path, tokenizers: Path, cache: Path, family: TokenizerFamily,
    objective: dict[str, Any],
) -> None:  # fmt: skip
    path = write_config(tmp_path, tokenizers, family, objective)
    plain = shown(path)
    assert "documents" in plain
    assert "predicted tokens" in plain
    assert "corpus.jsonl:" in plain
    assert "⟦" in plain  # what is trained
    assert ("read in place of what follows it" in plain) == (family in ("bert", "t5"))
    if objective.get("name") == "sentence_pairs":
        assert "segment" in plain
    assert not (tmp_path / "run").exists()
    assert not (cache / "models").exists()


def test_documents_are_shown_as_fill_in_the_middle_writes_them_and_held_out_ones_are_not(
    tmp_path: Path, tokenizers: Path
) -> None:
    objective = {"stream": True, "fim_rate": 1.0}
    path = write_config(tmp_path, tokenizers, "gpt", objective)
    plain = shown(path)
    assert all(token in plain for token in FIM_TOKENS)
    config = preview.read_config(path, [])
    assert isinstance(config, pretrain.Config)
    _, made = pretrain.open_start(config, with_weights=False)
    prepared = pretrain.prepare(config, made, lambda done: None)
    assert isinstance(prepared.objective, CausalStream)
    example = prepared.dataset[0]
    example["noise_seed"] = noise_seed(config.seed, 0, 0)
    tokens = [token for token, _ in show(prepared.objective, example)]
    sentinels = set(fim_ids(prepared.objective.tokenizer))
    assert sorted(set(tokens) - sentinels) == sorted(set(example["input_ids"]))
    assert len(example["input_ids"]) < len(tokens) <= 64
    # Losses are compared with those of a run without, in the same windows.
    without = write_config(tmp_path, tokenizers, "gpt", {"stream": True})
    config = preview.read_config(without, [])
    assert isinstance(config, pretrain.Config)
    _, made = pretrain.open_start(config, with_weights=False)
    other = pretrain.prepare(config, made, lambda done: None)
    assert [prepared.dataset[index]["input_ids"] for index in prepared.validation.tolist()] == [
        other.dataset[index]["input_ids"] for index in other.validation.tolist()
    ]


def test_a_batch_of_tokens_is_as_many_tokens_of_text_with_fill_in_the_middle_as_without(
    tmp_path: Path, tokenizers: Path
) -> None:
    objective = {"stream": True, "fim_rate": 0.5}
    path = write_config(tmp_path, tokenizers, "gpt", objective)
    config = preview.read_config(path, ["batch=256 tokens", "duration=3 steps", "precision=fp32"])
    assert isinstance(config, pretrain.Config)
    _, made = pretrain.open_start(config, with_weights=False)
    prepared = pretrain.prepare(config, made, lambda done: None)
    text = [len(prepared.dataset[index]["input_ids"]) for index in prepared.train.tolist()]
    assert prepared.dataset.lengths[prepared.train].tolist() == text
    for split in count_examples(prepared, config.seed):
        # All but the first token of a window, the sentinels of a document among them.
        assert split.predicted_share == pytest.approx(1 - 1 / 64, abs=0.01)
    pretrain.run(config)
    steps = [
        each for each in read_metrics(tmp_path / "run/metrics.jsonl") if each["event"] == "step"
    ]
    assert len(steps) == 3
    for step in steps:
        assert 256 - 64 < step["num_tokens"] <= 256
        assert step["num_targets"] > 0


def test_held_out_tokens_are_counted_as_an_evaluation_hides_them(
    tmp_path: Path, tokenizers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, tokenizers, "bert", {"masking": {"rate": 0.4}})
    preview.run(preview.read_config(path, []), as_json=True)
    facts = PreviewFacts.model_validate(json.loads(capsys.readouterr().out)["facts"])
    train, validation = facts.arranged
    assert train.predicted_share == pytest.approx(0.4, abs=0.04)
    assert validation.predicted_share == pytest.approx(0.15, abs=0.02)


def test_a_page_and_json_hold_the_same_counts(
    tmp_path: Path, tokenizers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = preview.read_config(write_config(tmp_path, tokenizers, "bert", {}), [])
    page = tmp_path / "page.html"
    preview.run(config, as_json=True, html=page)
    facts = PreviewFacts.model_validate(json.loads(capsys.readouterr().out)["facts"])
    train, validation = facts.arranged
    assert (train.name, validation.name) == ("train", "validation")
    assert validation.num_examples >= 10
    assert train.predicted_share == pytest.approx(0.15, abs=0.02)
    text = page.read_text(encoding="utf-8")
    assert f"<td>{train.num_examples:,}</td>" in text
    assert '<span class="replaced">' in text


def test_a_file_is_read_as_that_of_the_verb_that_knows_its_settings(
    tmp_path: Path, tokenizers: Path, tiny_llama: Path
) -> None:
    path = write_config(tmp_path, tokenizers, "gpt", {})
    assert isinstance(preview.read_config(path, []), pretrain.Config)
    values = {
        "model": str(tiny_llama),
        "task": {"kind": "text", "train": str(tmp_path / "corpus.jsonl")},
        "run_dir": str(tmp_path / "run"),
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert type(preview.read_config(path, [])) is finetune.Config
    assert isinstance(preview.read_config(path, ["objective.length=32"]), pretrain.Config)
    with pytest.raises(ConfigError, match="unknown setting"):
        preview.read_config(path, ["objektive.length=32"])


def test_windows_of_single_documents_are_shown_as_for_fine_tuning(
    tmp_path: Path, tokenizers: Path
) -> None:
    plain = shown(write_config(tmp_path, tokenizers, "gpt", {}), "seed=3")
    assert "trained tokens" in plain
    assert "⟦" in plain
