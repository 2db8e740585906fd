"""Rows of words with tags and of texts with spans become examples, or an error with their line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fulltune.data.formats import make_example, recognise_format
from fulltune.data.records import Record, read_records
from fulltune.data.tasks import TaggingExample, TaskConfig
from fulltune.errors import ConfigError, DataError


def read(*rows: dict[str, Any], needs_label: bool = True, **settings: Any) -> list[TaggingExample]:
    config = TaskConfig(kind="token_classification", train="a.jsonl", **settings)
    records = [Record(row, f"a.jsonl:{line}") for line, row in enumerate(rows, start=1)]
    layout = recognise_format(records, config, needs_label=needs_label)
    examples = [
        make_example(record, layout, kind=config.kind, needs_label=needs_label)
        for record in records
    ]
    assert all(isinstance(example, TaggingExample) for example in examples)
    return examples  # type: ignore[return-value]


WORDS = ["Ada", "saw", "Rome"]


@pytest.mark.parametrize(
    "row",
    [
        {"words": WORDS, "tags": ["B-PER", "O", "B-LOC"]},
        {"tokens": WORDS, "ner_tags": ["B-PER", "O", "B-LOC"]},
        {"tokens": WORDS, "tags": ["S-PER", "O", "S-LOC"], "id": 3},
        {"text": "Ada saw Rome", "spans": [{"start": 0, "end": 3, "label": "PER"}, [8, 12, "LOC"]]},
        {"text": "Ada saw Rome", "entities": [[8, 12, "LOC"], [0, 3, "PER"]]},
    ],
)
def test_every_layout_gives_the_same_words_and_tags(row: dict[str, Any]) -> None:
    (example,) = read(row)
    assert example.words == tuple(WORDS)
    assert example.tags == ("B-PER", "O", "B-LOC")
    assert example.spaces == (False, True, True)


def test_own_columns_and_a_scheme_that_is_set_are_used() -> None:
    row = {"chars": list("张三在北京"), "ner": ["I-PER", "I-PER", "O", "I-LOC", "I-LOC"]}
    columns = {"words": "chars", "tags": "ner"}
    (example,) = read(row, columns=columns, tag_scheme="iob1")
    assert example.tags == ("B-PER", "I-PER", "O", "B-LOC", "I-LOC")
    with pytest.raises(DataError, match=r"a.jsonl:1: word 1: the tag `I-PER` is the first"):
        read(row, columns=columns, tag_scheme="iob2")


def test_the_scheme_is_said_with_the_layout() -> None:
    config = TaskConfig(kind="token_classification", train="a.jsonl")
    record = Record({"tokens": WORDS, "tags": ["S-PER", "O", "S-LOC"]}, "a.jsonl:1")
    assert "tags are BIOES" in recognise_format([record], config).description


def test_prediction_needs_words_or_a_text_alone() -> None:
    assert read({"tokens": WORDS}, needs_label=False)[0].tags is None
    (example,) = read({"text": "In Rome."}, needs_label=False)
    assert (example.words, example.places) == (("In", "Rome", "."), ((0, 2), (3, 7), (7, 8)))
    # What a test set holds of tags, whatever it is, is not looked at.
    assert read({"words": WORDS, "tags": []}, needs_label=False)[0].tags is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": WORDS, "tags": ["O", "O"]}, r"a.jsonl:2: 3 words but 2 tags"),
        ({"words": WORDS, "tags": [["O"], ["O"], ["O"]]}, r"several tags for word 1: nested"),
        ({"words": WORDS, "tags": [0, 0, 3]}, r"holds the number 0.*not known"),
        ({"words": WORDS, "tags": ["O", None, "O"]}, r"tag 2 of field `tags` is null"),
        ({"words": WORDS, "tags": "O O O"}, r"field `tags` must be a list of texts, not a text"),
        ({"words": ["Ada", "", "x"], "tags": ["O"] * 3}, r"word 2 of field `words` is empty"),
        ({"words": [], "tags": []}, r"field `words` holds no word"),
        ({"words": WORDS, "tags": ["O", "I-X", "O"]}, r"a.jsonl:2: word 2: the tag `I-X` follows"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read({"words": ["Oslo"], "tags": ["B-X"]}, row)
    assert caught.value.hint or "null" in message or "empty" in message or "not a text" in message


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([{"start": 0, "end": 3}], r"a.jsonl:1: a span has no `label`; it has `start`, `end`"),
        ([{"start": 0, "end": "3", "label": "PER"}], r"whole numbers"),
        (["0-3"], r"a.jsonl:1: a span is '0-3'"),
        ("0-3", r"field `spans` must be a list of spans, not a text"),
        ([[0, 3, "PER"], [0, 7, "X"]], r"lies inside of"),
    ],
)
def test_wrong_spans_are_named_by_their_line(spans: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read({"text": "Ada saw Rome", "spans": spans})


def test_a_scheme_for_spans_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`task.tag_scheme` has no effect on spans"):
        read({"text": "Ada", "spans": []}, tag_scheme="iob2")


CONLL = "-DOCSTART- -X- O\n\nAda NNP S-PER\nsaw VBD O\n\n\n法 NNP B-LOC\n国 NNP E-LOC\n"


def test_a_conll_file_is_read_by_sentences(tmp_path: Path) -> None:
    file = tmp_path / "train.conll"
    file.write_text(CONLL, encoding="utf-8")
    records = list(read_records(str(file)))
    assert [record.where for record in records] == [f"{file}:3", f"{file}:7"]
    examples = read(*(record.fields for record in records))
    assert [example.words for example in examples] == [("Ada", "saw"), ("法", "国")]
    assert [example.tags for example in examples] == [("B-PER", "O"), ("B-LOC", "I-LOC")]
    file.write_text(CONLL + "京\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train.conll:9: 1 columns, but line 3 has 3"):
        list(read_records(str(file)))


def test_numbers_of_a_saved_data_set_are_read_by_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["O", "B-PER"])
    features = {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)}
    table = {"tokens": [["Ada", "saw"]], "ner_tags": [[1, 0]]}
    datasets.Dataset.from_dict(table, datasets.Features(features)).save_to_disk(tmp_path / "saved")
    (record,) = read_records(str(tmp_path / "saved"))
    assert read(record.fields)[0].tags == ("B-PER", "O")
