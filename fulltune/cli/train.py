"""Verbs that train, and what comes before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulltune.cli.app import FLAG, TRAIN, File, Json, Overrides, Resume, app
from fulltune.cli.printing import print_answers, print_json, print_table

if TYPE_CHECKING:
    from fulltune.config import Settings
    from fulltune.recipes import finetune as finetune_recipe


DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        metavar=FLAG,
        help="Print the full settings and what the run would take, and train nothing.",
    ),
]


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
    from fulltune.recipes import preview as recipe

    config = recipe.read_config(file, overrides or [])
    if not recipe.run(config, num_samples=samples, html=html, as_json=as_json):
        raise typer.Exit(2)


@app.command(rich_help_panel=TRAIN)
def finetune(
    file: File,
    overrides: Overrides = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Run N seeds one after the other, and show the mean and spread of the results.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune all weights of a model on a task."""
    from fulltune.recipes import finetune as recipe
    from fulltune.recipes import settings_files

    config = settings_files.load(recipe.Config, file, overrides or [], verb="finetune")
    if seeds is not None:
        if dry_run:
            from fulltune.errors import ConfigError

            raise ConfigError(
                "`--dry-run` shows the plan of one run, and `--seeds` asks for several",
                hint="leave `--seeds` out: all of them take the same",
            )
        _run_seeds(config, seeds, resume=resume, as_json=as_json)
        return
    if dry_run:
        _print_plan(config, resume=resume, as_json=as_json)
        return
    _finetune(config, resume=resume, as_json=as_json)


@app.command(rich_help_panel=TRAIN)
def pretrain(
    file: File,
    overrides: Overrides = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a new model on raw text, or go on with one."""
    from fulltune.recipes import pretrain as recipe
    from fulltune.recipes import settings_files

    config = settings_files.load(recipe.Config, file, overrides or [], verb="pretrain")
    if dry_run:
        _print_plan(config, resume=resume, as_json=as_json)
        return
    _say_result(recipe.run(config, resume=resume), "text", as_json=as_json)


@app.command(rich_help_panel=TRAIN)
def chain(
    file: File,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", metavar=FLAG, help="Pass over finished steps and go on where it stopped."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", metavar=FLAG, help="Check all steps, and take none."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Take several steps from one file: corpus, tokenizer, pretrain, finetune, evaluate."""
    from fulltune.recipes import chain as recipe
    from fulltune.tracking import format_number, name_of

    steps = recipe.load(file)
    if dry_run:
        recipe.check(steps, resume=resume)
        _print_steps(str(file), steps, as_json=as_json)
        return
    results = recipe.run(steps, resume=resume, say=lambda line: typer.echo(line, err=True))
    if as_json:
        print_json([vars(result) for result in results])
    else:
        print_table(
            str(file),
            ("step", "result", "measured"),
            [
                (
                    result.verb + (" (was done)" if result.done_before else ""), result.result,
                    ", ".join(
                        f"{name_of(name)} {format_number(value)}"
                        for name, value in result.metrics.items()
                    ),
                )
                for result in results
            ],
        )  # fmt: skip
    if len(results) < len(steps):
        raise typer.Exit(130)


def _print_steps(title: str, steps: Sequence[Settings], *, as_json: bool) -> None:
    """What each step starts from and makes; the file itself has the settings."""
    from fulltune.recipes.chain_steps import KINDS, kind_of

    rows = []
    for step in steps:
        kind = KINDS[kind_of(step)]
        sources = [f"{source.setting} {source.value}" for source in kind.sources(step)]
        rows.append((kind_of(step), sources, getattr(step, kind.folder) if kind.folder else None))
    if as_json:
        print_json(
            [{"step": verb, "starts_from": sources, "makes": made} for verb, sources, made in rows]
        )
        return
    print_table(
        f"{title}: all steps can be taken",
        ("step", "starts from", "makes"),
        [(verb, ", ".join(sources), made or "") for verb, sources, made in rows],
    )


def _print_plan(config: finetune_recipe.Config, *, resume: bool, as_json: bool) -> None:
    """Settings as YAML that runs again; the plan in comments below them."""
    from dataclasses import asdict

    from fulltune.config import dump_config
    from fulltune.recipes import dry_run as recipe

    plan = recipe.plan(config, resume=resume)
    if not plan.is_main:
        return
    if as_json:
        print_json({"settings": config.model_dump(mode="json"), "plan": asdict(plan)})
        return
    typer.echo(dump_config(config), nl=False)
    for line in plan.lines():
        typer.echo(f"# {line}")


def _finetune(config: finetune_recipe.Config, *, resume: bool, as_json: bool = False) -> None:
    from fulltune.recipes import finetune as recipe

    _say_result(recipe.run(config, resume=resume), config.task.kind, as_json=as_json)


def _run_seeds(config: finetune_recipe.Config, count: int, *, resume: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from fulltune.recipes import seeds as recipe
    from fulltune.runtime import is_main_process

    say = (lambda line: typer.echo(line, err=True)) if is_main_process() else (lambda line: None)
    record, interrupted = recipe.run(config, count, resume=resume, say=say)
    if is_main_process():
        page = f"{record.run_dir}/{recipe.PAGE}"
        if as_json:
            print_json({**asdict(record), "page": page})
        elif record.runs:
            print_table(
                f"{len(record.runs)} of {count} seeds of {record.run_dir}",
                ("metric", "mean", "standard deviation", "lowest", "highest"),
                record.rows(),
            )
            typer.echo(f"page  {page}")
    if interrupted:
        raise typer.Exit(130)


def _say_result(result: finetune_recipe.Result, kind: str, *, as_json: bool) -> None:
    from fulltune.recipes import demo as demo_recipe
    from fulltune.tracking import format_number, name_of

    if not result.is_main:
        return
    run_dir = result.run_dir
    if as_json:
        print_json(
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
        print_answers(sample.prompt, {"before": sample.before, "after": sample.after})
    if result.metrics:
        values = (f"{name_of(key)} {format_number(value)}" for key, value in result.metrics.items())
        typer.echo(f"result  {', '.join(values)}")
    verb = "chat" if kind == "chat" else "evaluate"
    typer.echo(f"model   {run_dir / 'model'}")
    typer.echo(f"report  {run_dir / 'report.html'}")
    typer.echo(f"next    fulltune {verb} {run_dir}")


def _free_folder(folder: str, resume: bool) -> str:
    """The demo may be run twice: it takes the first free number."""
    if resume or not Path(folder).exists():
        return folder
    number = 2
    while Path(f"{folder}-{number}").exists():
        number += 1
    return f"{folder}-{number}"
