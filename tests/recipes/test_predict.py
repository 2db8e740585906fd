from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from fulltune.errors import ConfigError, DataError, RunFolderError
from fulltune.inference import PREDICTORS, GenerationSettings
from fulltune.recipes import predict
from fulltune.recipes.origin import origin_path

SHORT = GenerationSettings(max_new_tokens=4)


@pytest.fixture(scope="module")
def classifier(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=3, id2label={0: "number", 1: "person", 2: "place"}, label2id={}
    )
    model.save_pretrained(directory)
    for file in tiny_bert.glob("token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return str(directory)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_comes_out_in_order_with_its_fields_and_a_label(
    classifier: str, classification_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    result = predict.run(classifier, str(classification_file), output=output)
    rows, given = read(output), read(classification_file)
    assert (result.num_predicted, result.num_kept) == (len(given), 0)
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in rows] == given
    for row in rows:
        prediction = row["prediction"]
        assert set(prediction["probabilities"]) == {"number", "person", "place"}
        assert sum(prediction["probabilities"].values()) == pytest.approx(1)
        assert prediction["probability"] == max(prediction["probabilities"].values())
        assert prediction["probabilities"][prediction["label"]] == prediction["probability"]


def test_rows_without_a_label_of_a_csv_file_are_labelled(classifier: str, tmp_path: Path) -> None:
    source, output = tmp_path / "in.csv", tmp_path / "out.jsonl"
    with source.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["id", "question"], ["7", "Where is it?"], ["8", "谁？"]])
    predict.run(classifier, str(source), output=output, columns={"text": "question"})
    assert [(row["id"], row["question"]) for row in read(output)] == [
        ("7", "Where is it?"),
        ("8", "谁？"),
    ]


def test_conversations_are_answered_before_their_last_answer(
    tiny_llama: Path, tmp_path: Path
) -> None:
    asked = [{"role": "user", "content": "Hi"}]
    answered = [*asked, {"role": "assistant", "content": "Hello"}]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"messages": answered}, {"messages": asked}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    predict.run(str(tiny_llama), str(source), output=output, settings=SHORT)
    first, second = read(output)
    assert first["messages"] == answered
    assert first["prediction"] == second["prediction"]
    assert set(first["prediction"]) == {"answer", "stopped"}


@pytest.fixture(scope="module")
def written(tiny_llama: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    predict.run(str(tiny_llama), str(chat_file), output=output, settings=SHORT)
    return output


@pytest.fixture
def whole(written: Path, tmp_path: Path) -> bytes:
    """A whole output; what it was made with lies where a test puts its own part of it."""
    shutil.copy(origin_path(written), origin_path(tmp_path / "out.jsonl"))
    return written.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.013, 0.4, 0.83, 0.9999, 1.0])
def test_a_resumed_file_equals_an_unbroken_one_wherever_it_was_torn(
    share: float, whole: bytes, tiny_llama: Path, chat_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(whole[: int(len(whole) * share)])
    kept = output.read_bytes().count(b"\n")
    if kept < 40:  # only whole batches are kept: answers depend on it in their last bits
        kept = kept // PREDICTORS["chat"].rows * PREDICTORS["chat"].rows
    result = predict.run(
        str(tiny_llama), str(chat_file), output=output, resume=True, settings=SHORT
    )
    assert output.read_bytes() == whole
    assert (result.num_kept, result.num_predicted) == (kept, 40 - kept)


def test_resumed_probabilities_equal_those_of_one_call_to_the_last_digit(
    classifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = dataclasses.replace(PREDICTORS["classification"], rows=16)
    monkeypatch.setitem(PREDICTORS, "classification", predictor)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"text": "where is the house " * (1 + number % 7)} for number in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    predict.run(classifier, str(source), output=output)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:27]) + lines[27][:30])
    result = predict.run(classifier, str(source), output=output, resume=True)
    assert output.read_bytes() == whole
    assert (result.num_kept, result.num_predicted) == (16, 24)


def test_a_column_of_another_name_is_mapped_by_an_option(
    tiny_llama: Path, classifier: str, tmp_path: Path
) -> None:
    source = tmp_path / "in.csv"
    source.write_text("question,topic\nWhere is it?,place\n", encoding="utf-8")
    with pytest.raises(DataError, match="no known format") as caught:
        predict.run(str(tiny_llama), str(source))
    assert caught.value.hint == (
        "it needs `messages`, or `conversations`, or `instruction`, or `prompt`; "
        "map the names of yours with `--column prompt=question`"
    )
    with pytest.raises(DataError, match="no column `text`") as caught:
        predict.run(classifier, str(source))
    assert "map another name with `--column text=" in str(caught.value.hint)


def test_resume_starts_where_there_is_no_output_yet(
    whole: bytes, tiny_llama: Path, chat_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    predict.run(str(tiny_llama), str(chat_file), output=output, resume=True, settings=SHORT)
    assert output.read_bytes() == whole


def test_an_existing_output_is_never_overwritten(
    tiny_llama: Path, chat_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match="never overwrite") as caught:
        predict.run(str(tiny_llama), str(chat_file), output=output)
    assert "--resume" in str(caught.value.hint)
    with pytest.raises(RunFolderError, match="1: is not a line that `fulltune predict` wrote"):
        predict.run(str(tiny_llama), str(chat_file), output=output, resume=True)
    assert output.read_text(encoding="utf-8") == "mine\n"


def test_resume_refuses_the_predictions_of_other_rows(
    whole: bytes, tiny_llama: Path, chat_file: Path, tmp_path: Path
) -> None:
    lines = chat_file.read_text(encoding="utf-8").splitlines(keepends=True)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    output.write_bytes(whole)
    source.write_text("".join([*lines[:2], *lines[3:]]), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"out.jsonl:3: is not the prediction of .*in.jsonl:3"):
        predict.run(str(tiny_llama), str(source), output=output, resume=True, settings=SHORT)
    source.write_text("".join(lines[:5]), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"out.jsonl:6: the input has only 5 rows"):
        predict.run(str(tiny_llama), str(source), output=output, resume=True)
    assert output.read_bytes() == whole


def test_a_row_that_cannot_be_read_leaves_the_rows_before_it_and_resume_goes_on(
    classifier: str, classification_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = dataclasses.replace(PREDICTORS["classification"], rows=10)
    monkeypatch.setitem(PREDICTORS, "classification", predictor)
    monkeypatch.setattr(predict, "ROWS_LOOKED_AT", 10)
    lines = classification_file.read_text(encoding="utf-8").splitlines(keepends=True)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join([*lines[:45], "{broken\n", *lines[46:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"in.jsonl:46"):
        predict.run(classifier, str(source), output=output)
    assert len(read(output)) == 40
    source.write_text("".join(lines), encoding="utf-8")
    predict.run(classifier, str(source), output=output, resume=True)
    assert len(read(output)) == len(lines)


def test_how_answers_are_generated_has_no_effect_on_a_classifier_and_is_refused(
    classifier: str, classification_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match="`--temperature 0\\.5` has no effect"):
        predict.run(
            classifier, str(classification_file), output=output,
            settings=GenerationSettings(temperature=0.5),
        )  # fmt: skip
    assert not output.exists()


def test_a_field_that_would_be_overwritten_is_an_error(classifier: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a", "prediction": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"in.jsonl:1: the row has a field `prediction` already"):
        predict.run(classifier, str(source), output=tmp_path / "out.jsonl")


def test_a_folder_that_is_not_there_is_named_before_anything_runs(
    classifier: str, classification_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunFolderError, match="there is no folder"):
        predict.run(classifier, str(classification_file), output=tmp_path / "no" / "out.jsonl")


def test_without_an_output_the_rows_go_to_stdout(
    classifier: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "你好"}\n', encoding="utf-8")
    predict.run(classifier, str(source))
    [line] = capfdbinary.readouterr().out.splitlines()
    assert json.loads(line)["text"] == "你好"


def test_resume_refuses_the_rows_of_another_model(
    whole: bytes, tiny_llama: Path, tiny_gpt2: Path, chat_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(whole[:-10])
    with pytest.raises(RunFolderError, match=r"were written by `.*llama.*`, and `.*gpt2") as caught:
        predict.run(str(tiny_gpt2), str(chat_file), output=output, resume=True, settings=SHORT)
    assert "--output" in str(caught.value.hint)
    assert output.read_bytes() == whole[:-10]  # not even the torn line is touched
    same = shutil.copytree(tiny_llama, tmp_path / "same model, other name")
    predict.run(str(same), str(chat_file), output=output, resume=True, settings=SHORT)
    assert output.read_bytes() == whole


def test_resume_refuses_the_rows_of_a_model_that_was_trained_on_since(
    classifier: str, classification_file: Path, tmp_path: Path
) -> None:
    model, output = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(classifier, model)
    predict.run(str(model), str(classification_file), output=output)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(RunFolderError, match="before its files changed"):
        predict.run(str(model), str(classification_file), output=output, resume=True)


def test_resume_refuses_rows_of_other_settings_and_names_them(
    whole: bytes, tiny_llama: Path, chat_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(whole[: len(whole) // 2])
    warm = GenerationSettings(max_new_tokens=4, temperature=0.7)
    message = r"other settings: `temperature` was 0\.0 and is now 0\.7$"
    with pytest.raises(RunFolderError, match=message):
        predict.run(str(tiny_llama), str(chat_file), output=output, resume=True, settings=warm)
    assert output.read_bytes() == whole[: len(whole) // 2]


def test_resume_refuses_rows_of_which_nothing_says_what_wrote_them(
    whole: bytes, tiny_llama: Path, chat_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(whole)
    origin_path(output).unlink()
    with pytest.raises(RunFolderError, match=r"out\.jsonl\.origin\.json`, which says"):
        predict.run(str(tiny_llama), str(chat_file), output=output, resume=True, settings=SHORT)
    origin_path(output).write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match="cannot be read"):
        predict.run(str(tiny_llama), str(chat_file), output=output, resume=True, settings=SHORT)
