from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import fulltune
from fulltune.data import encoded_dataset
from fulltune.data.encoded_dataset import EncodedDataset, encode_dataset
from fulltune.data.encoding import (
    SENTENCE_START,
    WORD_START,
    EncodedExample,
    content_hash,
)
from fulltune.data.tasks import ClassificationExample, Example, TaskConfig, TextExample
from fulltune.errors import DataError

CONFIG = TaskConfig(kind="classification", train="train.jsonl")

CHUNK_RECORDS = 40


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded_dataset, "CHUNK_RECORDS", CHUNK_RECORDS)


@dataclass(frozen=True)
class Bytes:
    """Encodes a text as its bytes, once for every word; no words, no example."""

    seconds: float = 0.0

    def __call__(self, example: Example) -> list[EncodedExample]:
        assert isinstance(example, ClassificationExample | TextExample)
        time.sleep(self.seconds)
        if "bad" in example.text:
            raise DataError(f"{example.where}: `bad` cannot be encoded", hint="say `good`")
        label = getattr(example, "label", None) or ""
        return [
            EncodedExample(
                input_ids=list(word.encode()),
                targets=[int(byte > 100) for byte in word.encode()],
                token_type_ids=[1] * len(word.encode()) if label else [],
                labels=[label] if label else [],
                num_removed=len(word),
                num_removed_targets=2,
                input_hash=content_hash(example.text),
                example_hash=content_hash(word, label),
                num_bytes=len(word.encode()),
                where=example.where,
            )
            for word in example.text.split()
            if word != "none"
        ]


def rows_file(path: Path, num_rows: int, **changes: str) -> str:
    rows = [{"text": f"text{i} é", "label": str(i % 11)} for i in range(num_rows)]
    for line, text in changes.items():
        rows[int(line.removeprefix("line_")) - 1]["text"] = text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def encoded(source: str | Sequence[str], cache: Path, **settings: Any) -> EncodedDataset:
    sources = [source] if isinstance(source, str) else source
    chosen: dict[str, Any] = {
        "config": CONFIG,
        "encode": Bytes(),
        "encode_fingerprint": "bytes",
        "num_workers": 0,
        "cache_dir": cache,
        **settings,
    }
    return encode_dataset(sources, **chosen)


def content(dataset: EncodedDataset) -> list[EncodedExample]:
    return [dataset[i] for i in range(len(dataset))]


def shards(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("*/shard-*.arrow")}


def test_rows_come_back_as_they_were_encoded(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", 5, line_2="none", line_4="only")
    dataset = encoded(path, tmp_path / "cache")
    expected = [
        example
        for line, text in enumerate(["text0 é", "", "text2 é", "only", "text4 é"], start=1)
        for example in Bytes()(ClassificationExample(text, None, str(line - 1), f"{path}:{line}"))
    ]
    assert content(dataset) == expected
    assert [dataset[index] for index in (3, 0)] == [expected[3], expected[0]]
    assert dataset[-1] == expected[-1]
    assert dataset.where(2) == f"{path}:3"
    assert dataset.num_records == 5
    assert dataset.num_left_out == 1
    with pytest.raises(IndexError):
        dataset[len(dataset)]


class BytesAndWords(Bytes):
    """The same, with the start of every other word marked."""

    def __call__(self, example: Example) -> list[EncodedExample]:
        encoded = super().__call__(example)
        for each in encoded[::2]:
            each["boundaries"] = [WORD_START | SENTENCE_START, *[0] * (len(each["input_ids"]) - 1)]
        return encoded


def test_boundaries_come_back_where_there_are_any(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", 3)
    dataset = encoded(path, tmp_path / "cache", encode=BytesAndWords())
    assert dataset[0]["boundaries"] == [3, 0, 0, 0, 0]
    assert "boundaries" not in dataset[1]
    assert len(dataset) == 6


def test_columns_are_the_rows_at_a_glance(tmp_path: Path) -> None:
    dataset = encoded(rows_file(tmp_path / "a.jsonl", 30), tmp_path / "cache")
    examples = content(dataset)
    assert dataset.lengths.tolist() == [len(example["input_ids"]) for example in examples]
    assert dataset.num_targets.tolist() == [sum(example["targets"]) for example in examples]
    assert dataset.num_removed.tolist() == [example["num_removed"] for example in examples]
    assert dataset.num_removed_targets.tolist() == [2] * len(examples)
    assert dataset.input_hashes.tolist() == [example["input_hash"] for example in examples]
    assert dataset.example_hashes.tolist() == [example["example_hash"] for example in examples]
    assert dataset.num_bytes.tolist() == [example["num_bytes"] for example in examples]
    assert dataset.label_names == [str(i) for i in range(11)]  # 10 after 9, not after 1
    assert [dataset.label_names[code] for code in dataset.labels] == [
        example["labels"][0] for example in examples
    ]
    assert dataset.lengths.dtype == dataset.labels.dtype == np.int32
    assert dataset.input_hashes.dtype == np.int64
    assert dataset.kind == "classification"
    assert dataset.format.startswith("classification: `text`")


def test_examples_without_label_have_no_code(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two")
    config = TaskConfig(kind="text", train="a.txt")
    dataset = encoded(str(tmp_path / "a.txt"), tmp_path / "cache", config=config)
    assert dataset.label_names == []
    assert dataset.labels.tolist() == [-1, -1]


def test_sources_may_have_formats_of_their_own(tmp_path: Path) -> None:
    one = rows_file(tmp_path / "a.jsonl", 2)
    (tmp_path / "b.csv").write_text("label,text\nx,hello\n")
    dataset = encoded([one, str(tmp_path / "b.csv")], tmp_path / "cache")
    assert dataset.where(len(dataset) - 1) == f"{tmp_path}/b.csv:2"


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", 3 * CHUNK_RECORDS + 10)
    done: list[int] = []
    one = encoded(path, tmp_path / "one", num_workers=1)
    two = encoded(path, tmp_path / "two", num_workers=2, progress=done.append)
    assert shards(tmp_path / "one").keys() == shards(tmp_path / "two").keys()
    assert content(one) == content(two)
    assert one.fingerprint == two.fingerprint
    assert done == [CHUNK_RECORDS, 2 * CHUNK_RECORDS, 3 * CHUNK_RECORDS, two.num_records]


def test_an_encoded_data_set_can_be_sent_to_another_process(tmp_path: Path) -> None:
    dataset = encoded(rows_file(tmp_path / "a.jsonl", 3), tmp_path / "cache")
    assert content(pickle.loads(pickle.dumps(dataset))) == content(dataset)


def test_more_shards_than_are_kept_open_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded_dataset, "_OPEN_SHARDS", 2)
    monkeypatch.setattr(encoded_dataset, "CHUNK_RECORDS", 3)
    dataset = encoded(rows_file(tmp_path / "a.jsonl", 20), tmp_path / "cache")
    assert len(shards(tmp_path / "cache")) == 7
    for index in np.random.default_rng(0).permutation(len(dataset)):
        assert dataset[int(index)]["example_hash"] == dataset.example_hashes[index]


# Errors of the data


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_earlier_bad_row_is_named_whatever_the_number_of_processes(
    tmp_path: Path, num_workers: int
) -> None:
    last = 3 * CHUNK_RECORDS + 5
    path = rows_file(tmp_path / "a.jsonl", last, line_33="bad", line_60="bad")
    with open(path, "a") as stream:
        stream.write("not json\n")
    with pytest.raises(DataError) as caught:
        encoded(path, tmp_path / "cache", num_workers=num_workers)
    assert str(caught.value) == f"{path}:33: `bad` cannot be encoded"
    assert caught.value.hint == "say `good`"


def test_data_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", 2, line_1="none", line_2="none none")
    with pytest.raises(DataError, match="none of the 2 records of"):
        encoded(path, tmp_path / "cache")


def test_rows_that_give_nothing_are_counted_in_the_cache_too(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", CHUNK_RECORDS + 9, line_2="none", line_5="none none")
    rows_file(tmp_path / "b.jsonl", 4, line_3="none")
    sources = [path, str(tmp_path / "b.jsonl")]
    assert encoded(sources, tmp_path / "cache").num_left_out == 3
    complete, *_ = (tmp_path / "cache").glob("*/complete.json")
    complete.unlink()  # as after a kill: the shards are there, and are not encoded again
    before = shards(tmp_path / "cache")
    again = encoded(sources, tmp_path / "cache")
    assert shards(tmp_path / "cache") == before
    assert (again.num_left_out, again.num_records) == (3, CHUNK_RECORDS + 13)


def test_duplicates_are_dropped_after_the_first_and_counted(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", 24, line_12="text0 é", line_23="text0 other")
    whole = encoded(path, tmp_path / "cache")
    config = CONFIG.model_copy(update={"deduplicate": True})
    dataset = encoded(path, tmp_path / "cache", config=config)
    seen: set[int] = set()
    expected = []
    for example in content(whole):
        if example["example_hash"] not in seen:
            expected.append(example)
        seen.add(example["example_hash"])
    assert content(dataset) == expected
    assert dataset.lengths.tolist() == [len(example["input_ids"]) for example in expected]
    assert dataset.num_duplicates_dropped == len(whole) - len(expected) > 0
    assert whole.num_duplicates_dropped == 0
    assert dataset.fingerprint != whole.fingerprint


# The cache


def test_a_second_call_opens_what_the_first_wrote(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", 10)
    first = encoded(path, tmp_path / "cache")
    again = encoded(path, tmp_path / "cache", encode=None)  # not called
    assert content(again) == content(first)


def test_whatever_the_rows_depend_on_makes_another_entry(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", 10)
    cache = tmp_path / "cache"
    encoded(path, cache)
    encoded(path, cache, encode_fingerprint="other")
    assert len(list(cache.iterdir())) == 2
    encoded(path, cache, config=CONFIG.model_copy(update={"max_length": 7}))
    assert len(list(cache.iterdir())) == 3
    encoded(path, cache, config=CONFIG.model_copy(update={"validation": "9%", "train": "x"}))
    assert len(list(cache.iterdir())) == 3
    encoded(rows_file(tmp_path / "a.jsonl", 11), cache)
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "complete"])
def test_damaged_files_are_made_anew(tmp_path: Path, damage: str) -> None:
    path = rows_file(tmp_path / "a.jsonl", 2 * CHUNK_RECORDS)
    cache = tmp_path / "cache"
    first = content(encoded(path, cache))
    before = shards(cache)
    one, two = sorted(cache.glob("*/shard-*.arrow"))
    data = bytearray(two.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        two.write_bytes(data)
    elif damage == "cut":
        two.write_bytes(data[:100])
    elif damage == "gone":
        two.unlink()
    else:
        (two.parent / "complete.json").write_text("{")
    assert content(encoded(path, cache)) == first
    after = shards(cache)
    assert before.keys() == after.keys()
    assert after[one.name] == before[one.name]


SCRIPT = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

spec = spec_from_file_location("test_encoding_module", {test!r})
module = module_from_spec(spec)
sys.modules["test_encoding_module"] = module
spec.loader.exec_module(module)

if __name__ == "__main__":
    module.encoded_dataset.CHUNK_RECORDS = module.CHUNK_RECORDS
    encode = module.Bytes({seconds})
    module.encoded({source!r}, Path({cache!r}), encode=encode, num_workers={workers})
"""


def start(folder: Path, source: str, cache: Path, *, seconds: float, workers: int) -> Any:
    script = folder / f"encode_{workers}.py"
    script.write_text(
        SCRIPT.format(
            test=__file__, source=source, cache=str(cache), seconds=seconds, workers=workers
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(fulltune.__file__).parents[1])}
    return subprocess.Popen([sys.executable, str(script)], env=environment)


def test_a_killed_run_leaves_its_shards_and_no_process(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", 8 * CHUNK_RECORDS)
    cache = tmp_path / "cache"
    process = start(tmp_path, path, cache, seconds=0.02, workers=2)
    try:
        deadline = time.monotonic() + 60
        while len(shards(cache)) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    finished = shards(cache)
    assert 2 <= len(finished) < 8
    assert not list(cache.glob("*/complete.json"))

    resumed = encoded(path, cache, num_workers=1)
    after = shards(cache)
    assert {name: after[name] for name in finished} == finished
    assert content(resumed) == content(encoded(path, tmp_path / "fresh"))


def test_two_runs_at_once_make_one_whole_entry(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", 2 * CHUNK_RECORDS)
    cache = tmp_path / "cache"
    processes = [start(tmp_path, path, cache, seconds=0.005, workers=workers) for workers in (0, 1)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert len(shards(cache)) == 2
    assert content(encoded(path, cache)) == content(encoded(path, tmp_path / "fresh"))


def test_a_cache_that_cannot_be_written_is_a_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows_file(tmp_path / "a.jsonl", 2)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="Not a directory") as caught:
        encoded(path, tmp_path / "file" / "cache")
    assert caught.value.hint == "name a folder that can be written as `FULLTUNE_CACHE`"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device") as caught:
        encoded(path, tmp_path / "cache")
    assert caught.value.hint
    assert "free some space there" in caught.value.hint
    assert not list((tmp_path / "cache").glob("*/*"))  # nothing half written stays


def test_a_killed_worker_process_is_reported(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", 2 * CHUNK_RECORDS)
    with pytest.raises(DataError, match="was killed, probably because memory ran out"):
        encoded(path, tmp_path / "cache", num_workers=2, encode=kill_this_process)


def kill_this_process(example: Example) -> list[EncodedExample]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def test_content_hashes_tell_parts_apart() -> None:
    assert content_hash("ab", "c") != content_hash("a", "bc") != content_hash("abc")
    assert -(2**63) <= content_hash("x") < 2**63
    # Stays the same for ever: splits depend on it.
    assert content_hash("a", "b") == 5666916665733659087
