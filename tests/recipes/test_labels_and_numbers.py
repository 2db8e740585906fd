"""Many labels and numbers from a settings file to predictions, and classes that are not even."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fulltune.config import build_config
from fulltune.data.formats import make_example, recognise_format
from fulltune.data.records import Record
from fulltune.data.tasks import TaskConfig
from fulltune.errors import ConfigError, DataError
from fulltune.evaluate.label_metrics import multi_label_metrics, regression_metrics
from fulltune.recipes import evaluate, finetune, predict
from fulltune.recipes.prepare import make_objective, open_base, prepare


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


COLOURS = ("red", "green", "blue")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def coloured(path: Path) -> Path:
    """The labels are the colours that the text names; some name none."""
    rows = []
    for number in range(48):
        has = [colour for bit, colour in enumerate(COLOURS) if number >> bit & 1]
        text = " ".join([*has, f"house {number // 8}"])
        rows.append({"text": text, "labels": has})
    return write(path, rows)


def numbered(path: Path) -> Path:
    rows = [
        {"text": " ".join(["red"] * (number % 4) + [f"house {number}"]), "score": number % 4 - 1.5}
        for number in range(48)
    ]
    return write(path, rows)


def trained(tmp_path: Path, model: Path, kind: str, data: Path, steps: int = 400) -> Path:
    config = build_config(
        finetune.Config,
        {
            "model": str(model),
            "task": {"kind": kind, "train": str(data), "validation": "8 examples"},
            "duration": f"{steps} steps",
            "batch": "16 examples",
            "precision": "fp32",
            "dropout": 0.0,
            "optimizer": {"lr": 4e-3, "schedule": "constant"},
            "evaluate": {"every": f"{steps} steps"},
            "num_workers": 0,
            "run_dir": str(tmp_path / kind),
        },
    )
    assert finetune.run(config).ending == "finished"
    return tmp_path / kind


def predictions(run: Path, rows: Path, tmp_path: Path) -> list[dict[str, Any]]:
    output = tmp_path / f"{run.name}.jsonl"
    predict.run(str(run / "model"), str(rows), output=output)
    lines = output.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prediction"] for line in lines]


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_many_labels_are_learned_measured_predicted_and_plain_hugging_face(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = coloured(tmp_path / "rows.jsonl")
    run = trained(tmp_path, request.getfixturevalue(model), "multi_label", data)
    report = evaluate.run(str(run), data=str(data))
    assert report.metrics["micro_f1"] > 0.9
    assert report.details["per_label"]["red"]["support"] == 24
    questions = write(tmp_path / "q.jsonl", [{"text": "red blue house 2"}, {"text": "house 1"}])
    found = predictions(run, questions, tmp_path)
    assert [set(row["labels"]) for row in found] == [{"red", "blue"}, set()]
    plain = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert plain.config.problem_type == "multi_label_classification"
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    with torch.no_grad():
        shares_C = plain(**tokenizer("red blue house 2", return_tensors="pt")).logits[0].sigmoid()
    ours = [found[0]["probabilities"][plain.config.id2label[place]] for place in range(3)]
    np.testing.assert_allclose(ours, shares_C.numpy(), atol=1e-5)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_gpt2"])
def test_numbers_are_learned_measured_predicted_and_plain_hugging_face(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = numbered(tmp_path / "rows.jsonl")
    run = trained(tmp_path, request.getfixturevalue(model), "regression", data)
    report = evaluate.run(str(run), data=str(data))
    assert report.metrics["pearson"] > 0.9
    assert report.metrics["spearman"] > 0.9
    questions = write(tmp_path / "q.jsonl", [{"text": "red red red house 3"}])
    (found,) = predictions(run, questions, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert plain.config.problem_type == "regression"
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    with torch.no_grad():
        logits = plain(**tokenizer("red red red house 3", return_tensors="pt")).logits
    assert logits.shape == (1, 1)
    assert found["score"] == pytest.approx(float(logits), abs=1e-5)


def test_balanced_weights_give_each_class_the_same_sum(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"text": f"house {number}", "label": "ab"[number % 8 == 0]} for number in range(32)]
    task = TaskConfig(
        kind="classification", train=str(write(tmp_path / "rows.jsonl", rows)), validation=None,
        class_weights="balanced",
    )  # fmt: skip
    objective: Any = make_objective(open_base(str(tiny_bert), task), task)
    prepared: Any = prepare(objective, task, seed=0, num_workers=0)
    assert prepared.objective.class_weights == pytest.approx((32 / (2 * 28), 32 / (2 * 4)))
    other = task.model_copy(update={"class_weights": {"a": 1.0, "c": 2.0}})
    with pytest.raises(ConfigError, match="for `a`, `c`, and the labels are `a`, `b`"):
        prepare(objective, other, seed=0, num_workers=0)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("multi_label", {"text": "a", "labels": "red"}, "must be a list of labels"),
        ("multi_label", {"text": "a", "labels": [None]}, "must be a list of labels"),
        ("multi_label", {"text": "a", "labels": '["red"'}, "not a list in JSON"),
        ("multi_label", {"text": "a", "labels": ["red", "red"]}, "names a label twice"),
        ("regression", {"text": "a", "score": "warm"}, "a score is a number"),
        ("regression", {"text": "a", "score": True}, "must be a finite number"),
        ("regression", {"text": "a", "score": float("nan")}, "must be a finite number"),
        ("regression", {"text": "a", "score": None}, "must be a finite number"),
        ("classification", {"text": "a", "label": 0.5}, "a label is a class"),
    ],
)
def test_a_label_of_the_wrong_type_names_its_row(
    kind: Any, fields: dict[str, Any], message: str
) -> None:
    record = Record(fields, "rows.jsonl:3")
    layout = recognise_format([record], TaskConfig(kind=kind, train="rows.jsonl"))
    with pytest.raises(DataError, match=message) as caught:
        make_example(record, layout, kind=kind)
    assert str(caught.value).startswith("rows.jsonl:3: ")


def test_a_list_in_a_cell_of_a_table_is_read() -> None:
    record = Record({"text": "a", "labels": '["红", "b"]'}, "rows.csv:2")
    layout = recognise_format([record], TaskConfig(kind="multi_label", train="rows.csv"))
    example: Any = make_example(record, layout, kind="multi_label")
    assert example.labels == ("红", "b")


def test_metrics_of_many_labels_by_hand() -> None:
    has = np.array([[True, False], [True, True], [False, False]])
    logits = np.array([[2.0, -1.0], [-1.0, 3.0], [-2.0, -2.0]])
    found = multi_label_metrics(has, logits, ("a", "b"))
    assert found["subset_accuracy"] == pytest.approx(2 / 3)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 0 + 1))
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    shares = 1 / (1 + np.exp(-logits))
    assert found["loss"] == pytest.approx(-np.log(np.where(has, shares, 1 - shares)).mean())


def test_metrics_of_numbers_are_scipys() -> None:
    from scipy import stats

    generator = np.random.default_rng(0)
    right = generator.integers(0, 5, 40).astype(float)
    given = right + generator.normal(0, 1, 40).round(1)
    found = regression_metrics(right, given)
    assert found["pearson"] == pytest.approx(stats.pearsonr(right, given).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(right, given).statistic)
    assert found["loss"] == pytest.approx(((right - given) ** 2).mean())
    assert found["r2"] == pytest.approx(1 - ((right - given) ** 2).sum() / (40 * right.var()))
    assert np.isnan(regression_metrics(right, np.zeros(40))["pearson"])
