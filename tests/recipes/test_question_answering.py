"""A run on questions: from rows to answers, and a folder that transformers reads alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from fulltune.config import build_config
from fulltune.errors import ConfigError, DataError
from fulltune.recipes import evaluate, finetune, predict, preview

COLOURS = ("red", "green", "blue", "white")
PLACES = ("Paris", "Rome", "Tokyo", "Cairo", "Lima", "Oslo", "Quito", "Riga")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def make_rows(count: int = 96, *, unanswerable: bool = False) -> list[dict[str, Any]]:
    """Where a house is: the only place of a context whose length and order change."""
    rows = []
    for number in range(count):
        place, colour = PLACES[number % 8], COLOURS[number // 8 % 4]
        context = f"The house number {number} in {place} is {colour}."
        if number % 3:
            context = f"She sells sea shells by the sea shore. {context} 你好，世界！"
        none = unanswerable and number % 4 == 0
        if none:
            context = context.replace(place, "the city")
        rows.append(
            {
                "id": f"house-{number}",
                "question": "Where is the house?",
                "context": context,
                "answers": {"text": [], "answer_start": []}
                if none
                else {"text": [place], "answer_start": [context.index(place)]},
            }
        )
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_config(model: Path, data: Path, run_dir: Path, **settings: Any) -> finetune.Config:
    task = {
        "kind": "question_answering", "train": str(data), "validation": "16 examples",
        **settings.pop("task", {}),
    }  # fmt: skip
    values: dict[str, Any] = {
        "model": str(model), "task": task, "duration": "60 steps", "batch": "16 examples",
        "precision": "fp32", "optimizer": {"lr": 5e-3}, "evaluate": {"every": "30 steps"},
        "num_workers": 0, "run_dir": str(run_dir),
    }  # fmt: skip
    return build_config(finetune.Config, {**values, **settings})


def test_a_run_learns_to_answer_and_every_door_gives_its_answers(
    tiny_bert: Path, tmp_path: Path
) -> None:
    rows = make_rows()
    data = write(tmp_path / "houses.jsonl", rows)
    # Windows of 26 tokens: the longer contexts are cut.
    config = make_config(
        tiny_bert, data, tmp_path / "run", task={"max_length": 26, "stride": 6, "longest_answer": 3}
    )
    result = finetune.run(config)
    assert result.metrics["f1"] > 0.9
    assert set(result.metrics) == {"f1", "exact_match", "loss"}
    folder = tmp_path / "run" / "model"
    info = json.loads((folder / "fulltune.json").read_text(encoding="utf-8"))
    assert info["settings"] == {
        "stride": 6, "longest_answer": 3, "no_answer": False, "repeated_answer": "error",
        "answer_units": "words",
    }  # fmt: skip

    held_out = evaluate.run(str(tmp_path / "run"))
    for name, value in result.metrics.items():
        assert held_out.metrics[name] == pytest.approx(value, abs=1e-6)
    everything = evaluate.run(str(folder), data=str(data))
    assert everything.details["num_questions"] == len(rows) < everything.num_examples

    asked = [{name: row[name] for name in ("id", "question", "context")} for row in rows]
    output = tmp_path / "answers.jsonl"
    predict.run(str(folder), str(write(tmp_path / "asked.jsonl", asked)), output=output)
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [{name: row[name] for name in asked[0]} for row in answers] == asked
    exact = 0
    for row, answer in zip(rows, answers, strict=True):
        found = answer["prediction"]
        assert row["context"][found["start"] : found["end"]] == found["answer"]
        assert 0 < found["score"] <= 1
        assert found["n_best"][0]["answer"] == found["answer"]
        assert len({(each["start"], each["end"]) for each in found["n_best"]}) == 5
        exact += found["answer"] == row["answers"]["text"][0]
    assert exact / len(rows) == pytest.approx(everything.metrics["exact_match"])

    # transformers' own classes, on contexts that need no window.
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.architectures == ["BertForQuestionAnswering"]
    compared = 0
    for answer in answers:
        encoded = tokenizer(
            answer["question"], answer["context"], return_tensors="pt", return_offsets_mapping=True
        )
        if encoded["input_ids"].shape[1] > 26:
            continue
        offsets = encoded.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            own = model(**encoded)
        inside = [place for place, kind in enumerate(encoded.sequence_ids(0)) if kind == 1]
        pairs = [(a, b) for a in inside for b in inside if a <= b < a + 3]
        first, last = max(
            pairs, key=lambda pair: own.start_logits[0, pair[0]] + own.end_logits[0, pair[1]]
        )
        span = (offsets[first][0], offsets[last][1])
        assert span == (answer["prediction"]["start"], answer["prediction"]["end"])
        compared += 1
    assert compared >= len(rows) // 4


def test_questions_without_an_answer_are_learned_and_measured_apart(
    tiny_bert: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "houses.jsonl", make_rows(unanswerable=True))
    config = make_config(
        tiny_bert, data, tmp_path / "run", task={"no_answer": True, "validation": str(data)},
        duration="90 steps",
    )  # fmt: skip
    result = finetune.run(config)
    assert result.metrics["exact_match"] > 0.9
    report = evaluate.run(str(tmp_path / "run"))
    parts = [report.details[name] for name in ("has_answer", "no_answer")]
    assert [part["num_questions"] for part in parts] == [72, 24]
    mean = sum(part["f1"] * part["num_questions"] for part in parts) / 96
    assert report.metrics["f1"] == pytest.approx(mean)
    assert report.details["best_f1"] >= report.metrics["f1"] - 1e-9
    assert 0 <= report.details["best_f1_threshold"] <= 1
    output = tmp_path / "answers.jsonl"
    predict.run(str(tmp_path / "run"), str(data), output=output)
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    empty = [row["prediction"] for row in answers if row["prediction"]["answer"] == ""]
    assert len(empty) > 12
    assert all(each["start"] is None for each in empty)


def test_the_preview_shows_question_context_and_answer(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "houses.jsonl", make_rows())
    config = make_config(
        tiny_bert, data, tmp_path / "run", task={"max_length": 26, "stride": 6, "validation": None}
    )
    console = Console(width=100, no_color=True, record=True)
    assert preview.run(config, num_samples=3, console=console)
    shown = console.export_text()
    assert "houses.jsonl:1 → Paris" in shown
    assert "⟦paris⟧" in shown.replace(" ", "")
    assert "truncated" in shown
    assert "removed by truncation" not in shown
    assert "96 questions in 160 windows of at most 26 tokens" in capsys.readouterr().err


def test_settings_of_questions_have_no_effect_on_other_kinds(
    tiny_bert: Path, classification_file: Path, tmp_path: Path
) -> None:
    for name, value in (("stride", 8), ("no_answer", True), ("answer_units", "characters")):
        config = make_config(
            tiny_bert, classification_file, tmp_path / "run",
            task={"kind": "classification", name: value},
        )  # fmt: skip
        with pytest.raises(ConfigError, match=f"`task.{name}` has no effect"):
            finetune.run(config)


def test_an_answer_outside_its_context_stops_the_run_by_file_and_line(
    tiny_bert: Path, tmp_path: Path
) -> None:
    rows = make_rows()
    rows[40]["answers"]["answer_start"] = [3]
    data = write(tmp_path / "houses.jsonl", rows)
    with pytest.raises(DataError, match=r"houses.jsonl:41: the answer `Paris` is not at character"):
        finetune.run(make_config(tiny_bert, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
