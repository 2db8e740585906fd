"""A corpus from raw text: whole, equal for any number of processes, and resumable after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from fulltune.config import build_config, dump_config
from fulltune.data.records import read_records
from fulltune.errors import ConfigError, DataError, FulltuneError, RunFolderError
from fulltune.recipes import corpus, finetune
from fulltune.train.run_folder import locked

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "tu", "se") for b in ("ra", "do", "ni", "p", "st")]
CHARACTERS = "天地人你我他山水花草树木春夏秋冬东南西北大小多少高低"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def make_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    english = [" ".join(draw.choices(WORDS, k=30)) for _ in range(count // 2)]
    return english + ["".join(draw.choices(CHARACTERS, k=40)) for _ in range(count - count // 2)]


def write_rows(path: str, texts: list[str]) -> str:
    rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    Path(path).write_text("".join(rows), encoding="utf-8")
    return path


def make_config(**changes: Any) -> corpus.Config:
    return build_config(
        corpus.Config, {"sources": "raw.jsonl", "output": "out", "num_workers": 0} | changes
    )


def contents(folder: str) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def stages(manifest: dict[str, Any]) -> dict[str, int]:
    return {stage["name"]: stage["removed"]["documents"] for stage in manifest["stages"]}


def test_a_corpus_counts_and_names_all_that_it_removed() -> None:
    texts = make_texts(60)
    leaked = texts[3].split()[5:20]
    write_rows("evaluation.jsonl", ["what is " + " ".join(leaked)])
    write_rows(
        "raw.jsonl",
        [
            *texts,
            texts[0].upper(),
            texts[40] + "。",
            texts[1] + " end",
            "",
            "ab",
            texts[2] + " \r\n",
        ],
    )
    config = make_config(
        length={"min_characters": 5},
        near_duplicates={"threshold": 0.8},
        decontaminate={"against": ["evaluation.jsonl"]},
        validation="10%",
    )
    manifest = corpus.run(config).manifest
    assert stages(manifest) == {
        "binary": 0, "cleaning": 0, "length": 2, "exact duplicates": 2, "near duplicates": 2,
        "evaluation data": 1,
    }  # fmt: skip
    by_name = {stage["name"]: stage for stage in manifest["stages"]}
    assert by_name["cleaning"]["changed"] == 1
    assert by_name["length"]["examples"] == ["raw.jsonl:64", "raw.jsonl:65"]
    assert by_name["exact duplicates"]["examples"][0] == "raw.jsonl:61 (like raw.jsonl:1)"
    assert by_name["near duplicates"]["examples"] == [
        "raw.jsonl:62 (like raw.jsonl:41)", "raw.jsonl:63 (like raw.jsonl:2)"
    ]  # fmt: skip
    assert by_name["evaluation data"]["reasons"] == {"evaluation.jsonl": 1}
    train = [record.fields for record in read_records("out/train")]
    validation = [record.fields for record in read_records("out/validation/validation-00000.arrow")]
    kept = [text for text in texts if text != texts[3]]
    assert sorted(row["text"] for row in train + validation) == sorted(kept)
    for row in train + validation:
        number = texts.index(row["text"]) + 1
        assert row == {**row, "source": "raw.jsonl", "where": f"raw.jsonl:{number}"}
    assert 0 < len(validation) < 20
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            data = Path("out", shard["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]
    assert contents("out").keys() == {
        "manifest.json", "train/train-00000.arrow", "validation/validation-00000.arrow"
    }  # fmt: skip


def test_documents_and_bytes_add_up_over_many_shards() -> None:
    write_rows("raw.jsonl", make_texts(400))
    manifest = corpus.run(make_config(shard_bytes=5000, validation="5%")).manifest
    shards = manifest["splits"]["train"]["shards"]
    assert len(shards) > 5
    assert all(5000 <= shard["bytes"] < 5300 for shard in shards[:-1])
    held = sum(split["bytes"] for split in manifest["splits"].values())
    assert held == manifest["read"]["bytes"]
    assert len(list(read_records("out/train"))) == manifest["splits"]["train"]["documents"]


def test_the_split_follows_the_document_and_not_its_place() -> None:
    texts = make_texts(200)
    for name, rows in (("a", texts), ("b", texts[::-1])):
        write_rows("raw.jsonl", rows)
        corpus.run(make_config(output=name, validation="10%"))
    sides = [{r.fields["text"] for r in read_records(f"{name}/validation")} for name in "ab"]
    assert sides[0] == sides[1]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_number_of_processes_changes_no_byte(num_workers: int) -> None:
    texts = make_texts(9000)
    write_rows("raw.jsonl", texts + [text + " end" for text in texts[:50]])
    settings: dict[str, Any] = {"near_duplicates": {"threshold": 0.8, "permutations": 32}}
    corpus.run(make_config(output="one", **settings))
    corpus.run(make_config(output="other", num_workers=num_workers, **settings))
    assert contents("one") == contents("other")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(here: Path) -> None:
    texts = make_texts(24_000)
    write_rows("raw.jsonl", texts + [text + " end" for text in texts[:100]])
    settings: dict[str, Any] = {"near_duplicates": {"threshold": 0.8}, "shard_bytes": 20_000}
    corpus.run(make_config(output="whole", **settings))
    Path("c.yaml").write_text(dump_config(make_config(num_workers=2, **settings)))
    command = [sys.executable, "-m", "fulltune", "corpus", "c.yaml", "--resume"]
    num_killed = 0
    for pattern, wanted in (("chunk-*.arrow", 1), ("chunk-*.arrow", 4), ("finished/train/*", 5)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if len(list(Path("out/.working").glob(pattern))) >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        num_killed += process.wait() == -signal.SIGKILL
    assert num_killed >= 2
    assert not Path("out/manifest.json").exists()
    assert list(Path("out/.working").glob("finished/train/*"))
    with pytest.raises(RunFolderError, match="unfinished corpus"):
        corpus.run(make_config(**settings))
    with pytest.raises(RunFolderError, match="differs in `seed`"):
        corpus.run(make_config(seed=5, **settings), resume=True)
    corpus.run(make_config(**settings), resume=True)
    assert contents("out") == contents("whole")


def test_ctrl_c_keeps_the_finished_chunks_and_says_so() -> None:
    write_rows("raw.jsonl", make_texts(24_000))
    Path("c.yaml").write_text(
        dump_config(make_config(num_workers=2, near_duplicates={"threshold": 0.8}))
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "fulltune", "corpus", "c.yaml"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not list(Path("out/.working").glob("chunk-*.arrow")):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert b"Traceback" not in said
    assert b"go on with `--resume`" in said
    assert list(Path("out/.working").glob("chunk-*.arrow"))


def test_no_other_folder_is_written_into(here: Path) -> None:
    write_rows("raw.jsonl", make_texts(50))
    corpus.run(make_config())
    before = contents("out")
    with (
        locked(Path("busy"), doing="preparing a corpus", setting="output"),
        pytest.raises(RunFolderError, match="another process is preparing a corpus in `busy`"),
    ):
        corpus.run(make_config(output="busy"))
    with pytest.raises(RunFolderError, match="holds a finished corpus"):
        corpus.run(make_config())
    assert corpus.run(make_config(num_workers=2), resume=True).already_finished
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(RunFolderError, match="holds no corpus"):
            corpus.run(make_config(output="mine"), resume=resume)
    assert contents("out") == before
    assert os.listdir("mine") == ["notes.txt"]


def test_a_finished_corpus_is_not_taken_for_one_of_sources_that_changed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("raw").mkdir()
    write_rows("raw/a.jsonl", make_texts(20))
    write_rows("evaluation.jsonl", [" ".join(WORDS)])
    config = make_config(sources="raw", decontaminate={"against": ["evaluation.jsonl"]})
    corpus.run(config)
    assert corpus.run(config, resume=True).already_finished
    write_rows("raw/b.jsonl", make_texts(2, seed=1))  # another file
    with pytest.raises(RunFolderError, match="`raw` has changed since the corpus in `out`"):
        corpus.run(config, resume=True)
    Path("raw/b.jsonl").unlink()
    write_rows("raw/a.jsonl", make_texts(20, seed=1))  # as large, with other content
    with pytest.raises(RunFolderError, match="`raw` has changed"):
        corpus.run(config, resume=True)
    write_rows("raw/a.jsonl", make_texts(20))
    write_rows("evaluation.jsonl", [" ".join(WORDS[::-1])])
    with pytest.raises(RunFolderError, match=r"`evaluation\.jsonl` has changed"):
        corpus.run(config, resume=True)
    write_rows("evaluation.jsonl", [" ".join(WORDS)])
    Path("raw/a.jsonl").unlink()  # raw text may be deleted once it is prepared
    capsys.readouterr()
    assert corpus.run(config, resume=True).already_finished
    assert "whether `raw` has changed since the corpus was made is not known" in (
        capsys.readouterr().err
    )


def test_a_source_that_changed_is_not_mixed_with_finished_chunks() -> None:
    write_rows("raw.jsonl", [*make_texts(5000), "bad \x00\x00\x00\x00"])
    with pytest.raises(DataError, match=r"raw\.jsonl:5001: .* this is no text"):
        corpus.run(make_config(binary="error"))
    write_rows("raw.jsonl", make_texts(5000))
    with pytest.raises(RunFolderError, match=r"`raw\.jsonl` has changed"):
        corpus.run(make_config(binary="error"), resume=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_documents_that_are_no_text_are_left_out_and_counted(
    num_workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_texts(30)
    rows = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    bad = [
        b'{"text": "caf\xe9 au lait"}',
        '{"text": "中文'.encode() + b'\xff"}',
        b"\x00" * 64,
        b'{"text": "one raw \x00 among many good characters, which is not JSON"}',
        b'{"text": "\\u0000\\u0001\\u0002abc"}',
        b'{"text": "half a character \\ud83d"}',
        b'{"te\xfft": "a damaged name of a column"}',
        b"\xff\xfe\xfd{",
    ]
    Path("raw.jsonl").write_bytes(b"\n".join([rows[0], *bad, *rows[1:]]) + b"\n")
    manifest = corpus.run(make_config(num_workers=num_workers)).manifest
    binary = manifest["stages"][0]
    assert binary["name"] == "binary"
    assert binary["removed"]["documents"] == len(bad)
    assert binary["reasons"] == {
        "not UTF-8": 4, "control characters": 3, "half a character": 1
    }  # fmt: skip
    assert binary["examples"] == ["raw.jsonl:2", "raw.jsonl:3"]
    assert manifest["read"]["documents"] == 38
    kept = [
        row.fields["text"] for side in manifest["splits"] for row in read_records(f"out/{side}")
    ]
    assert sorted(kept) == sorted(texts)
    assert "8 documents are no text and left out" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"raw\.jsonl:2: not UTF-8: byte 14 is 0xe9"):
        corpus.run(make_config(output="strict", binary="error"))


@pytest.mark.parametrize("name", ["raw.jsonl", "raw.json"])
def test_half_an_emoji_is_told_from_a_byte_that_is_not_utf8(name: str) -> None:
    texts = make_texts(20)
    # The second halves of most characters look like escaped bytes once they are read.
    bad = [r"the second half: \udca9", r"a backslash before it: \\\udca9", "caf\xe9 and \\ude00"]
    good = [r"whole: \ud83d\udca9", r"its name: \\udca9"]
    rows = [json.dumps({"text": text}) for text in texts]
    rows += [f'{{"text": "{text}"}}' for text in (*good, *bad)]
    content = "\n".join(rows) if name == "raw.jsonl" else f"[{','.join(rows)}]"
    Path(name).write_bytes(content.encode("latin-1"))
    manifest = corpus.run(make_config(sources=name)).manifest
    assert manifest["stages"][0]["reasons"] == {"half a character": 2, "not UTF-8": 1}
    kept = [
        row.fields["text"] for side in manifest["splits"] for row in read_records(f"out/{side}")
    ]
    assert sorted(kept) == sorted([*texts, "whole: \N{PILE OF POO}", r"its name: \udca9"])


@pytest.mark.parametrize("name", ["raw.csv", "raw.tsv", "raw.txt", "raw.parquet", "raw.arrow"])
def test_a_row_that_is_no_text_is_left_out_of_every_format(name: str) -> None:
    texts = make_texts(20)
    values = [text.encode() for text in texts]
    values.insert(3, b"broken \xff\xfe text")
    values.insert(6, b'binary "\x00\xff, and\x80' if name == "raw.csv" else b"\x00\x01\x02\xff")
    if name in ("raw.parquet", "raw.arrow"):
        column = pa.array(values, pa.binary()).cast(pa.large_binary())
        # A column of text, as writers that check nothing leave it.
        text = pa.LargeStringArray.from_buffers(len(column), *column.buffers()[1:])
        table = pa.table({"text": text})
        if name == "raw.parquet":
            pyarrow.parquet.write_table(table, name)
        else:
            with pa.OSFile(name, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
    else:
        header = b"" if name == "raw.txt" else b"text\n"
        Path(name).write_bytes(header + b"\n".join(values) + b"\n")
    manifest = corpus.run(make_config(sources=name, documents="line")).manifest
    assert stages(manifest)["binary"] == 2
    kept = [
        row.fields["text"] for side in manifest["splits"] for row in read_records(f"out/{side}")
    ]
    assert sorted(kept) == sorted(texts)
    with pytest.raises(DataError, match=rf"{name}:\d+: .*not UTF-8"):
        corpus.run(make_config(sources=name, documents="line", binary="error", output="strict"))


@pytest.mark.parametrize(
    ("name", "content", "documents", "message", "hint"),
    [
        ("raw.jsonl", "".join(f'{{"text": "床前明月光{n}"}}\n' for n in range(9)).encode("gbk"),
         "file", r"all of the 9 documents of `raw\.jsonl` are no text; raw\.jsonl:1: not UTF-8",
         "iconv -f GB18030"),
        ("raw.jsonl", "".join(f'{{"text": "text {n}"}}\n' for n in range(9)).encode("utf-16"),
         "file", r"documents of `raw\.jsonl` are no text", "iconv -f UTF-16"),
        ("raw.txt", bytes(range(256)) * 9, "line", r"documents of `raw\.txt` are no text", ""),
        ("raw.txt", "一本书。\n".encode() * 9 + "第二\n".encode("gbk"), "file",
         r"raw\.txt:10: not UTF-8", "iconv -f GB18030"),
        ("raw.txt", b"\x00\x01\x02" * 99, "file", r"raw\.txt:1: 297 of 297 characters", ""),
        ("raw.csv", "text\n一\n二\n".encode("utf-16"), "file", r"raw\.csv:1: not UTF-8",
         "iconv -f UTF-16"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_text_at_all_is_an_error(
    name: str, content: bytes, documents: str, message: str, hint: str
) -> None:
    Path("good.jsonl").write_text('{"text": "good"}\n{"text": "better"}\n{"text": "best"}\n')
    Path(name).write_bytes(content)
    config = make_config(sources=["good.jsonl", name], documents=documents)
    with pytest.raises(DataError, match=message) as error:
        corpus.run(config)
    assert hint in str(error.value.hint)


def test_of_a_large_file_that_is_no_text_not_all_is_read() -> None:
    with Path("raw.jsonl").open("wb") as file:
        for _ in range(20_000):
            file.write(b"\xff\x00\n")
    with pytest.raises(DataError, match=r"all of the first 4,096 documents of `raw\.jsonl`"):
        corpus.run(make_config())


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ("", {}, "is empty: it holds no records"),
        ('{"text": ""}\n{"text": null}\n', {}, "nothing is left of the 2 documents: 2 empty"),
        ('{"body": "x"}\n', {}, r"raw\.jsonl:1: there is no column `text`"),
        ('{"text": 3}\n', {}, r"raw\.jsonl:1: `text` must be a text, not int"),
        ('{"text": "a"}\n{"text": "abcdef"}\n', {"longest_document": 5}, r":2: a document of 6 ch"),
        ('{"text": "only one"}\n', {"validation": "50%"}, "leaves none of the 1 documents"),
        ('{"text": "a"}\n', {"validation": "5 examples"}, "sets a share aside"),
        ('{"text": "a"}\n', {"languages": []}, "`languages` is empty"),
        ('{"text": "a"}\n', {"sources": ["raw.jsonl", "raw.jsonl"]}, "twice"),
        ('{"text": "a"}\n', {"columns": {"label": "x"}}, "the field `text` alone"),
        ('{"text": "a"}\n', {"sources": "missing.jsonl"}, "does not exist"),
    ],
)
def test_what_cannot_be_a_corpus_is_explained(
    rows: str, changes: dict[str, Any], message: str
) -> None:
    Path("raw.jsonl").write_text(rows)
    with pytest.raises((DataError, ConfigError), match=message) as error:
        corpus.run(make_config(**changes))
    assert isinstance(error.value, FulltuneError)
    assert error.value.hint
    assert not Path("out/train").exists()


def test_a_prepared_corpus_is_what_a_run_trains_on(here: Path, tiny_llama: Path) -> None:
    write_rows("raw.jsonl", make_texts(40))
    corpus.run(make_config(validation="10%"))
    with pytest.raises(DataError, match="prepared corpus") as error:
        list(read_records("out"))
    assert "out/train" in str(error.value.hint)
    config = build_config(
        finetune.Config,
        {
            "model": str(tiny_llama), "duration": "2 steps", "batch": "64 tokens",
            "task": {"kind": "text", "train": "out/train", "validation": "out/validation"},
            "precision": "fp32", "num_workers": 0, "run_dir": "run",
        },
    )  # fmt: skip
    result = finetune.run(config)
    assert result.step == 2
    assert result.metrics


def test_a_corrected_source_starts_anew_where_nothing_was_done() -> None:
    Path("raw.jsonl").write_text('{"text": "a"\n')
    with pytest.raises(DataError, match=r"raw\.jsonl:1: not JSON"):
        corpus.run(make_config())
    write_rows("raw.jsonl", make_texts(30))
    assert corpus.run(make_config()).manifest["read"]["documents"] == 30


@pytest.mark.parametrize(
    ("name", "documents"), [("raw.jsonl", "file"), ("raw.txt", "line"), ("raw.txt", "blank_line")]
)
def test_one_huge_line_is_refused_and_never_held(name: str, documents: str) -> None:
    with Path(name).open("w") as file:
        file.write('{"text": "' if name.endswith("jsonl") else "")
        for _ in range(48):
            file.write("x" * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"{name}:1: a (line|document) of more than"):
            corpus.run(make_config(sources=name, documents=documents, longest_document=1000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 * 2**20
