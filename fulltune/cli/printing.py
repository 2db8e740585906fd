"""How results look on the terminal, and how a program reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import typer


def print_json(value: object) -> None:
    """JSON on stdout, readable and in UTF-8; a number that is not finite is text, and named."""
    from fulltune.tracking.json_text import to_json_text

    typer.echo(to_json_text(value, indent=2))


def print_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[int] = (),
) -> None:
    """Print rows without borders; what follows the first line of a cell is dimmed.

    Args:
        title: above the table.
        header: a name for each column.
        rows: their cells.
        right: places of columns of numbers, which end at one place.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(title, style="bold"))  # a title of the table would be as narrow as that is
    table = Table(box=None, pad_edge=False)
    table.padding = (0, 2, 0, 0)
    for index, name in enumerate(header):
        justify: Literal["left", "right"] = "right" if index in right else "left"
        table.add_column(
            name, no_wrap=index == 0, overflow="fold", header_style="dim", justify=justify
        )
    for row in rows:
        cells = [cell.partition("\n") for cell in row]
        table.add_row(*(Text(first + feed).append(rest, "dim") for first, feed, rest in cells))
    console.print(table)


def print_entries(title: str, entries: Sequence[tuple[str, str, str, str]]) -> None:
    """Print a name and a value on a line, and below it, indented, what they mean and accept."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(title, style="bold"))
    for name, value, meaning, accepted in entries:
        console.print(Text(name, style="bold").append(f"  {value}", "not bold"))
        details = Text(meaning).append(f"\n{accepted}", "dim")
        console.print(Padding(details, (0, 0, 0, 4), expand=False))


def parse_columns(pairs: list[str] | None) -> dict[str, str]:
    """`OURS=YOURS` pairs of the command line."""
    columns = {}
    for pair in pairs or []:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            from fulltune.errors import ConfigError

            raise ConfigError(
                f"`--column {pair}` names no column", hint="write `--column text=question`"
            )
        columns[ours] = theirs
    return columns


def print_answers(prompt: Sequence[Mapping[str, str]], answers: Mapping[str, str]) -> None:
    """One prompt with what was answered to it, side by side under their names."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = Text("Prompt: ", style="bold")
    if len(prompt) > 1:  # an answer is read with the turns before it
        for turn in prompt:
            title.append(f"\n{turn['role']}: ", "dim").append(turn["content"])
    else:
        title.append(prompt[-1]["content"])
    table = Table(title=title, title_justify="left", expand=True)
    for name in answers:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*map(Text, answers.values()))
    Console().print(table)
