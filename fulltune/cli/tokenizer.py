"""`fulltune tokenizer train`, `compare` and `extend`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fulltune.cli.app import FLAG, TRAIN, Json, Model, app
from fulltune.cli.printing import parse_columns, print_json, print_table

if TYPE_CHECKING:
    from fulltune.data.tokenizer_statistics import TokenizerStatistics

tokenizer_app = typer.Typer(
    help="Train a tokenizer, compare several, or add tokens to a model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(tokenizer_app, name="tokenizer", rich_help_panel=TRAIN)

Output = Annotated[
    Path, typer.Option(metavar="FOLDER", help="Folder to write; it must not exist yet.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="OURS=YOURS", help="Our field and your column, `text=article`."
    ),
]


@tokenizer_app.command()
def train(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Text: files, folders, `asset:NAME` or `hub:OWNER/NAME`.", metavar="SOURCE"
        ),
    ],
    output: Output,
    family: Annotated[
        Literal["gpt", "bert", "xlnet", "t5"],
        typer.Option(help="Models it is for; says the special tokens."),
    ],
    algorithm: Annotated[
        Literal["bpe", "wordpiece", "unigram", "characters"] | None,
        typer.Option(help="How pieces are found; the family's own by default."),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens in all, exactly; by default the family's usual number.",
        ),
    ] = None,
    lowercase: Annotated[
        bool, typer.Option("--lowercase", metavar=FLAG, help="Read every text in lower case.")
    ] = False,
    fill_in_the_middle: Annotated[
        bool,
        typer.Option(
            "--fill-in-the-middle",
            metavar=FLAG,
            help="GPT: add the tokens that `objective.fim_rate` of pre-training needs.",
        ),
    ] = False,
    columns: Columns = None,
    held_out: Annotated[
        float,
        typer.Option(
            min=0.0, max=0.9, metavar="SHARE", help="Share of the documents to measure on."
        ),
    ] = 0.05,
    character_coverage: Annotated[
        float,
        typer.Option(
            min=0.9, max=1.0, metavar="SHARE",
            help="WordPiece, unigram: share of the characters that pieces are made of; less "
            "leaves the rarest unknown.",
        ),
    ] = 1.0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train a tokenizer on your text; the same text gives the same bytes."""
    from fulltune.config import build_config
    from fulltune.data.tokenizers import TokenizerConfig
    from fulltune.recipes import tokenizer as recipe

    config = build_config(
        TokenizerConfig,
        {
            "family": family, "algorithm": algorithm, "vocab_size": vocab_size,
            "lowercase": lowercase, "fill_in_the_middle": fill_in_the_middle, "held_out": held_out,
            "character_coverage": character_coverage,
        },
    )  # fmt: skip
    trained = recipe.train(sources, output, config, columns=parse_columns(columns))
    if as_json:
        print_json(
            {
                "output": str(trained.folder),
                "num_training_documents": trained.num_training_documents,
                "measured_on": trained.measured_on, **trained.statistics.to_json(),
            }
        )  # fmt: skip
        return
    where = "held-out" if trained.measured_on == "held_out" else "the training"
    _print_statistics(f"Measured on {where} text", {str(output): trained.statistics})
    if trained.measured_on == "training" and held_out > 0:
        typer.echo("the documents are too few to hold any out", err=True)


@tokenizer_app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Tokenizer folders, model folders, Hub names or `asset:NAME`.",
            metavar="TOKENIZER",
        ),
    ],
    data: Annotated[str, typer.Option(metavar="SOURCE", help="Text to measure on.")],
    columns: Columns = None,
    as_json: Json = False,
) -> None:
    """Measure tokenizers side by side on the same text."""
    from fulltune.recipes import tokenizer as recipe

    statistics = recipe.compare(models, data, columns=parse_columns(columns))
    if as_json:
        print_json({model: found.to_json() for model, found in statistics.items()})
        return
    _print_statistics(f"Measured on {data}", statistics)


@tokenizer_app.command()
def extend(
    model: Model,
    output: Output,
    add: Annotated[
        list[str] | None,
        typer.Option("--add", metavar="TOKEN", help="A token to add; may be given several times."),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tokens to add, one a line.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Add tokens to a trained model; their embeddings start as the mean of their old pieces."""
    from fulltune.recipes import tokenizer as recipe

    wanted = [*(recipe.read_tokens(tokens) if tokens else []), *(add or [])]
    extended = recipe.extend(model, wanted, output)
    if as_json:
        print_json(
            {
                "output": str(extended.folder), "vocab_size": extended.vocab_size,
                "added": extended.pieces,
            }
        )  # fmt: skip
        return
    print_table(
        "Tokens added",
        ("token", "mean of"),
        # Quoted, as a space belongs to a piece.
        [
            (token, " ".join(f"`{each}`" for each in held))
            for token, held in extended.pieces.items()
        ],
    )
    typer.echo(f"{extended.vocab_size:,} embeddings in {extended.folder}", err=True)


def _print_statistics(title: str, statistics: Mapping[str, TokenizerStatistics]) -> None:
    columns = list(statistics.values())
    rows: list[tuple[str, list[str]]] = [
        ("vocabulary", [f"{found.vocab_size:,}" for found in columns]),
        ("documents", [f"{found.num_documents:,}" for found in columns]),
        ("bytes", [f"{found.num_bytes:,}" for found in columns]),
        ("tokens", [f"{found.num_tokens:,}" for found in columns]),
        ("distinct tokens", [f"{found.num_distinct_tokens:,}" for found in columns]),
        ("tokens per byte", [f"{found.tokens_per_byte:.4f}" for found in columns]),
        ("bytes per token", [f"{found.bytes_per_token:.3f}" for found in columns]),
        ("coverage", [f"{found.coverage:.4%}" for found in columns]),
        ("longest tokens", ["\n".join(map(repr, found.longest_tokens)) for found in columns]),
    ]
    print_table(title, ("", *statistics), [(name, *values) for name, values in rows])
