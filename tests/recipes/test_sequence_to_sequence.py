"""Text to text end to end: it learns, is scored by its answers, predicts, and is plain T5."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fulltune.config import build_config
from fulltune.errors import ConfigError, DataError
from fulltune.inference import GenerationSettings
from fulltune.recipes import evaluate, finetune, predict, preview
from fulltune.report.run_record import read_run
from fulltune.tracking import read_metrics

GENERATED = ("bleu", "chrf", "rouge1", "rouge2", "rouge_lsum", "exact_match")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def make_config(run_dir: Path, model: Path, data: Path, **changes: Any) -> finetune.Config:
    values: dict[str, Any] = {
        "model": str(model),
        "task": {"kind": "sequence_to_sequence", "train": str(data), "validation": "6 examples"},
        "duration": "4 steps",
        "batch": "8 examples",
        "precision": "fp32",
        "optimizer": {"lr": 1e-3},
        "num_workers": 0,
        "run_dir": str(run_dir),
    }
    return build_config(finetune.Config, {**values, **changes})


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path, pairs_file: Path) -> Path:
    """A run of a T5 that was trained until it knows the colours, judged by BLEU."""
    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLTUNE_CACHE", str(folder / "cache"))
        config = make_config(
            folder / "run", tiny_t5, pairs_file, dropout=0.0, duration="120 steps",
            task={
                "kind": "sequence_to_sequence", "train": str(pairs_file), "prefix": "colour: ",
                "validation": "6 examples", "max_target_length": 12,
            },
            optimizer={"lr": 1e-2, "schedule": "constant"}, save_every="1000 steps",
            evaluate={"every": "60 steps", "generate": 6, "metric": "bleu", "num_samples": 2},
        )  # fmt: skip
        assert finetune.run(config).ending == "finished"
    return folder / "run"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_t5_learns_and_its_answers_are_scored_while_it_does(learned: Path) -> None:
    events = read_metrics(learned / "metrics.jsonl")
    evaluations = [event for event in events if event["event"] == "evaluation"]
    assert [event["step"] for event in evaluations] == [0, 60, 120]
    assert set(GENERATED) < evaluations[0].keys()
    assert evaluations[0]["exact_match"] == 0
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < 0.1 * losses[0]
    samples = rows_of(learned / "samples.jsonl")
    assert [sample["step"] for sample in samples[:2]] == [0, 0]
    assert {sample["step"] for sample in samples[2:]} == {120} | {samples[-1]["step"]}
    assert samples[-1]["prompt"][0]["content"].strip()
    assert (
        samples[-1]["reference"] in ("red", "green", "blue", "white")
        or "。" in (samples[-1]["reference"])
    )
    page = (learned / "report.html").read_text(encoding="utf-8")
    assert samples[-1]["prompt"][0]["content"] in page
    assert "nrefs:1|case:mixed" in page
    assert "nrefs:1" in (learned / "model" / "README.md").read_text(encoding="utf-8")
    assert read_run(learned).samples


def test_the_folder_is_a_plain_t5_and_answers_as_fulltune_does(
    learned: Path, pairs_file: Path, tmp_path: Path
) -> None:
    info = json.loads((learned / "model" / "fulltune.json").read_text(encoding="utf-8"))
    assert info["kind"] == "sequence_to_sequence"
    assert info["prefix"] == "colour: "
    assert info["max_target_length"] == 12
    output = tmp_path / "answers.jsonl"
    settings = GenerationSettings(max_new_tokens=8)
    predict.run(str(learned), str(pairs_file), output=output, settings=settings)
    predicted = rows_of(output)
    assert all(row["prediction"].keys() == {"answer", "stopped"} for row in predicted)
    right = [row["prediction"]["answer"] == row["target"] for row in predicted]
    assert sum(right) > 30

    model = AutoModelForSeq2SeqLM.from_pretrained(learned / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(learned / "model")
    for row in predicted[:8]:
        inputs = tokenizer("colour: " + row["source"], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["prediction"]["answer"]


def test_evaluate_scores_answers_and_says_how_they_were_found(learned: Path) -> None:
    manifest = json.loads((learned / "manifest.json").read_text(encoding="utf-8"))
    report = evaluate.run(str(learned), device="cpu")
    assert report.metrics == pytest.approx(manifest["results"])
    assert report.details["num_generated"] == report.num_examples == 6
    assert "greedy|max_new_tokens:" in report.details["signatures"]["search"]
    assert report.samples[0].reference
    beams = evaluate.run(
        str(learned), device="cpu", generate=2, num_samples=0, tokenize="char",
        search={"num_beams": 2, "length_penalty": 0.5, "max_new_tokens": 5},
    )  # fmt: skip
    assert beams.details["num_generated"] == 2
    assert "beams:2|length_penalty:0.5|max_new_tokens:5" in beams.details["signatures"]["search"]
    assert "tok:char" in beams.details["signatures"]["bleu"]
    none = evaluate.run(str(learned), device="cpu", generate=0)
    assert not set(GENERATED) & none.metrics.keys()
    with pytest.raises(ConfigError, match="--num-beams 2` has no effect on `--generate 0`"):
        evaluate.run(str(learned), device="cpu", generate=0, search={"num_beams": 2})


def test_other_data_is_evaluated_and_predicted_in_its_own_layout(
    learned: Path, tmp_path: Path
) -> None:
    data = tmp_path / "other.jsonl"
    row = {"translation": {"en": "The red house 3 of Rome", "de": "red"}}
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    columns = {"source": "en", "target": "de"}
    report = evaluate.run(str(learned), data=str(data), columns=columns, device="cpu")
    assert (report.num_examples, report.metrics["exact_match"]) == (1, 1.0)
    output = tmp_path / "out.jsonl"
    predict.run(str(learned), str(data), output=output, columns={"source": "en"})
    assert rows_of(output)[0]["prediction"]["answer"] == "red"


@pytest.mark.parametrize("chat_template", [True, False])
def test_a_decoder_learns_by_prompt_and_predicts_by_the_same(
    tiny_llama: Path, pairs_file: Path, tmp_path: Path, chat_template: bool
) -> None:
    model = tiny_llama
    if not chat_template:
        model = tmp_path / "plain"
        model.mkdir()
        for file in tiny_llama.iterdir():
            if file.name != "chat_template.jinja":
                (model / file.name).write_bytes(file.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(model)
    task = {
        "kind": "sequence_to_sequence", "train": str(pairs_file), "validation": "6 examples",
        "prompt": "Colour of {source}:\n",
    }  # fmt: skip
    config = make_config(
        tmp_path / "run", model, pairs_file, task=task, duration="80 steps",
        optimizer={"lr": 1e-2, "schedule": "constant"}, save_every="1000 steps",
        evaluate={"every": "80 steps", "num_samples": 1},
    )  # fmt: skip
    finetune.run(config)
    info = json.loads((tmp_path / "run" / "model" / "fulltune.json").read_text(encoding="utf-8"))
    assert info["prompt"] == "Colour of {source}:\n"
    output = tmp_path / "answers.jsonl"
    settings = GenerationSettings(max_new_tokens=8)
    predict.run(str(tmp_path / "run"), str(pairs_file), output=output, settings=settings)
    right = [row["prediction"]["answer"] == row["target"] for row in rows_of(output)]
    assert sum(right) > 25


def test_preview_shows_source_target_and_what_truncation_removes(
    tiny_t5: Path, tiny_llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    for model, prefix in ((tiny_t5, {"prefix": "colour: "}), (tiny_llama, {})):
        task = {
            "kind": "sequence_to_sequence", "train": str(pairs_file), "validation": "6 examples",
            "max_length": 12 if prefix else 30, "too_long": "truncate", **prefix,
        }  # fmt: skip
        console = Console(width=200, record=True, no_color=True)
        config = make_config(tmp_path / "run", model, pairs_file, task=task)
        assert preview.run(config, num_samples=2, console=console)
        text = console.export_text()
        assert "⟦red" in text
        removed = "The red ho~~use 0 of Paris~~</s>" if prefix else "27是wh~~ite~~<|im_end|>"
        assert removed in text
        assert "truncated" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"metric": "bleu"}}, "`evaluate.metric` is `bleu`.*without generated"),
        ({"evaluate": {"tokenize": "zh"}}, "`evaluate.tokenize: zh` has no effect"),
        ({"task": {"kind": "text", "train": "x", "prefix": "a"}}, "`task.prefix` has no effect"),
        (
            {"task": {"kind": "text", "train": "x"}, "evaluate": {"generate": 3}},
            "`evaluate.generate` has no effect",
        ),
    ],
)
def test_settings_without_effect_are_refused(
    tiny_t5: Path, pairs_file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "train" in changes.get("task", {}):
        changes["task"]["train"] = str(pairs_file)
    with pytest.raises(ConfigError, match=message):
        finetune.run(make_config(tmp_path / "run", tiny_t5, pairs_file, **changes))


def test_a_row_that_cannot_be_used_is_named(tiny_t5: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"source": f"house {index}", "target": "red"} for index in range(8)]
    rows[5]["target"] = "  "
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"pairs\.jsonl:6: field `target` is empty"):
        finetune.run(make_config(tmp_path / "run", tiny_t5, data))


def test_pairs_that_are_left_out_are_counted_with_the_reason(
    tiny_t5: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {
        "kind": "sequence_to_sequence", "train": str(pairs_file), "validation": "6 examples",
        "max_target_length": 3, "too_long": "drop",
    }  # fmt: skip
    preview.run(make_config(tmp_path / "run", tiny_t5, pairs_file, task=task), num_samples=0)
    said = " ".join(capsys.readouterr().err.split())
    reason = r"longer than `task\.max_length` or `task\.max_target_length`"
    assert re.search(rf"\d+ of 40 rows left out: {reason}", said)


def test_a_killed_run_resumes_to_the_same_weights(
    tiny_t5: Path, pairs_file: Path, tmp_path: Path
) -> None:
    def final(folder: Path) -> dict[str, torch.Tensor]:
        return dict(AutoModelForSeq2SeqLM.from_pretrained(folder / "model").state_dict())

    settings = {"save_every": "2 steps", "evaluate": {"every": "2 steps", "num_samples": 0}}
    finetune.run(make_config(tmp_path / "whole", tiny_t5, pairs_file, **settings))
    broken = make_config(tmp_path / "broken", tiny_t5, pairs_file, **settings)
    finetune.run(broken)
    for path in ("model", "report.html", "manifest.json", "checkpoints/step-00000004"):
        target = tmp_path / "broken" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert finetune.run(broken, resume=True).step == 4
    one, other = final(tmp_path / "whole"), final(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)
