"""The application that verbs are added to, and the arguments they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="fulltune",
    help="Fine-tune every weight of a language model on your own data.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FLAG = " "  # typer would show `<bool>`
File = Annotated[Path, typer.Argument(help="Settings file (YAML).", metavar="FILE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that differ from the file, such as `optimizer.lr=5e-5`.", metavar="KEY=VALUE"
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        metavar=FLAG,
        help="Go on from the last checkpoint, or start where there is none.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", metavar=FLAG, help="Print JSON for a program to read.")
]
Model = Annotated[
    str,
    typer.Argument(
        help="A run folder, a model folder, a Hub name, a `.gguf` file or `asset:NAME`.",
        metavar="MODEL",
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="`auto`, `cpu`, `cuda` or `cuda:N`.")]
TRAIN, USE, LIST = "Train", "Use what was trained", "See what there is"
