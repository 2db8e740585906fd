"""`evaluate` says how sure its metrics are, where a model errs, and how another one compares."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fulltune.cli import main
from fulltune.config import build_config
from fulltune.errors import ConfigError, RunFolderError
from fulltune.evaluate.calibration import HALVES
from fulltune.recipes import evaluate, finetune, predict
from fulltune.recipes.kept_evaluations import keep_evaluation

Train = Callable[..., Path]
LABELS = {"place": "地点", "person": "人物", "number": "数字"}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("analysis")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLTUNE_CACHE", str(folder / "cache"))

        def run(name: str, model: Path, data: Path, kind: str, **others: Any) -> Path:
            values = {
                "model": str(model),
                "task": {"kind": kind, "train": str(data), "validation": "40 examples"},
                "duration": "150 steps",
                "batch": "16 examples",
                "optimizer": {"lr": 3e-3, "schedule": "constant"},
                "precision": "fp32",
                "num_workers": 0,
                "run_dir": str(folder / name),
                **others,
            }
            finetune.run(build_config(finetune.Config, values))
            return folder / name

        yield run


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory, classification_file: Path) -> Path:
    """Questions of three kinds and many lengths with Chinese labels, one of seven a wrong one."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    lines = []
    for number, line in enumerate(classification_file.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        wrong = number % 7 == 3
        label = LABELS[row["label"]] if not wrong else LABELS["number"]
        text = row["text"] + " Near the door." * (number // 3 % 5)
        lines.append(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(train: Train, tiny_bert: Path, questions: Path) -> Path:
    return train("run", tiny_bert, questions, "classification")


@pytest.fixture(scope="module")
def other_run(train: Train, tiny_bert: Path, questions: Path) -> Path:
    """Another split of the same data, and fewer steps."""
    return train("other", tiny_bert, questions, "classification", seed=1, duration="2 steps")


@pytest.fixture(scope="module")
def chat_run(train: Train, tiny_llama: Path, chat_file: Path) -> Path:
    return train(
        "chat", tiny_llama, chat_file, "chat", duration="2 steps", evaluate={"num_samples": 0},
        task={"kind": "chat", "train": str(chat_file), "validation": "12 examples"},
    )  # fmt: skip


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> tuple[str, str]:
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "argv", ["fulltune", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_every_metric_of_a_classifier_lies_in_its_interval(run: Path) -> None:
    report = evaluate.run(str(run), device="cpu")
    assert set(report.analysis.intervals) == set(report.metrics)
    for name, value in report.metrics.items():
        interval = report.analysis.intervals[name]
        assert interval.low <= value <= interval.high, name
        assert interval.low < interval.high, name
    assert set(report.analysis.label_intervals) <= set(LABELS.values())
    assert report.notes == ()


def test_slices_hold_all_examples_and_worst_errors_name_their_rows(
    run: Path, questions: Path
) -> None:
    report = evaluate.run(str(run), device="cpu")
    assert sum(part.num_examples for part in report.analysis.length_slices) == 40
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    losses = [error.loss for error in report.worst_errors]
    assert losses == sorted(losses, reverse=True)
    assert losses
    for error in report.worst_errors:
        file, line = error.where.rsplit(":", 1)
        assert file == str(questions)
        assert rows[int(line) - 1] == {"text": error.text, "label": error.label}
        assert error.prediction != error.label


def test_the_temperature_is_fitted_on_what_was_held_out(run: Path, questions: Path) -> None:
    own = evaluate.run(str(run), device="cpu").analysis.calibration
    assert own is not None
    assert own.fitted_on == HALVES
    report = evaluate.run(str(run), data=str(questions), device="cpu")
    other = report.analysis.calibration
    assert other is not None
    assert other.fitted_on == f"validation split of {run}"
    assert other.temperature == own.temperature


def test_examples_that_the_model_was_trained_on_are_counted(run: Path, questions: Path) -> None:
    report = evaluate.run(str(run), data=str(questions), device="cpu")
    assert report.num_examples == 120
    (note,) = report.notes
    assert note.startswith("80 of these 120 examples are in the training data")


def test_a_model_without_its_data_is_measured_and_says_what_it_does_not_know(
    run: Path, questions: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    settings = tmp_path / "run" / "config.yaml"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace(str(questions), str(tmp_path / "lost.jsonl")))
    report = evaluate.run(str(tmp_path / "run"), data=str(questions), device="cpu")
    assert "cannot be read again" in report.notes[0]
    assert report.analysis.calibration is not None
    assert report.analysis.calibration.fitted_on == HALVES


def test_another_run_is_measured_on_the_same_examples(run: Path, other_run: Path) -> None:
    report = evaluate.run(str(run), against=str(other_run), device="cpu")
    comparison = report.comparison
    assert comparison is not None
    assert comparison.num_examples == 40
    for name, found in comparison.differences.items():
        assert found.first == pytest.approx(report.metrics[name])
        assert 0 < found.p_value <= 1
    # Many steps tell the questions apart, two do not.
    assert comparison.words["accuracy"].startswith("the accuracy is better")
    test = comparison.mcnemar
    assert test is not None
    accuracy = comparison.differences["accuracy"].difference
    assert test.only_first - test.only_second == pytest.approx(40 * accuracy)
    # Its split is another, so it was trained on some of them, which is said.
    assert any("in the training data of" in note for note in comparison.notes)


def test_a_model_does_not_differ_from_itself(run: Path) -> None:
    comparison = evaluate.run(str(run), against=str(run / "model"), device="cpu").comparison
    assert comparison is not None
    assert {found.difference for found in comparison.differences.values()} == {0}
    assert comparison.words["accuracy"] == "the accuracy is the same on these 40 examples"
    assert comparison.notes == ()


def test_a_fine_tuned_chat_model_is_compared_with_its_base(
    chat_run: Path, tiny_llama: Path
) -> None:
    report = evaluate.run(str(chat_run), against=str(tiny_llama), device="cpu")
    assert set(report.analysis.intervals) == {"loss", "perplexity"}
    assert report.comparison is not None
    assert set(report.comparison.differences) == {"loss", "perplexity"}
    assert report.comparison.differences["loss"].first == pytest.approx(report.metrics["loss"])
    assert report.comparison.mcnemar is None


def test_models_of_other_tasks_cannot_be_compared(run: Path, chat_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"`task.kind: chat`, and the one that is evaluated"):
        evaluate.run(str(run), against=str(chat_run), device="cpu")


def test_losses_of_other_tokens_are_not_compared(chat_run: Path, tiny_bert: Path) -> None:
    other = chat_run.parent / "other-tokenizer"
    shutil.copytree(chat_run / "model", other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("<|im_end|>\n", "<|im_end|>"))
    settings = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    settings["model"]["merges"] = settings["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ConfigError, match="cuts texts into other tokens"):
        evaluate.run(str(chat_run), against=str(other), device="cpu")


def test_a_result_is_kept_in_the_run_and_never_replaced_by_another(
    run: Path, other_run: Path, questions: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "evaluations"
    own, data = str(tmp_path / "run"), shutil.copy(questions, tmp_path / "问题.jsonl")

    def keep(**options: Any) -> list[str]:
        assert "kept in" in str(keep_evaluation(evaluate.run(own, device="cpu", **options)))
        return sorted(path.name for path in folder.iterdir())

    assert keep() == ["validation.json"]
    assert keep() == ["validation.json"]  # the same once more
    assert keep(data=str(data)) == ["validation.json", "问题.json"]
    Path(data).write_text(questions.read_text(encoding="utf-8").partition("\n")[2])
    first = (folder / "问题.json").read_text(encoding="utf-8")
    assert keep(data=str(data)) == ["validation.json", "问题-2.json", "问题.json"]
    assert (folder / "问题.json").read_text(encoding="utf-8") == first
    names = keep(against=str(other_run))
    assert [name for name in names if "against" in name]
    assert keep_evaluation(evaluate.run(str(run / "model"), device="cpu")) is not None
    assert len(list((run / "evaluations").iterdir())) == 1

    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("<h2>Evaluated on") == 4
    assert "问题.jsonl" in page
    assert 'class="reliability"' in page
    assert 'class="interval-chart"' in page
    assert "McNemar" in page


def test_a_model_outside_of_a_run_keeps_nothing(run: Path, questions: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    report = evaluate.run(str(tmp_path / "model"), data=str(questions), device="cpu")
    assert report.notes == ()
    assert keep_evaluation(report) is None


def test_the_terminal_shows_all_of_it_within_its_width(
    say: Any, run: Path, other_run: Path
) -> None:
    output, errors = say("evaluate", run, "--against", other_run)
    for heading in (
        "Metrics", "Against", "Labels", "Confusion matrix", "Calibration", "By length",
        "Worst errors",
    ):  # fmt: skip
        assert re.search(f"^{heading}", output, re.MULTILINE), heading
    assert max(map(len, output.splitlines())) <= 100 + len(str(run)) + len(str(other_run))
    assert "地点" in output
    assert "kept in" in errors


def test_json_holds_all_that_is_shown(say: Any, run: Path, other_run: Path) -> None:
    output, _ = say("evaluate", run, "--against", other_run, "--json")
    result = json.loads(output)
    assert set(result["intervals"]) == set(result["metrics"])
    assert result["intervals"]["accuracy"]["method"] == "wilson"
    assert result["calibration"]["before"]["ece"] >= 0
    assert {part["num_examples"] for part in result["by_length"]}
    assert result["worst_errors"][0]["where"]
    assert result["against"]["metrics"]["accuracy"]["words"]
    assert result["against"]["mcnemar"]["method"]


def test_quick_labels_are_the_exact_ones(run: Path, questions: Path, tmp_path: Path) -> None:
    written = {}
    for quick in (False, True):
        output = tmp_path / f"{quick}.jsonl"
        predict.run(str(run), str(questions), output=output, quick=quick, device="cpu")
        lines = output.read_text(encoding="utf-8").splitlines()
        written[quick] = [json.loads(line)["prediction"] for line in lines]
    for exact, quick in zip(written[False], written[True], strict=True):
        assert quick["label"] == exact["label"]
        assert quick["probability"] == pytest.approx(exact["probability"], abs=0.05)
    # Some were scored in bf16: the numbers are not the same to the last bit.
    assert written[True] != written[False]
    with pytest.raises(RunFolderError, match="`quick` was true and is now null"):
        predict.run(
            str(run), str(questions), output=tmp_path / "True.jsonl", resume=True, device="cpu"
        )


def test_quick_has_no_effect_on_a_model_that_answers(chat_run: Path, chat_file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"`--quick` has no effect on a model of `task\.kind: chat"
    ):
        predict.run(str(chat_run), str(chat_file), quick=True, device="cpu")
