"""The command line: verbs, a file, then `key=value`. Torch is imported only once a verb runs."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from fulltune.errors import FulltuneError

if TYPE_CHECKING:
    from fulltune.recipes import finetune as finetune_recipe

# Newer versions of typer carry a click of their own; this is the base of its errors in either.
CommandLineError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

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
SECONDS_FOR_THE_FIRST_RANK = 10
TRAIN, USE, LIST = "Train", "Use what was trained", "See what there is"


# -- train -----------------------------------------------------------------------------------------


@app.command(rich_help_panel=TRAIN)
def demo(
    run_dir: Annotated[
        str, typer.Option(metavar="FOLDER", help="Folder of the run.")
    ] = "runs/demo",
    resume: Annotated[
        bool, typer.Option("--resume", metavar=FLAG, help="Go on with an interrupted demo.")
    ] = False,
) -> None:
    """Fine-tune all weights of SmolLM2-135M on real instructions; nothing to configure."""
    from fulltune.recipes import demo as recipe

    _finetune(recipe.config(_free_folder(run_dir, resume)), resume=resume)


@app.command(rich_help_panel=TRAIN)
def preview(
    file: File,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, metavar="N", help="Examples shown by token.")] = 3,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a run would train on: coloured tokens, counts, leaks between splits."""
    from fulltune.config import load_config
    from fulltune.recipes import finetune as recipe
    from fulltune.recipes import preview as preview_recipe

    config = load_config(recipe.Config, file, overrides or [])
    if not preview_recipe.run(config, num_samples=samples, html=html, as_json=as_json):
        raise typer.Exit(2)


@app.command(rich_help_panel=TRAIN)
def finetune(
    file: File,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar=FLAG,
            help="Go on from the last checkpoint, or start where there is none.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", metavar=FLAG, help="Print the full settings, and train nothing."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune all weights of a model on a task."""
    from fulltune.config import dump_config, load_config
    from fulltune.recipes import finetune as recipe

    config = load_config(recipe.Config, file, overrides or [])
    if dry_run:
        typer.echo(dump_config(config), nl=False)
        return
    _finetune(config, resume=resume, as_json=as_json)


def _finetune(config: finetune_recipe.Config, *, resume: bool, as_json: bool = False) -> None:
    from fulltune.recipes import demo as demo_recipe
    from fulltune.recipes import finetune as recipe
    from fulltune.tracking import format_number, name_of

    result = recipe.run(config, resume=resume)
    if not result.is_main:
        return
    run_dir = result.run_dir
    if as_json:
        _print_json(
            {
                "run_dir": str(run_dir), "ending": result.ending, "step": result.step,
                "metrics": result.metrics, "model": str(run_dir / "model"),
            }
        )  # fmt: skip
    if result.ending == "interrupted":
        raise typer.Exit(130)
    if as_json:
        return
    if result.already_finished:
        typer.echo(f"{run_dir} is finished already")
    for sample in demo_recipe.compare_samples(run_dir):
        _print_sample(sample)
    if result.metrics:
        values = (f"{name_of(key)} {format_number(value)}" for key, value in result.metrics.items())
        typer.echo(f"result  {', '.join(values)}")
    kind = config.task.kind
    verb = "chat" if kind == "chat" else "evaluate"
    typer.echo(f"model   {run_dir / 'model'}")
    typer.echo(f"report  {run_dir / 'report.html'}")
    typer.echo(f"next    fulltune {verb} {run_dir}")


def _print_sample(sample: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(f"Prompt: {sample.prompt}", style="bold"), title_justify="left", expand=True
    )
    table.add_column("before", ratio=1, overflow="fold")
    table.add_column("after", ratio=1, overflow="fold")
    table.add_row(Text(sample.before), Text(sample.after))
    Console().print(table)


def _free_folder(folder: str, resume: bool) -> str:
    """The demo may be run twice: it takes the first free number."""
    if resume or not Path(folder).exists():
        return folder
    number = 2
    while Path(f"{folder}-{number}").exists():
        number += 1
    return f"{folder}-{number}"


# -- use -------------------------------------------------------------------------------------------


@app.command(rich_help_panel=USE)
def evaluate(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Labelled rows; without it, the validation split of the run."
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column", metavar="OURS=YOURS", help="Our field and your column, `text=question`."
        ),
    ] = None,
    too_long: Annotated[
        Literal["error", "truncate", "drop"] | None,
        typer.Option(
            help="What happens to an example of the data longer than the model was trained for; "
            "an error by default."
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model on held-out data."""
    from fulltune.recipes import evaluate as recipe

    report = recipe.run(
        model, data=data, columns=_columns(columns), too_long=too_long, device=device
    )
    if as_json:
        _print_json(
            {
                "model": report.model, "data": report.data, "num_examples": report.num_examples,
                "num_targets": report.num_targets, "metrics": report.metrics,
                "details": report.details,
            }
        )  # fmt: skip
        return
    _print_metrics(report)


@app.command(rich_help_panel=USE)
def predict(
    model: Model,
    source: Annotated[
        str, typer.Argument(help="Rows in any format that training reads.", metavar="INPUT")
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON Lines to write; without it, stdout.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", metavar=FLAG, help="Go on after the lines already written.")
    ] = False,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column", metavar="OURS=YOURS", help="Our field and your column, `text=question`."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest answer in tokens.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="X",
            help="Sample from the likeliest tokens of this probability.",
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the samples.")] = 0,
    too_long: Annotated[
        Literal["error", "truncate"],
        typer.Option(help="Classification: what happens to a text longer than the context."),
    ] = "error",
    device: Device = "auto",
) -> None:
    """Answer or label every row of a file; streaming, and resumable."""
    from fulltune.config import build_config
    from fulltune.inference import GenerationSettings
    from fulltune.recipes import predict as recipe

    settings = build_config(
        GenerationSettings,
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
        },
    )
    result = recipe.run(
        model, source, output=output, resume=resume, settings=settings, columns=_columns(columns),
        too_long=too_long, device=device,
    )  # fmt: skip
    if result.output is not None:
        kept = f" ({result.num_kept:,} were there)" if result.num_kept else ""
        typer.echo(f"{result.num_predicted:,} predictions in {result.output}{kept}", err=True)


@app.command(rich_help_panel=USE)
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest answer in tokens.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="0 takes the likeliest token.")
    ] = 0.0,
    device: Device = "auto",
) -> None:
    """Talk with a model in the terminal."""
    from fulltune.inference import GenerationSettings
    from fulltune.recipes import chat as recipe

    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature)
    recipe.run(model, settings=settings, system=system, device=device)


@app.command(rich_help_panel=USE)
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="One run folder, or several to compare.", metavar="RUN")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page to write; without it, `report.html` in the first run."
        ),
    ] = None,
) -> None:
    """Write one page of curves, settings, data and samples; several runs side by side."""
    from fulltune.report.report import write_report

    name = "report.html" if len(runs) == 1 else "comparison.html"
    typer.echo(write_report(runs, output or runs[0] / name))


# -- list ------------------------------------------------------------------------------------------


@app.command(rich_help_panel=LIST)
def settings(
    verb: Annotated[
        Literal["finetune"], typer.Argument(help="The verb whose settings to list.")
    ] = "finetune",
    as_json: Json = False,
) -> None:
    """List every setting with what it accepts, its default and its meaning."""
    from fulltune.config import list_settings
    from fulltune.recipes import finetune as recipe

    rows = list(list_settings(recipe.Config))
    if as_json:
        _print_json([vars(row) for row in rows])
        return
    _print_table(
        f"Settings of fulltune {verb}",
        ("setting", "default", "meaning, and what is accepted"),
        [(row.key, row.default, f"{row.meaning}\n{row.kind}") for row in rows],
    )


@app.command(rich_help_panel=LIST)
def tasks(as_json: Json = False) -> None:
    """List the kinds of task."""
    from fulltune.data.tasks import TASKS

    rows = [
        {
            "kind": task.kind, "summary": task.summary, "fields": list(task.fields),
            "optional_fields": list(task.optional_fields), "metrics": list(task.metrics),
        }
        for task in TASKS.values()
    ]  # fmt: skip
    if as_json:
        _print_json(rows)
        return
    _print_table(
        "Tasks",
        ("kind", "what is trained", "fields", "metrics"),
        [
            (
                str(row["kind"]), str(row["summary"]),
                ", ".join([*task.fields, *(f"[{name}]" for name in task.optional_fields)]),
                ", ".join(task.metrics),
            )
            for row, task in zip(rows, TASKS.values(), strict=True)
        ],
    )  # fmt: skip


@app.command(rich_help_panel=LIST)
def models(as_json: Json = False) -> None:
    """List the families of models, and the models that can be fetched by name."""
    from fulltune.models.families import FAMILIES

    families: dict[tuple[str, bool], list[str]] = {}
    for name, family in FAMILIES.items():
        tasks = "chat, text, classification" if family.can_generate else "classification"
        families.setdefault((tasks, family.can_pack), []).append(name)
    if as_json:
        _print_json(
            {
                "families": [
                    {"tasks": tasks.split(", "), "packs": packs, "model_types": names}
                    for (tasks, packs), names in families.items()
                ],
                "models": _describe_assets("model"),
            }
        )
        return
    _print_table(
        "Families",
        ("tasks", "packs", "model types of transformers"),
        [
            (tasks, "yes" if packs else "no", ", ".join(names))
            for (tasks, packs), names in sorted(families.items())
        ]
        + [("chat, text, classification", "no", "every other decoder with a language model head")],
    )
    typer.echo()
    _print_assets("model")
    typer.echo("\nAlso a model folder, a run folder, a .gguf file, or a Hub name, OWNER/NAME.")


@app.command(rich_help_panel=LIST)
def assets(as_json: Json = False) -> None:
    """List models and data that can be fetched by name, with source and licence."""
    if as_json:
        _print_json(_describe_assets(None))
        return
    _print_assets("model")
    typer.echo()
    _print_assets("data")


def _describe_assets(kind: str | None) -> list[dict[str, str]]:
    from fulltune.assets import list_assets

    return [
        {
            "name": f"asset:{asset.name}", "kind": asset.kind, "summary": asset.summary,
            "licence": asset.licence, "source": asset.source,
            "package": f"{asset.package}=={asset.version}",
        }
        for asset in list_assets()
        if kind in (None, asset.kind)
    ]  # fmt: skip


def _print_assets(kind: str) -> None:
    _print_table(
        "Models by name" if kind == "model" else "Data by name",
        ("name", "what it is; source, licence and package"),
        [
            (
                row["name"],
                f"{row['summary']}\n{row['source']}; {row['licence']}; {row['package']}",
            )
            for row in _describe_assets(kind)
        ],
    )


# -- printing --------------------------------------------------------------------------------------


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows without borders; what follows the first line of a cell is dimmed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.padding = (0, 2, 0, 0)
    for index, name in enumerate(header):
        table.add_column(name, no_wrap=index == 0, overflow="fold", header_style="dim")
    for row in rows:
        cells = [cell.partition("\n") for cell in row]
        table.add_row(*(Text(first + feed).append(rest, "dim") for first, feed, rest in cells))
    Console(highlight=False).print(table)


def _print_metrics(report: Any) -> None:
    from fulltune.tracking import format_number

    typer.echo(f"{report.model} on {report.data}: {report.num_examples:,} examples")
    width = max(len(name) for name in report.metrics)
    for name, value in report.metrics.items():
        typer.echo(f"  {name:<{width}}  {format_number(value)}")
    per_label = report.details.get("per_label")
    if per_label:
        _print_table(
            "Labels",
            ("label", "precision", "recall", "f1", "examples"),
            [
                (
                    label, f"{values['precision']:.3f}", f"{values['recall']:.3f}",
                    f"{values['f1']:.3f}", f"{values['support']:,}",
                )
                for label, values in per_label.items()
            ],
        )  # fmt: skip


def _columns(pairs: list[str] | None) -> dict[str, str]:
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


# -- the door --------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Run a verb. A user's mistake is printed without a traceback; a bug keeps its own."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    for noisy in ("httpx", "huggingface_hub", "transformers", "datasets", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    code: int | None = 0
    try:
        code = app(prog_name="fulltune", standalone_mode=False)
        sys.stdout.flush()
    except FulltuneError as error:
        _fail(str(error), error.hint, error.exit_code)
    except CommandLineError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        _fail(*_explain_usage(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", None, 130)
    except BrokenPipeError:
        # Who read the output has left, as `head` does; what is still buffered has no reader.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code)


def _explain_usage(error: Any) -> tuple[str, str]:
    """A wrong command line in the words of the other errors."""
    message = str(error.format_message()).strip().rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "fulltune"
    see = f"`{command} --help` shows what is possible"
    for before in (" Did you mean ", " (Possible options: "):
        wanted, found, near = message.partition(before)
        if found:
            near = near.strip("'?()")
            return _worded(wanted), f"did you mean `{near}`? {see}"
    return _worded(message), see


def _worded(message: str) -> str:
    """Backticks where typer quotes, and no second `error`."""
    message = message.rstrip(". ").replace("'", "`").replace("Value error, ", "")
    message = message.replace("Input should be", "it must be").replace("option: -", "option -")
    return message[:1].lower() + message[1:]


def _fail(message: str, hint: str | None, code: int) -> NoReturn:
    from fulltune.runtime import is_main_process

    if not is_main_process():
        # All ranks fail alike, and the first one says it. Were this one gone before, torchrun
        # would end the first without a word; it ends this one as soon as the first is gone.
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
        sys.exit(code)
    _say("error:", "red", message)
    if hint:
        _say("hint:", "cyan", hint)
    sys.exit(code)


def _say(word: str, colour: str, text: str) -> None:
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    typer.echo(f"{typer.style(word, fg=colour, bold=True) if coloured else word} {text}", err=True)
