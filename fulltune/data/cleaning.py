"""Cleaning of documents, every change of which is counted, and the filters by length and language.

A rule is a function of one document, so that the documents can be cleaned in any number of
processes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from fulltune.config import Settings
from fulltune.errors import ConfigError, MissingExtraError

LANGUAGE_CHARACTERS = 4000
"""The language is told from so many characters of a document's middle: what stands at the
beginning is often a menu or a title."""

_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# Tabs and line feeds are text. The byte order mark, inside of a text, is what is left of joined
# files; joiners such as U+200D are letters' business in many scripts and stay.
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")
"""Characters that are no text."""
_SPACES = " \t\u00a0\u3000"


class CleaningConfig(Settings):
    """What is made of a document before anything else looks at it."""

    unicode: bool = True
    """Compose characters (Unicode NFC), so that one text is always the same code points."""
    control_characters: bool = True
    """Remove control characters, and make every kind of line end a line feed."""
    trailing_spaces: bool = True
    """Remove spaces at the ends of lines."""
    blank_lines: Annotated[int, Field(ge=0)] | None = 1
    """Most blank lines in a row; those at both ends are removed. Null leaves them."""


class LengthConfig(Settings):
    """Which documents are too short or too long."""

    min_characters: Annotated[int, Field(ge=1)] = 1
    """Shortest document that is kept, after cleaning."""
    max_characters: Annotated[int, Field(ge=1)] | None = None
    """Longest document that is kept, after cleaning."""

    @model_validator(mode="after")
    def _in_order(self) -> LengthConfig:
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(
                f"`length.max_characters` is {self.max_characters}, less than "
                f"`length.min_characters`, {self.min_characters}; give a larger one"
            )
        return self


def clean(text: str, config: CleaningConfig) -> tuple[str, tuple[str, ...]]:
    """The cleaned document, and what was done to it: `control characters`, `trailing spaces` ..."""
    changes = []
    for name, wanted, rule in (
        ("control characters", config.control_characters, _without_control_characters),
        ("not NFC", config.unicode, lambda text: unicodedata.normalize("NFC", text)),
        ("trailing spaces", config.trailing_spaces, _without_trailing_spaces),
        ("blank lines", config.blank_lines is not None, _blank_lines_rule(config.blank_lines)),
    ):
        if not wanted:
            continue
        after = rule(text)
        if after != text:
            changes.append(name)
            text = after
    return text, tuple(changes)


def _without_control_characters(text: str) -> str:
    return CONTROL.sub("", _LINE_ENDS.sub("\n", text))


def _without_trailing_spaces(text: str) -> str:
    return "\n".join(line.rstrip(_SPACES) for line in text.split("\n"))


def _blank_lines_rule(most: int | None) -> Callable[[str], str]:
    run = re.compile(f"\n{{{(most or 0) + 2},}}")
    return lambda text: run.sub("\n" * ((most or 0) + 1), text.strip("\n"))


def refusal_by_length(text: str, config: LengthConfig) -> str | None:
    """Why a document is removed; None keeps it."""
    if not text.strip():
        return "empty"
    if len(text) < config.min_characters:
        return f"shorter than {config.min_characters:,} characters"
    if config.max_characters is not None and len(text) > config.max_characters:
        return f"longer than {config.max_characters:,} characters"
    return None


class LanguageFilter:
    """Which language a document is in, by py3langid (a naive Bayes model of 140 languages).

    Args:
        languages: codes that are kept, `en`, `zh`.

    Raises:
        MissingExtraError: py3langid is not installed.
        ConfigError: a code that it does not know.
    """

    def __init__(self, languages: Sequence[str]) -> None:
        try:
            from py3langid import langid
        except ImportError:
            raise MissingExtraError(
                "`languages` needs the package `py3langid`, which is not installed",
                hint="pip install 'fulltune[corpus]'",
            ) from None
        self._identifier: Any = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
        known = sorted(self._identifier.labels)
        unknown = [code for code in languages if code not in known]
        if unknown:
            raise ConfigError(
                f"`languages` names {', '.join(f'`{code}`' for code in unknown)}, which is no "
                "language that is recognised",
                hint=f"known are {', '.join(known)}",
            )
        self._languages = frozenset(languages)

    def refusal(self, text: str) -> str | None:
        """The language of a document that is removed; None keeps it."""
        start = max(0, (len(text) - LANGUAGE_CHARACTERS) // 2)
        language = str(self._identifier.classify(text[start : start + LANGUAGE_CHARACTERS])[0])
        return None if language in self._languages else f"language {language}"
