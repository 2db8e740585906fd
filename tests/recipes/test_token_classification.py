"""A tagger from rows to a folder that transformers reads, and what it says of new texts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForTokenClassification, pipeline

from fulltune.config import Quantity, build_config
from fulltune.errors import ConfigError, DataError
from fulltune.recipes import evaluate, finetune, predict, preview
from tests.conftest import COLOURS, PLACES

LABELS = ["O", "B-COLOUR", "I-COLOUR", "B-PLACE", "I-PLACE"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tags_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 sentences in BIOES with places of one and two words and colours, some in Chinese."""
    path = tmp_path_factory.mktemp("tags") / "tags.jsonl"
    rows = []
    for number in range(128):
        place, colour = PLACES[number % 8], COLOURS[number // 8 % 4]
        if number % 4 == 3:
            words = [*"法国的首都是", place, *"，今天", colour, "！"]
            tags = ["B-PLACE", "E-PLACE", *"OOOO", "S-PLACE", *"OOO", "S-COLOUR", "O"]
        else:
            city = [place, "city"] if number % 2 else [place]
            words = ["the", colour, "house", str(number // 32), "in", *city, "is", "where"]
            of_city = ["B-PLACE", "E-PLACE"] if number % 2 else ["S-PLACE"]
            tags = ["O", "S-COLOUR", "O", "O", "O", *of_city, "O", "O"]
        rows.append({"tokens": words, "ner_tags": tags})
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def config_of(model: Path, data: Path, folder: Path, **settings: Any) -> finetune.Config:
    values = {
        "model": str(model),
        "task": {
            "kind": "token_classification", "train": str(data), "validation": "24 examples",
            **settings,
        },
        "duration": "60 steps",
        "batch": "16 examples",
        "precision": "fp32",
        "optimizer": {"lr": 5e-3, "head_lr": 1e-2},
        "evaluate": {"every": "30 steps"},
        "num_workers": 0,
        "run_dir": str(folder),
    }  # fmt: skip
    return build_config(finetune.Config, values)


@pytest.fixture(scope="session")
def run_folder(tiny_bert: Path, tags_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        folder = tmp_path_factory.mktemp("runs") / "tagger"
        result = finetune.run(config_of(tiny_bert, tags_file, folder))
        assert result.metrics["span_f1"] > 0.95  # every entity is of a few known words
        assert set(result.metrics) == {
            "span_f1", "span_precision", "span_recall", "tag_accuracy", "loss",
        }  # fmt: skip
    return folder


def predict_rows(model: Path, rows: list[dict[str, Any]], tmp_path: Path, **options: Any) -> Any:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    source.write_text("".join(lines), encoding="utf-8")
    predict.run(str(model), str(source), output=output, **options)
    written = output.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prediction"] for line in written]


def test_entities_of_a_text_are_found_with_their_places(run_folder: Path, tmp_path: Path) -> None:
    texts = ["the red house 1 in Rome city is where", "法国的首都是Lima，今天green！"]
    for text, found in zip(
        texts, predict_rows(run_folder, [{"text": t} for t in texts], tmp_path), strict=True
    ):
        assert len(found["tags"]) == len(found["words"])
        for entity in found["entities"]:
            assert text[entity["start"] : entity["end"]] == entity["text"]
            assert 0.5 < entity["probability"] <= 1
        places = [each["text"] for each in found["entities"] if each["label"] == "PLACE"]
        colours = [each["text"] for each in found["entities"] if each["label"] == "COLOUR"]
        expected = (["Rome city"], ["red"]) if "Rome" in text else (["法国", "Lima"], ["green"])
        assert (places, colours) == expected


def test_entities_of_words_count_words(run_folder: Path, tmp_path: Path) -> None:
    words = ["the", "blue", "house", "2", "in", "Oslo", "city", "is", "where"]
    (found,) = predict_rows(run_folder, [{"words": words}], tmp_path)
    assert found["tags"] == ["O", "B-COLOUR", "O", "O", "O", "B-PLACE", "I-PLACE", "O", "O"]
    assert [(e["text"], e["start"], e["end"]) for e in found["entities"]] == [
        ("blue", 1, 2), ("Oslo city", 5, 7),
    ]  # fmt: skip
    assert "words" not in found


def test_a_text_is_cut_as_the_words_of_training_were(
    run_folder: Path, tiny_bert: Path, tags_file: Path, tmp_path: Path
) -> None:
    text = "the red, house"
    (found,) = predict_rows(run_folder, [{"text": text}], tmp_path)
    assert found["words"] == ["the", "red", ",", "house"]
    glued = tmp_path / "glued.jsonl"
    rows = [json.loads(line) for line in tags_file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["tokens"] = [f"{word}," if word == "house" else word for word in row["tokens"]]
    glued.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = config_of(tiny_bert, glued, tmp_path / "run")
    short = config.model_copy(update={"duration": Quantity(1, "steps")})
    finetune.run(short)
    (tmp_path / "again").mkdir()
    (found,) = predict_rows(tmp_path / "run" / "model", [{"text": text}], tmp_path / "again")
    assert found["words"] == ["the", "red,", "house"]


def test_words_that_truncation_cut_off_have_no_tag(run_folder: Path, tmp_path: Path) -> None:
    words = ["the", "blue", "house"] * 60
    (found,) = predict_rows(run_folder, [{"words": words}], tmp_path, too_long="truncate")
    assert (len(found["tags"]), found["tags"].count(None)) == (180, 54)
    (tmp_path / "again").mkdir()
    with pytest.raises(DataError, match=r"in.jsonl:1"):
        predict_rows(run_folder, [{"words": words}], tmp_path / "again")


def test_plain_transformers_gives_the_same_entities(run_folder: Path, tmp_path: Path) -> None:
    folder = run_folder / "model"
    model = AutoModelForTokenClassification.from_pretrained(folder)
    assert [model.config.id2label[index] for index in range(5)] == LABELS
    tagger = pipeline(
        "token-classification", model=str(folder), aggregation_strategy="first", device="cpu"
    )
    texts = [
        f"the {colour} house 3 in {place} is where, and {place} city" for colour, place in
        zip(COLOURS * 2, PLACES, strict=True)
    ]  # fmt: skip
    found = predict_rows(run_folder, [{"text": text} for text in texts], tmp_path)
    for text, ours in zip(texts, found, strict=True):
        theirs = [(e["entity_group"], e["start"], e["end"]) for e in tagger(text)]
        assert [(e["label"], e["start"], e["end"]) for e in ours["entities"]] == theirs


def test_evaluation_measures_the_run_again_and_other_rows(
    run_folder: Path, tags_file: Path
) -> None:
    again = evaluate.run(str(run_folder))
    assert again.metrics["span_f1"] > 0.95
    assert set(again.details["per_label"]) == {"COLOUR", "PLACE"}
    other = evaluate.run(str(run_folder / "model"), data=str(tags_file))
    assert other.num_examples == 128
    assert other.metrics["tag_accuracy"] > 0.95


def test_the_preview_marks_entities_and_counts_tags(
    tiny_bert: Path, tags_file: Path, tmp_path: Path
) -> None:
    output = io.StringIO()
    console = Console(file=output, width=160, no_color=True)
    page = tmp_path / "preview.html"
    assert preview.run(
        config_of(tiny_bert, tags_file, tmp_path / "run"), console=console, html=page
    )
    shown = output.getvalue()
    assert "the ⟦red/COLOUR⟧ house" in shown
    assert "/PLACE⟧" in shown
    assert "entity: a tag is trained at the first token of each word" in shown
    assert "B-PLACE" in shown
    assert 'class="entity"' in page.read_text(encoding="utf-8")


def test_tags_that_only_validation_has_stop_the_run(
    tiny_bert: Path, tags_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"words": ["Rome", "x"], "tags": ["B-NEW", "I-NEW"]}\n', encoding="utf-8")
    config = config_of(tiny_bert, tags_file, tmp_path / "run", validation=str(other))
    with pytest.raises(DataError, match="`validation` has labels that `train` does not: `B-NEW`"):
        finetune.run(config)


def test_settings_of_other_kinds_are_refused(
    tiny_bert: Path, tags_file: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_bert, tags_file, tmp_path / "run")
    with pytest.raises(ConfigError, match="`z_loss` has no effect"):
        finetune.run(config.model_copy(update={"z_loss": 0.1}))
    task = config.task.model_copy(update={"kind": "classification", "tag_scheme": "iob1"})
    with pytest.raises(ConfigError, match=r"`task.tag_scheme` has no effect"):
        finetune.run(config.model_copy(update={"task": task}))
