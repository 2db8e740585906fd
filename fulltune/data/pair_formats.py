"""Texts for texts as the field writes them: source and target, text and summary, translations.

Both sides are taken as they stand, and an empty one is an error: nothing could be learned of it.
"""

from __future__ import annotations

from fulltune.data.rows import Row, listed, type_name
from fulltune.data.tasks import SourceTargetExample
from fulltune.errors import near_names


def source_target(row: Row, needs_label: bool) -> SourceTargetExample:
    """A `source` and its `target`."""
    return _example(row, "source", "target", needs_label)


def text_summary(row: Row, needs_label: bool) -> SourceTargetExample:
    """A `text` and its `summary`."""
    return _example(row, "text", "summary", needs_label)


def translation(row: Row, needs_label: bool) -> SourceTargetExample:
    """The same text by language, as WMT's sets have it: `{"de": ..., "en": ...}`."""
    column = row.columns.get("translation", "translation")
    texts = row.value("translation")
    if not isinstance(texts, dict):
        raise row.error(f"field `{column}` must be texts by language, not {type_name(texts)}")
    sides = ("source", "target") if needs_label else ("source",)
    found: list[str] = []
    for side in sides:
        language = row.columns.get(side)
        if language is None:
            raise row.error(
                f"field `{column}` holds the languages {listed(texts)}, and nothing says which is "
                f"the {side}",
                hint=f"name both, for example `task.columns={_example_of_columns(list(texts))}`",
            )
        if language not in texts:
            near = near_names(language, texts)
            raise row.error(
                f"field `{column}` has no language `{language}`; there are {listed(texts)}",
                hint=f"did you mean `{near[0]}`?" if near else "correct `task.columns`",
            )
        found.append(row.checked_text(texts[language], f"`{language}` of field `{column}`"))
    return SourceTargetExample(found[0], found[1] if needs_label else None, row.record.where)


def _example(row: Row, source: str, target: str, needs_label: bool) -> SourceTargetExample:
    return SourceTargetExample(
        row.text(source), row.text(target) if needs_label else None, row.record.where
    )


def _example_of_columns(languages: list[str]) -> str:
    source, target = (*languages, "LANGUAGE", "LANGUAGE")[:2]
    return f"{{source: {source}, target: {target}}}"
