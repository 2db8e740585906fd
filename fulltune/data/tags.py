"""Tags of words: the schemes of the field, recognised and converted to IOB2, and back to entities.

IOB2 marks the first word of an entity `B-LABEL` and its others `I-LABEL`; all other words are `O`
(Tjong Kim Sang and Veenstra, 1999). The other schemes say the same:

    word     IOB2    IOB1    BIOES   BMES    BILOU   IO
    Ada      B-PER   I-PER   B-PER   B-PER   B-PER   PER
    Byron    I-PER   I-PER   E-PER   E-PER   L-PER   PER
    saw      O       O       O       O       O       O
    Rome     B-LOC   I-LOC   S-LOC   S-LOC   U-LOC   LOC

IOB1 writes `B-` only where an entity follows another of its label; IO cannot tell these two apart,
so that neighbours of one label are one entity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from fulltune.errors import DataError

TagScheme: TypeAlias = Literal["iob2", "iob1", "bioes", "bmes", "bilou", "io"]

OUTSIDE = "O"

# The letter of a tag -> what it says: that an entity begins, goes on, ends, or is one word.
_LETTERS: dict[TagScheme, dict[str, str]] = {
    "iob2": {"B": "begin", "I": "inside"},
    "iob1": {"B": "begin", "I": "inside"},
    "bioes": {"B": "begin", "I": "inside", "E": "end", "S": "single"},
    "bmes": {"B": "begin", "M": "inside", "E": "end", "S": "single"},
    "bilou": {"B": "begin", "I": "inside", "L": "end", "U": "single"},
}
_NAMES: dict[TagScheme, str] = {
    "iob2": "IOB2 (BIO)", "iob1": "IOB1", "bioes": "BIOES", "bmes": "BMES", "bilou": "BILOU",
    "io": "IO (labels alone)",
}  # fmt: skip
_TAG = re.compile(r"([BIEMSLU])[-_](.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Span:
    """An entity: ``start <= place < end``, in words or in characters."""

    start: int
    end: int
    label: str


def scheme_name(scheme: TagScheme) -> str:
    """The scheme as the field writes it."""
    return _NAMES[scheme]


def recognise_scheme(rows: Iterable[tuple[str, Sequence[str]]]) -> TagScheme:
    """The scheme that the tags of the first rows are written in.

    Args:
        rows: place (file and line) and tags of each.

    Raises:
        DataError: there is none that has all of these letters.
    """
    seen: dict[str, str] = {}  # letter -> where it stood first
    bare: tuple[str, str] | None = None
    begins_inside, begins_apart = False, False
    for where, tags in rows:
        before = OUTSIDE
        for tag in tags:
            if tag != OUTSIDE:
                match = _TAG.fullmatch(tag)
                if match is None:
                    bare = bare or (where, tag)
                else:
                    seen.setdefault(match[1], where)
                    label_before = before[2:] if before != OUTSIDE else None
                    begins_inside |= match[1] == "I" and label_before != match[2]
                    begins_apart |= match[1] == "B" and label_before != match[2]
            before = tag
    if bare is not None and seen:
        prefixed = next(iter(seen))
        raise DataError(
            f"{bare[0]}: the tag `{bare[1]}` has no letter before its label, and others do "
            f"(`{prefixed}-` first in {seen[prefixed]})",
            hint="correct it, or set `task.tag_scheme: io` where these are labels",
        )
    if bare is not None:
        if bare[1] in "BIEMSLU":
            raise DataError(
                f"{bare[0]}: the tag `{bare[1]}` has no label",
                hint=f"write `{bare[1]}-LABEL`, such as `{bare[1]}-WORD`",
            )
        return "io"
    letters = set(seen)
    if letters <= {"B", "I"}:
        return "iob1" if begins_inside and not begins_apart else "iob2"
    schemes: tuple[TagScheme, ...] = ("bioes", "bmes", "bilou")
    for scheme in schemes:
        if letters <= _LETTERS[scheme].keys():
            return scheme
    raise DataError(
        f"the tags begin with {_listed(seen)}, which no scheme has together: "
        + ", ".join(f"`{letter}-` first in {where}" for letter, where in sorted(seen.items())),
        hint="known are IOB1, IOB2 (BIO), BIOES, BMES and BILOU; or set `task.tag_scheme: io` "
        "where these are labels",
    )


def to_iob2(tags: Sequence[str], scheme: TagScheme, *, where: str) -> tuple[str, ...]:
    """The tags of one sentence in IOB2.

    Args:
        tags: one for each word.
        scheme: what they are written in.
        where: file and line, for errors.

    Raises:
        DataError: a tag is unknown to the scheme, or does not follow from the one before.
    """
    if scheme == "io":
        return _from_labels(tags)
    converted: list[str] = []
    role_before, label_before = "outside", ""
    for place, tag in enumerate(tags):
        role, label = _parse(tag, scheme, place, where)
        goes_on = role_before in ("begin", "inside") and label == label_before
        if scheme in ("iob2", "iob1"):
            begins = role == "begin" or (scheme == "iob1" and role == "inside" and not goes_on)
            wrong = (role == "inside" and not goes_on and not begins) or (
                scheme == "iob1" and role == "begin" and not goes_on
            )
        else:
            begins = role in ("begin", "single")
            must_go_on = role_before in ("begin", "inside")
            wrong = must_go_on != (role in ("inside", "end")) or (must_go_on and not goes_on)
        if wrong:
            before = f"follows `{tags[place - 1]}`" if place else "is the first"
            raise DataError(
                f"{where}: word {place + 1}: the tag `{tag}` {before}, which {_NAMES[scheme]} "
                "does not allow",
                hint=_hint_of(scheme, role),
            )
        converted.append(OUTSIDE if role == "outside" else f"{'B' if begins else 'I'}-{label}")
        role_before, label_before = role, label
    if scheme not in ("iob2", "iob1") and role_before in ("begin", "inside"):
        raise DataError(
            f"{where}: the last tag `{tags[-1]}` leaves its entity open, which {_NAMES[scheme]} "
            "does not allow",
            hint="end it by E- (L- in BILOU), or write S- (U- in BILOU) where it is one word",
        )
    return tuple(converted)


def _parse(tag: str, scheme: TagScheme, place: int, where: str) -> tuple[str, str]:
    if tag == OUTSIDE:
        return "outside", ""
    match = _TAG.fullmatch(tag)
    letters = _LETTERS[scheme]
    if match is None or match[1] not in letters:
        raise DataError(
            f"{where}: word {place + 1}: the tag `{tag}` is unknown in {_NAMES[scheme]}",
            hint=f"tags are `O` and {_listed(f'{letter}-LABEL' for letter in letters)}; "
            "`task.tag_scheme` names another scheme",
        )
    return letters[match[1]], match[2]


def _hint_of(scheme: TagScheme, role: str) -> str:
    if scheme == "iob2":
        return "an entity begins with B-; where the data is IOB1, set `task.tag_scheme: iob1`"
    if scheme == "iob1":
        return "B- stands only behind an entity of its label; otherwise set `task.tag_scheme: iob2`"
    if role in ("inside", "end"):
        return "an entity of several words begins with B-"
    return "the entity before is not ended yet"


def _from_labels(tags: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        tag if tag == OUTSIDE else f"{'I' if place and tags[place - 1] == tag else 'B'}-{tag}"
        for place, tag in enumerate(tags)
    )


def spans_of(tags: Sequence[str]) -> list[Span]:
    """The entities of valid IOB2 tags, as spans of words."""
    spans: list[Span] = []
    for place, tag in enumerate(tags):
        if tag.startswith("B-"):
            spans.append(Span(place, place + 1, tag[2:]))
        elif tag != OUTSIDE:
            last = spans[-1]
            spans[-1] = Span(last.start, place + 1, last.label)
    return spans


def complete_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """All tags that a model of these labels gives: `O`, then `B-` and `I-` of each label, sorted.

    A label of which the data happens to hold no second word can go on in other texts.
    """
    labels = sorted({tag[2:] for tag in tags if tag != OUTSIDE})
    return (OUTSIDE, *(f"{letter}-{label}" for label in labels for letter in "BI"))


def wrong_class(tags: Iterable[str]) -> str | None:
    """What is wrong with tags as the classes of a model; None where they are those of IOB2."""
    known = set(tags)
    for tag in sorted(known):
        match = _TAG.fullmatch(tag)
        if tag != OUTSIDE and (match is None or match[1] not in "BI" or tag[1] != "-"):
            return f"`{tag}` is none"
        if tag.startswith("I-") and f"B-{tag[2:]}" not in known:
            return f"there is `{tag}` without `B-{tag[2:]}`"
    return None


# Spans of a text


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a text, at ``text[start:end]``."""

    text: str
    start: int
    end: int


def tags_of_spans(
    text: str, words: Sequence[Word], spans: Sequence[Span], *, where: str
) -> tuple[str, ...]:
    """Entities given by characters, as IOB2 tags of the words.

    Args:
        text: what the spans count in.
        words: of the text, in order.
        spans: in characters, in any order; space around an entity may be in its span.
        where: file and line, for errors.

    Raises:
        DataError: a span lies outside of the text, cuts a word, holds none, or overlaps another.
    """
    ordered = sorted(spans, key=lambda span: (span.start, -span.end))
    tags = [OUTSIDE] * len(words)
    for before, span in zip([None, *ordered], ordered, strict=False):
        if not 0 <= span.start < span.end <= len(text):
            raise DataError(
                f"{where}: the span {_shown(span)} is not inside of the text, which has "
                f"{len(text):,} characters",
                hint="`start` counts from 0, and `end` is the place after the last character",
            )
        if before is not None and span.start < before.end:
            how = "lies inside" if span.end <= before.end else "overlaps"
            raise DataError(
                f"{where}: the span {_shown(span, text)} {how} of {_shown(before, text)}"
                if how == "lies inside"
                else f"{where}: the span {_shown(span, text)} overlaps {_shown(before, text)}",
                hint="nested and overlapping entities cannot be trained as tags; keep the outer "
                "or the inner ones, or make a data set of each level",
            )
        inside = [
            place
            for place, word in enumerate(words)
            if word.start < span.end and span.start < word.end
        ]
        if not inside:
            raise DataError(
                f"{where}: the span {_shown(span, text)} holds no word", hint="drop the span"
            )
        first, last = words[inside[0]], words[inside[-1]]
        cut = first if first.start < span.start else last if last.end > span.end else None
        if cut is not None:
            raise DataError(
                f"{where}: the span {_shown(span, text)} ends or begins inside of the word "
                f"`{cut.text}`",
                hint="move it to the end of the word, or give `words` and `tags` of your own",
            )
        for place in inside:
            tags[place] = f"{'B' if place == inside[0] else 'I'}-{span.label}"
    return tuple(tags)


def read_span(value: object, *, where: str) -> Span:
    """A span as a row writes it: ``{start, end, label}``, or the three in a list.

    Raises:
        DataError: it is neither, or its places are not whole numbers.
    """
    if isinstance(value, Mapping):
        fields = cast(Mapping[str, object], value)
        missing = [name for name in ("start", "end", "label") if name not in fields]
        if missing:
            raise DataError(
                f"{where}: a span has no `{missing[0]}`; it has {_listed(fields)}",
                hint="write each as {start: 0, end: 5, label: PER}",
            )
        parts: list[object] = [fields["start"], fields["end"], fields["label"]]
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3:
        parts = list(value)
    else:
        raise DataError(
            f"{where}: a span is {value!r}", hint="write each as {start: 0, end: 5, label: PER}"
        )
    start, end, label = parts
    if not (type(start) is int and type(end) is int and isinstance(label, str) and label):
        raise DataError(
            f"{where}: a span is {value!r}, and `start` and `end` are whole numbers and `label` "
            "a text",
            hint="write each as {start: 0, end: 5, label: PER}",
        )
    return Span(start, end, label)


def _shown(span: Span, text: str | None = None) -> str:
    piece = f" `{text[span.start : span.end]}`" if text is not None else ""
    return f"{span.start}-{span.end}{piece} {span.label}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
