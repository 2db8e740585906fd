"""Labelled questions in three parts, and a text to pre-train on that holds none held out.

The text is the questions trained on, without their labels, and other modern English beside them. A
document of the latter that quotes a held-out question, whatever its case and punctuation, is left
out; so is a repeat of a question, since equal questions are one question here.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fulltune.data.records import read_records
from fulltune.errors import ConfigError

OTHER_TEXT = ("asset:squad-sample", "asset:alpaca-en", "asset:reading-en")
TEXT_FIELDS = ("text", "context", "question", "instruction", "input", "output")
"""Fields of a row that hold text, of data sets of every kind; each is a document of its own."""


@dataclass(frozen=True)
class Questions:
    """Files of one split of the questions, and what a model may read before it is fine-tuned."""

    train: Path
    validation: Path
    """Of these the learning rate is chosen."""
    test: Path
    text: Path
    num_questions: tuple[int, int, int]
    """In the three parts."""
    num_documents: int
    """Of the text, each copy of a question counted."""
    num_left_out: int
    """Documents that quote a held-out question."""


def words_of(text: str) -> str:
    """The words of a text in lower case with a space around each: equal for equal questions."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} "


def write_questions(
    source: str,
    folder: Path,
    *,
    num_held_out: int,
    num_labelled: int | None = None,
    copies: int = 1,
    other_text: Sequence[str] = OTHER_TEXT,
) -> Questions:
    """Split labelled questions and write them, and the text, as files of a folder.

    Args:
        source: rows with `text` and `label`.
        folder: is made.
        num_held_out: questions of the validation part, and of the test part.
        num_labelled: questions that keep their label for training; None keeps all labels.
        copies: how often each question that is not held out stands in the text, in another order
            each time.
        other_text: sources of documents beside the questions.

    Raises:
        ConfigError: too few questions to hold so many out twice.
    """
    rows = {words_of(str(row["text"])): row for row in _rows(source)}
    order = sorted(rows)
    random.Random(0).shuffle(order)  # the split is the same for every seed of a training
    if 2 * num_held_out >= len(order):
        raise ConfigError(
            f"{len(order):,} questions are too few to hold out {num_held_out:,} twice",
            hint="hold out fewer",
        )
    held_out = order[: 2 * num_held_out]
    others = order[2 * num_held_out :]
    parts = others[:num_labelled], held_out[:num_held_out], held_out[num_held_out:]
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"{name}.jsonl" for name in ("train", "validation", "test"))
    for path, part in zip(paths, parts, strict=True):
        _write(path, (rows[words] for words in part))
    documents = list(_documents(other_text))
    kept = [text for text in documents if not _quotes(words_of(text), held_out)]
    asked = [str(rows[words]["text"]) for words in others]
    texts = [*kept]
    for copy in range(copies):
        texts += random.Random(copy).sample(asked, len(asked))
    _write(folder / "text.jsonl", ({"text": text} for text in texts))
    sizes = len(parts[0]), len(parts[1]), len(parts[2])
    return Questions(*paths, folder / "text.jsonl", sizes, len(texts), len(documents) - len(kept))


def _rows(source: str) -> Iterator[dict[str, object]]:
    for record in read_records(source):
        missing = [name for name in ("text", "label") if not record.fields.get(name)]
        if missing:
            raise ConfigError(
                f"{record.where}: no `{missing[0]}`",
                hint="name labelled questions as `--questions`",
            )
        yield {"text": record.fields["text"], "label": record.fields["label"]}


def _documents(sources: Sequence[str]) -> Iterator[str]:
    """Every text of the rows once, in order: many questions of SQuAD share one context."""
    seen: set[str] = set()
    for source in sources:
        for record in read_records(source):
            for name in TEXT_FIELDS:
                text = record.fields.get(name)
                if isinstance(text, str) and text.strip() and text not in seen:
                    seen.add(text)
                    yield text


def _quotes(words: str, questions: Sequence[str]) -> bool:
    return any(question in words for question in questions)


def _write(path: Path, rows: Iterable[object]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
