"""What an error advises, in the words of a chain file: its settings, where a verb has options."""

from __future__ import annotations

import re

_OPTIONS = re.compile(r"`(fulltune tokenizer train )?(--(?!resume`)[^`]+)`")
_OPTION = re.compile(r"--([a-z][a-z-]*)(?:[ =]([^ ]+(?: +(?!--)[^ ]+)*))?")
_COLUMNS = re.compile(r"`task\.columns(?:=(\{[^}`]*\}))?`")


def in_settings(text: str, *, has_task: bool) -> str:
    """Options in code quotes as settings of a step, `--resume` apart, which a chain has too.

    Args:
        text: the message of an error, or its hint.
        has_task: whether the step has a `task`, of which the columns of its data are a setting.
    """
    if not has_task:
        text = _COLUMNS.sub(lambda found: f"`{_setting('columns', found[1])}`", text)
    return _OPTIONS.sub(_as_settings, text)


def _as_settings(found: re.Match[str]) -> str:
    command, options = found[1], found[2]
    if options.startswith("--resume "):  # what follows is a setting already
        key, _, value = options.removeprefix("--resume ").partition("=")
        return f"`--resume` and `{key}: {value}`"
    settings: list[tuple[str, str | None]] = []
    columns: list[str] = []
    for name, value in _OPTION.findall(options):
        if name == "column":
            ours, _, theirs = value.partition("=")
            columns.append(f"{ours}: {theirs}" if theirs else value)
        else:
            # A flag has no value: to be named it needs none, to be set it does.
            settings.append((name.replace("-", "_"), value or ("true" if command else None)))
    if columns:
        named = [column for column in columns if column]
        settings.append(("columns", f"{{{', '.join(named)}}}" if named else None))
    written = ", ".join(_setting(*setting) for setting in settings)
    return f"a step `tokenizer: {{{written}}}`" if command else f"`{written}`"


def _setting(name: str, value: str | None) -> str:
    return f"{name}: {value}" if value else name
