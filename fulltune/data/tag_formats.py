"""Rows of words with tags, and of texts with entities, as examples for tagging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fulltune.data.rows import Row, type_name
from fulltune.data.tags import (
    TagScheme,
    Word,
    read_span,
    recognise_scheme,
    tags_of_spans,
    to_iob2,
)
from fulltune.data.tasks import TaggingExample, TaskConfig
from fulltune.data.words import end_in_commas, spaces_before, split_words
from fulltune.errors import ConfigError


def tagged_words(row: Row, needs_label: bool) -> TaggingExample:
    """A row of words with one tag each, in the scheme of its source."""
    words = _texts(row, "words", "word")
    tags = _tags(row, words) if needs_label else None
    return TaggingExample(words, tuple(spaces_before(words)), tags, row.record.where)


def tagged_text(row: Row, needs_label: bool) -> TaggingExample:
    """A row of a text with its entities as spans of characters."""
    text = row.text("text")
    words = split_words(text)
    if not words:
        raise row.error("the text has no word", hint="drop the row")
    tags = _tags_of_spans(row, text, words) if needs_label else None
    return _of_text(text, words, tags, row.record.where)


def _of_text(
    text: str, words: Sequence[Word], tags: tuple[str, ...] | None, where: str
) -> TaggingExample:
    ends = [0, *(word.end for word in words)]
    return TaggingExample(
        words=tuple(word.text for word in words),
        spaces=tuple(
            place > 0 and word.start > end
            for place, (word, end) in enumerate(zip(words, ends, strict=False))
        ),
        tags=tags,
        where=where,
        text=text,
        places=tuple((word.start, word.end) for word in words),
    )


def cut_at_spaces(rows: Sequence[Row]) -> bool:
    """Whether the words of a source were cut from texts at spaces alone."""
    return end_in_commas(_texts(row, "words", "word") for row in rows)


def recut(example: TaggingExample) -> TaggingExample:
    """A text without tags, cut at its spaces; words stay as they are.

    Raises:
        DataError: there is no word.
    """
    if example.text is None:
        return example
    words = split_words(example.text, at_spaces=True)
    return _of_text(example.text, words, None, example.where)


def scheme_of_rows(rows: Sequence[Row], config: TaskConfig, *, name: str) -> TagScheme:
    """The scheme of a source's tags: the one that is set, or that of its first rows.

    Raises:
        DataError: the tags cannot be read, or are of no scheme.
        ConfigError: one is set for spans, which have no tags.
    """
    if name == "spans":
        if config.tag_scheme != "auto":
            raise ConfigError(
                "`task.tag_scheme` has no effect on spans, which hold no tags", hint="leave it out"
            )
        return "iob2"
    if config.tag_scheme != "auto":
        return config.tag_scheme
    return recognise_scheme(
        (row.record.where, _tags(row, _texts(row, "words", "word"))) for row in rows
    )


def in_iob2(example: TaggingExample, scheme: TagScheme) -> TaggingExample:
    """An example whose tags are converted.

    Raises:
        DataError: they are wrong in their scheme.
    """
    if example.tags is None:
        return example
    return replace(example, tags=to_iob2(example.tags, scheme, where=example.where))


def _texts(row: Row, field: str, one: str) -> tuple[str, ...]:
    name = f"field `{row.columns.get(field, field)}`"
    values = row.value(field)
    if not isinstance(values, list):
        hint = "split it first" if isinstance(values, str) else None
        raise row.error(f"{name} must be a list of texts, not {type_name(values)}", hint=hint)
    if not values:
        raise row.error(f"{name} holds no {one}", hint="drop the row")
    # A space of its own is a character too, in rows of characters.
    return tuple(
        value
        if isinstance(value, str) and value.isspace()
        else row.checked_text(value, f"{one} {place} of {name}")
        for place, value in enumerate(values, start=1)
    )


def _tags(row: Row, words: Sequence[str]) -> tuple[str, ...]:
    column = row.columns.get("tags", "tags")
    values: Any = row.value("tags")
    if isinstance(values, list):
        for place, value in enumerate(values, start=1):
            if isinstance(value, list):
                raise row.error(
                    f"field `{column}` has several tags for word {place}: nested entities",
                    hint="nested tags cannot be trained; keep those of one level, or make a data "
                    "set of each",
                )
            if isinstance(value, int):
                raise row.error(
                    f"field `{column}` holds the number {value}, and what it stands for is not "
                    "known",
                    hint="write the tags by name, such as `B-PER`",
                )
    tags = _texts(row, "tags", "tag")
    if len(tags) != len(words):
        raise row.error(
            f"{len(words)} words but {len(tags)} tags", hint="each word needs exactly one tag"
        )
    return tags


def _tags_of_spans(row: Row, text: str, words: Sequence[Word]) -> tuple[str, ...]:
    column = row.columns.get("spans", "spans")
    values = row.value("spans")
    if not isinstance(values, list):
        raise row.error(
            f"field `{column}` must be a list of spans, not {type_name(values)}",
            hint="write [] for a text without any",
        )
    spans = [read_span(value, where=row.record.where) for value in values]
    return tags_of_spans(text, words, spans, where=row.record.where)
