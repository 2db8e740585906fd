"""Methods are compared on rows that no choice looked at, each with its own rate, and resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fulltune.config import build_config
from fulltune.data.records import read_records
from fulltune.data.tasks import TaskConfig
from fulltune.errors import ConfigError, RunFolderError
from fulltune.models.adapters import add_lora, merge_lora
from fulltune.models.loading import load_model
from fulltune.recipes import compare, compare_page, finetune
from fulltune.recipes.test_split import hold_out


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def settings_of(folder: Path, model: Path, data: Path, **changes: Any) -> Path:
    values = {
        "finetune": {
            "model": str(model),
            "task": {"kind": "classification", "train": str(data), "validation": "6 examples"},
            "duration": "4 steps",
            "batch": "8 examples",
            "precision": "fp32",
            "num_workers": 0,
        },
        "methods": ["all", "head"],
        "rates": [1e-3, 1e-2],
        "seeds": 2,
        "test": "8 examples",
        "run_dir": str(folder / "comparison"),
        **changes,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.slow
def test_each_method_has_its_own_rate_and_the_test_split_is_no_ones(
    tmp_path: Path, tiny_bert: Path, classification_file: Path
) -> None:
    config = compare.load(settings_of(tmp_path, tiny_bert, classification_file))
    said: list[str] = []
    result = compare.run(config, say=said.append)
    assert result.metric == "accuracy"
    assert [method.method for method in result.methods] == ["all", "head"]
    assert len(result.runs) == 2 * (2 + 1)  # two rates, and a further seed of the better one
    for method in result.methods:
        tried = [run for run in result.runs if run.method == method.method and run.seed == 0]
        best = max(tried, key=lambda run: (run.validation, -run.rate))
        assert method.rate == best.rate
        assert method.values[0] == best.test["accuracy"]
        assert len(method.values) == 2
    full, head = result.methods
    assert head.num_trained < full.num_trained == full.num_parameters
    rows = {
        side: {json.dumps(row.fields) for row in read_records(str(tmp_path / f"{side}.jsonl"))}
        for side in ("comparison/data/train", "comparison/data/test")
    }
    train, test = rows.values()
    assert len(test) >= 8
    assert not train & test
    assert not list((tmp_path / "comparison" / "runs").glob("*/model"))
    page = compare_page.write(result, config, tmp_path / "comparison").read_text(encoding="utf-8")
    assert "all weights against head" in page
    assert "<svg" in page

    with pytest.raises(RunFolderError, match="is not empty"):
        compare.run(config, say=said.append)
    # A resumed comparison takes no run again, and one with other settings is another.
    again = compare.run(config, resume=True, say=said.append)
    assert again == result
    other = config.model_copy(update={"seeds": 3})
    with pytest.raises(RunFolderError, match="other settings"):
        compare.run(other, resume=True, say=said.append)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune": {"model": "m", "run_dir": "x"}}, "`finetune.run_dir` is what the comparison"),
        ({"methods": ["some"]}, "no such choice"),
        ({"metric": "perplexity"}, "does not measure"),
        ({"test": "0 examples"}, "test"),
        ({"rate": [1]}, "rate"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_any_run(
    changes: dict[str, Any], message: str, tmp_path: Path, tiny_bert: Path,
    classification_file: Path,
) -> None:  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        compare.run(
            compare.load(settings_of(tmp_path, tiny_bert, classification_file, **changes)),
            say=lambda _: None,
        )


def test_a_test_split_holds_no_input_of_training(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"house {number % 20}", "label": "ab"[number % 3 > 1]} for number in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = TaskConfig(kind="classification", train=str(data), deduplicate=True)
    train, test = hold_out(task, "20%", tmp_path / "split")
    texts = [[row.fields["text"] for row in read_records(side)] for side in (train, test)]
    assert not set(texts[0]) & set(texts[1])
    assert len(set(texts[0]) | set(texts[1])) == 20
    own = tmp_path / "test.jsonl"
    own.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    assert hold_out(task, str(own), tmp_path / "other") == (str(data), str(own))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
def test_merged_lora_is_a_plain_model_that_gives_the_same(
    name: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name)
    model = load_model(
        path, head="classification", labels=("a", "b"), dtype=torch.float32, attention="sdpa"
    ).eval()
    names = [key for key, _ in model.named_parameters()]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        add_lora(model, 2)
        torch.testing.assert_close(model(input_ids=ids).logits, before)  # it begins as nothing
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
        changed = model(input_ids=ids).logits
        assert not torch.allclose(changed, before)
        merge_lora(model)
        torch.testing.assert_close(model(input_ids=ids).logits, changed, atol=1e-5, rtol=1e-4)
    assert [key for key, _ in model.named_parameters()] == names


@pytest.mark.parametrize(
    ("model", "kind", "data"),
    [("tiny_bert", "classification", "classification_file"), ("tiny_llama", "chat", "chat_file")],
)
def test_lora_trains_little_and_exports_plain_weights(
    model: str, kind: str, data: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(model)
    values = {
        "model": str(source), "scope": "lora 2", "duration": "6 steps", "batch": "8 examples",
        "task": {"kind": kind, "train": str(request.getfixturevalue(data)),
                 "validation": "4 examples"},
        "optimizer": {"lr": 1e-2}, "num_workers": 0, "run_dir": str(tmp_path / "run"),
        "evaluate": {"num_samples": 0} if kind == "chat" else {},
    }  # fmt: skip
    assert finetune.run(build_config(finetune.Config, values)).ending == "finished"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["num_trained_parameters"] < manifest["num_parameters"] / 2
    auto = AutoModelForCausalLM if kind == "chat" else AutoModelForSequenceClassification
    plain, report = auto.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        assert plain(**tokenizer("Where", return_tensors="pt")).logits.isfinite().all()
