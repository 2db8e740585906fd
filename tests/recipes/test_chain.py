"""`chain`: text to a measured classifier in one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fulltune.errors import ConfigError
from fulltune.recipes import chain


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def write_chain(folder: Path, classification_file: Path) -> Path:
    rows = [json.loads(line) for line in classification_file.read_text("utf-8").splitlines()]
    corpus = folder / "corpus.jsonl"
    text = "".join(json.dumps({"text": f"{row['text']} 你好。"}) + "\n" for row in rows)
    corpus.write_text(text, encoding="utf-8")
    run = {"batch": "8 examples", "num_workers": 0, "precision": "fp32"}
    steps = [
        {
            "tokenizer": {
                "train": [str(corpus)], "family": "bert", "vocab_size": 120,
                "output": str(folder / "tokenizer"),
            }
        },
        {
            "pretrain": {
                "model": "bert-tiny", "tokenizer": str(folder / "tokenizer"),
                "architecture": {"hidden_size": 32, "num_attention_heads": 4},
                "task": {"kind": "text", "train": str(corpus)},
                "duration": "4 steps", "run_dir": str(folder / "pretrained"), **run,
            }
        },
        {
            "finetune": {
                "model": str(folder / "pretrained"),
                "task": {"kind": "classification", "train": str(classification_file)},
                "duration": "4 steps", "run_dir": str(folder / "finetuned"), **run,
            }
        },
        {"evaluate": {"model": str(folder / "finetuned"), "data": str(classification_file)}},
    ]  # fmt: skip
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({"steps": steps}), encoding="utf-8")
    return path


def test_every_step_starts_from_the_folder_of_another_and_is_not_taken_twice(
    tmp_path: Path, classification_file: Path
) -> None:
    config = chain.load(write_chain(tmp_path, classification_file))
    results = chain.run(config)
    assert [result.verb for result in results] == ["tokenizer", "pretrain", "finetune", "evaluate"]
    assert results[-1].metrics["accuracy"] >= 0
    written = (tmp_path / "finetuned" / "model" / "model.safetensors").stat().st_mtime_ns
    again = chain.run(config, resume=True)
    assert [result.done_before for result in again] == [True, True, True, False]
    assert again[-1].metrics == results[-1].metrics
    assert (tmp_path / "finetuned" / "model" / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("change", ["vocab_size", "train"])
def test_a_tokenizer_of_other_settings_or_text_is_not_taken_for_the_step_s(
    tmp_path: Path, classification_file: Path, change: str
) -> None:
    path = write_chain(tmp_path, classification_file)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    del values["steps"][1:]
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    chain.run(chain.load(path))
    if change == "train":
        with (tmp_path / "corpus.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"text": "One more."}) + "\n")
    else:
        values["steps"][0]["tokenizer"]["vocab_size"] = 119
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"other settings or text \\(differs in `{change}`\\)"):
        chain.run(chain.load(path), resume=True)


def test_a_wrong_setting_of_a_late_step_is_said_before_the_first(
    tmp_path: Path, classification_file: Path
) -> None:
    path = write_chain(tmp_path, classification_file)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["steps"][2]["finetune"]["durration"] = "1 epoch"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ConfigError, match="durration"):
        chain.load(path)
    assert not (tmp_path / "tokenizer").exists()


def test_a_step_is_one_verb(tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text("steps: [{}]", encoding="utf-8")
    with pytest.raises(ConfigError, match="one verb"):
        chain.load(path)
    path.write_text("stairs: []", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a list of steps"):
        chain.load(path)
