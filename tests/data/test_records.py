from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from fulltune.data.records import (
    Record,
    read_records,
    source_fingerprint,
)
from fulltune.errors import DataError, MissingExtraError

ROWS = [{"text": "Où est Paris ?", "label": "lieu"}, {"text": "你好\nworld", "label": "greeting"}]


def as_csv(rows: list[dict[str, str]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def as_arrow(rows: list[dict[str, str]], new: Callable[..., Any]) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return bytes(sink.getvalue())


def as_parquet(rows: list[dict[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def as_jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


FILES = {
    ".jsonl": as_jsonl(ROWS),
    ".ndjson": as_jsonl(ROWS),
    ".json": json.dumps(ROWS, indent=2).encode(),
    ".csv": as_csv(ROWS),
    ".parquet": as_parquet(ROWS),
    ".arrow": as_arrow(ROWS, pa.ipc.new_stream),
    ".ipc": as_arrow(ROWS, pa.ipc.new_file),
    ".feather": as_arrow(ROWS, pa.ipc.new_file),
}


def written(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def fields(source: str) -> list[dict[str, Any]]:
    return [record.fields for record in read_records(source)]


def lines(source: str) -> list[str]:
    return [record.where.rpartition(":")[2] for record in read_records(source)]


def refusal(source: str) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_records(source))
    return caught.value


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", FILES)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, compression: str) -> None:
    content = FILES[suffix]
    if compression:
        codec = "gzip" if compression == ".gz" else "zstd"
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(content)
        content = bytes(sink.getvalue())
    assert fields(written(tmp_path / f"data{suffix}{compression}", content)) == ROWS


def test_a_record_says_where_it_stands(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert list(read_records(path)) == [
        Record({"a": 1}, f"{path}:1"),
        Record({"a": 2}, f"{path}:3"),
    ]
    assert lines(written(tmp_path / "a.csv", 'a,b\n1,"two\nlines"\n\n3,4\n')) == ["2", "5"]
    assert lines(written(tmp_path / "a.json", '[\n{"a": 1},\n{"a":\n 2}, {"a": 3}]')) == [
        "2",
        "3",
        "4",
    ]
    assert lines(written(tmp_path / "a.parquet", FILES[".parquet"])) == ["1", "2"]


def test_limit_stops_early(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": 1}\nthis line is never read')
    assert [record.fields for record in read_records(path, limit=1)] == [{"a": 1}]
    assert list(read_records(path, limit=0)) == []


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    assert fields(written(tmp_path / "a.jsonl", bom + b'{"a": "1"}\r\n')) == [{"a": "1"}]
    assert fields(written(tmp_path / "a.json", bom + b'[{"a": "1"}]')) == [{"a": "1"}]
    assert fields(written(tmp_path / "a.csv", bom + b"a\r\n1\r\n")) == [{"a": "1"}]
    assert fields(written(tmp_path / "a.tsv", bom + b"a\tb\r\n1\t2\r\n")) == [{"a": "1", "b": "2"}]
    assert fields(written(tmp_path / "a.txt", bom + b"a\r\nb")) == [{"text": "a\nb"}]


def test_a_csv_field_may_be_huge(tmp_path: Path) -> None:
    assert fields(written(tmp_path / "a.csv", "a\n" + "x" * 300_000 + "\n")) == [
        {"a": "x" * 300_000}
    ]


def test_a_tsv_takes_quotes_as_characters(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", 'text\tlabel\n"Not good\t0\nsay "x"\t1\n')
    assert fields(path) == [{"text": '"Not good', "label": "0"}, {"text": 'say "x"', "label": "1"}]


def test_json_may_hold_its_rows_under_data(tmp_path: Path) -> None:
    text = '{"version": [1, {"data": 2}], "data": [{"a": 1}, {"a": 2}], "end": null}'
    assert fields(written(tmp_path / "a.json", text)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_json_is_read_the_same_in_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("fulltune.data.json_rows._READ_BYTES", block)
    rows = [{"a": 'x\\"é\n]},{', "b": [1.5e3, -12, True, None, {}]}, {}, {"c": "  "}]
    text = json.dumps({"n": 1234.5, "t": True, "data": rows}, indent=1)
    assert fields(written(tmp_path / "a.json", text)) == rows
    error = refusal(written(tmp_path / "b.json", '[{"a": 1},\n {"a": tru}]'))
    assert f"{tmp_path}/b.json:2: not JSON: Expecting value" in str(error)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = written(tmp_path / "a.md", "one\n\ntwo\n")
    assert fields(path) == [{"text": "one\n\ntwo\n"}]


@pytest.mark.parametrize(
    "paragraph", ["word " * 2000 + "\n\n", "word " * 100 + "\n", "word ", "字"]
)
def test_a_long_text_is_cut_without_losing_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paragraph: str
) -> None:
    limit = 2**15
    monkeypatch.setattr("fulltune.data.plain_text.TEXT_DOCUMENT_CHARACTERS", limit)
    text = paragraph * (3 * limit // len(paragraph))
    records = list(read_records(written(tmp_path / "a.txt", text)))
    documents = [record.fields["text"] for record in records]
    assert "".join(documents) == text
    assert len(documents) >= 2
    assert all(len(document) <= 2 * limit for document in documents)
    if paragraph.endswith("\n"):
        assert all(document.endswith(paragraph) for document in documents)
    second_line = documents[0].count("\n") + 1
    assert records[1].where.endswith(f"a.txt:{second_line}")


def test_a_folder_is_all_its_data_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    written(tmp_path / "b.jsonl", '{"n": 2}')
    written(tmp_path / "a.csv", "n\n1\n")
    written(tmp_path / "sub" / "c.jsonl.gz", gzip.compress(b'{"n": 3}'))
    written(tmp_path / ".cache" / "d.jsonl", '{"n": 4}')
    written(tmp_path / "README.md", "not data")
    written(tmp_path / "model.bin", "not data")
    assert [record.where for record in read_records(f"{tmp_path}/")] == [
        f"{tmp_path}/a.csv:2",
        f"{tmp_path}/b.jsonl:1",
        f"{tmp_path}/sub/c.jsonl.gz:1",
    ]


def test_a_linked_folder_is_read_as_one_that_stands_there(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "sub").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    written(data / "a.jsonl", '{"n": 1}')
    written(elsewhere / "deep" / "b.jsonl", '{"n": 2}')
    (data / "link").symlink_to(elsewhere)
    assert [record.where for record in read_records(str(data))] == [
        f"{data}/a.jsonl:1",
        f"{data}/link/deep/b.jsonl:1",
    ]
    before = source_fingerprint(str(data))
    written(elsewhere / "deep" / "b.jsonl", '{"n": 3}')
    assert source_fingerprint(str(data)) != before


def test_links_in_a_circle_and_links_to_what_is_there_give_each_row_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    written(tmp_path / "sub" / "a.jsonl", '{"n": 1}')
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "sub" / "self").symlink_to(tmp_path / "sub" / "self")
    (tmp_path / "again").symlink_to(tmp_path / "sub")
    (tmp_path / "broken").symlink_to(tmp_path / "lost")
    assert [record.where for record in read_records(str(tmp_path))] == [f"{tmp_path}/sub/a.jsonl:1"]


def test_a_folder_of_texts_is_a_corpus(tmp_path: Path) -> None:
    written(tmp_path / "b.txt", "two")
    written(tmp_path / "a.md", "one")
    assert fields(str(tmp_path)) == [{"text": "one"}, {"text": "two"}]


def test_standard_input_is_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"a": 1}\n{"a": \n')))
    records = read_records("-")
    assert next(records) == Record({"a": 1}, "standard input:1")
    with pytest.raises(DataError, match="standard input:2: not JSON"):
        next(records)
    with pytest.raises(DataError, match="only once"):
        source_fingerprint("-")


def test_reading_holds_little_memory(tmp_path: Path) -> None:
    row = json.dumps({"text": "x" * 4000})
    sources = [
        written(tmp_path / "a.jsonl", f"{row}\n" * 5_000),
        written(tmp_path / "a.json", "[" + ",".join([row] * 5_000) + "]"),
        written(tmp_path / "a.csv", "text\n" + ("x" * 4000 + "\n") * 5_000),
    ]
    for source in sources:
        tracemalloc.start()
        assert sum(1 for _ in read_records(source)) == 5_000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 6 * 2**20, source  # the file has 20 MB


# Errors


def test_a_missing_file_names_files_like_it(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", "{}")
    error = refusal(f"{tmp_path}/trian.jsonl")
    assert str(error) == f"`{tmp_path}/trian.jsonl` does not exist"
    assert error.hint == f"did you mean `{tmp_path}/train.jsonl`?"
    error = refusal(f"{tmp_path}/questions.csv")
    assert error.hint == f"looked in `{tmp_path}`; data files there: `train.jsonl`"
    error = refusal(f"{tmp_path}/dta/train.jsonl")
    assert str(error).endswith(f"does not exist, nor does its folder `{tmp_path}/dta`")
    assert error.hint == f"`{tmp_path}` is the nearest folder that does"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n \n"),
        ("a.json", ""),
        ("a.json", "[]"),
        ("a.csv", ""),
        ("a.csv", "text,label\n"),
        ("a.tsv", ""),
        ("a.txt", " \n"),
    ],
)
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    error = refusal(written(tmp_path / name, content))
    assert str(error) == f"`{tmp_path}/{name}` is empty: it holds no records"


def test_a_malformed_line_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": 1}\n' * 16 + '{"text": "good" "label": 1}\n')
    error = refusal(path)
    assert str(error) == (
        f"{path}:17: not JSON: Expecting ',' delimiter at column 17, "
        'near `{"text": "good" "label": 1}`'
    )
    assert error.hint == "JSON Lines holds one whole object on each line"
    cut_off = refusal(written(tmp_path / "d.jsonl", '{"a": 1}\n{"a": [1\n{"a": 1}\n'))
    assert "d.jsonl:2: not JSON: Expecting ',' delimiter at column 9" in str(cut_off)
    assert "not readable as JSON" in str(refusal(written(tmp_path / "b.jsonl", "[" * 100_000)))
    assert "4300" in str(refusal(written(tmp_path / "c.jsonl", '{"a": ' + "1" * 5000 + "}")))


def test_a_line_that_is_no_object_is_refused(tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "a.jsonl", '{"a": 1}\n["a", 1]\n'))
    assert str(error) == (
        f'{tmp_path}/a.jsonl:2: a record must be an object with named fields, not `["a", 1]`'
    )
    assert "not `null`" in str(refusal(written(tmp_path / "b.jsonl", "null\n")))


def test_json_of_another_shape_is_refused(tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n'))
    assert str(error) == f"`{tmp_path}/a.json` holds one object (`a`), not a list of records"
    assert error.hint
    assert "one object a line is .jsonl" in error.hint
    error = refusal(written(tmp_path / "b.json", '[{"a": 1}'))
    assert "b.json:1: not JSON: `,` or `]` expected, found the end of the file" in str(error)
    error = refusal(written(tmp_path / "c.json", '[{"a": 1}]\n[]'))
    assert "c.json:2: something follows the end" in str(error)
    error = refusal(written(tmp_path / "d.json", "[\n1]"))
    assert "d.json:2: a record must be an object" in str(error)


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("a.jsonl", '{"a": 1}\n'),
        ("a.csv", "a\n"),
        ("a.tsv", "a\n"),
        ("a.txt", "a\n"),
        ("a.json", "[\n"),
    ],
)
def test_another_encoding_is_named_by_line_and_byte(tmp_path: Path, name: str, before: str) -> None:
    path = written(tmp_path / name, before.encode() + '{"a": "é"}\n'.encode("latin-1"))
    error = refusal(path)
    assert str(error) == f"{path}:2: not UTF-8: byte 8 is 0xe9"
    assert error.hint
    assert f"iconv -f ENCODING -t UTF-8 {path} > utf8-{name}" in error.hint
    assert "WINDOWS-1252 (Western) or GB18030 (Chinese Excel)" in error.hint


@pytest.mark.parametrize(
    ("encoding", "text", "guess"),
    [
        ("gb18030", "问题,答案", "GB18030"),
        ("gbk", "今天天气很好，我们去公园散步。,正面", "GB18030"),
        ("big5", "今天天氣很好，我們去公園散步。", "BIG5"),
        ("shift_jis", "今日はとてもいい天気です。", "SHIFT_JIS"),
        ("cp1252", "Où est passé l'été déjà à Orléans ?", None),
        ("cp1252", "Die Größe über dem Äußeren", None),
        ("cp1251", "Сегодня очень хорошая погода", None),
    ],
)
def test_an_encoding_is_guessed_only_where_the_line_reads_well_in_it(
    tmp_path: Path, encoding: str, text: str, guess: str | None
) -> None:
    path = written(tmp_path / "a.csv", f"a\n{text}\n".encode(encoding))
    hint = refusal(path).hint
    assert hint
    assert f"iconv -f {guess or 'ENCODING'} -t UTF-8" in hint


def test_utf_16_is_recognised(tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "a.jsonl", '{"a": 1}\n'.encode("utf-16")))
    assert str(error).endswith("a.jsonl:1: not UTF-8: it begins like UTF-16")
    assert error.hint
    assert "-f UTF-16" in error.hint


def test_csv_rows_must_fit_the_header(tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "a.csv", "text,label\na,1\nb, c,1\n"))
    assert str(error) == (f"{tmp_path}/a.csv:3: 3 columns, but the header has 2 (`text`, `label`)")
    assert ":2: 1 columns" in str(refusal(written(tmp_path / "b.tsv", "text\tlabel\na\n")))
    error = refusal(written(tmp_path / "c.csv", "text,text\na,1\n"))
    assert str(error) == f"{tmp_path}/c.csv:1: the header names `text` more than once"
    error = refusal(written(tmp_path / "d.csv", 'text\na\n"never closed\nb\n'))
    assert "d.csv:3: not CSV: unexpected end of data" in str(error)


def test_an_unknown_suffix_lists_the_known(tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "a.xlsx", "x"))
    assert str(error) == f"`{tmp_path}/a.xlsx`: the suffix `.xlsx` is not a known data format"
    assert error.hint
    assert error.hint.startswith("known are .jsonl, .ndjson, .json, .csv, .tsv, .parquet")
    assert "holds no data file" in str(refusal(str(tmp_path)))
    assert "data is read from files" in str(refusal("https://example.org/a.jsonl"))


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, codec: str) -> None:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(as_jsonl([{"n": n * n} for n in range(10_000)]))
    whole = bytes(sink.getvalue())
    name = "a.jsonl.gz" if codec == "gzip" else "a.jsonl.zst"
    for content in (whole[: len(whole) // 2], b"no compressed file at all"):
        error = refusal(written(tmp_path / name, content))
        assert str(error).startswith(f"`{tmp_path}/{name}` is not a whole {codec} file: ")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".ipc", ".feather"])
def test_a_damaged_table_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = FILES[suffix]
    for content in (whole[:-20], b"nothing of the kind"):
        error = refusal(written(tmp_path / f"a{suffix}", content))
        assert str(error).startswith(f"`{tmp_path}/a{suffix}` is not a whole file of its format: ")


# Fingerprints


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    one = written(tmp_path / "a.jsonl", '{"a": 1}')
    same = written(tmp_path / "b.jsonl", '{"a": 1}')
    other = written(tmp_path / "c.jsonl", '{"a": 2}')
    assert source_fingerprint(one) == source_fingerprint(same) != source_fingerprint(other)
    for folder, content in (("x", "1"), ("y", "1"), ("z", "2")):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder / "a.jsonl", content)
    x, y, z = (source_fingerprint(str(tmp_path / folder)) for folder in "xyz")
    assert x == y != z


# The `datasets` package


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="`hub:owner/name`") as caught:
        list(read_records("hub:owner/name"))
    assert caught.value.hint == "pip install 'fulltune[hub]'"


def test_a_saved_data_set_is_read_with_its_label_names(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.disable_progress_bars()
    data.save_to_disk(tmp_path / "one")
    source = f"{tmp_path}/one"
    assert fields(source) == [
        {"text": "a", "label": "yes"},
        {"text": "b", "label": "no"},
        {"text": "c", "label": None},
    ]
    assert lines(source) == ["1", "2", "3"]
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    error = refusal(f"{tmp_path}/two")
    assert error.hint == f"name one: `{tmp_path}/two/test`, `{tmp_path}/two/train`"
    assert source_fingerprint(f"{tmp_path}/two/train") == source_fingerprint(source)


def test_a_hub_data_set_that_cannot_be_reached_is_a_data_error() -> None:
    pytest.importorskip("datasets")
    error = refusal("hub:no-such-owner/no-such-name:test")
    assert str(error).startswith("`hub:no-such-owner/no-such-name:test` cannot be loaded: ")
    assert error.hint == "the form is `hub:OWNER/NAME` or `hub:OWNER/NAME:SPLIT`"
