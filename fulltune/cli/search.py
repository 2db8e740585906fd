"""The verb that searches for settings."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fulltune.cli.app import FLAG, TRAIN, File, Json, Overrides, app
from fulltune.cli.printing import print_json, print_table

if TYPE_CHECKING:
    from fulltune.report.search_record import SearchRecord, TrialRecord

GO_ON = "interrupted; go on with `--resume`"


@app.command(rich_help_panel=TRAIN)
def search(
    file: File,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar=FLAG,
            help="Go on with the search, or join another process that works on it.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the settings that fine-tune best: trials within a budget, poor ones given up."""
    from fulltune.recipes import search as recipe

    config = recipe.load(file, overrides or [])
    try:
        record, interrupted = recipe.run(
            config, resume=resume, say=lambda line: typer.echo(line, err=True)
        )
    except KeyboardInterrupt:  # between two trials, or while one was prepared
        typer.echo(GO_ON, err=True)
        raise typer.Exit(130) from None
    if as_json:
        found = asdict(record)
        del found["scales"]  # of the page's axes
        print_json(
            {
                **found,
                "best_settings": f"{record.run_dir}/best.yaml" if record.best_trial else None,
                "model": f"{record.run_dir}/model" if record.best_trial else None,
                "page": f"{record.run_dir}/search.html",
            }
        )
    else:
        _print_record(record)
    if interrupted:
        typer.echo(GO_ON, err=True)
        raise typer.Exit(130)


def short_names(keys: list[str]) -> list[str]:
    """The last part of each setting, where no other has the same: a table has little room."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]


def _print_record(record: SearchRecord) -> None:
    from fulltune.report.search_charts import value_text
    from fulltune.report.words import metric_text
    from fulltune.tracking import name_of

    def row(trial: TrialRecord) -> tuple[str, ...]:
        result = "" if trial.result is None else metric_text(record.metric, trial.result)
        shown = (
            value_text(trial.values[key]) if key in trial.values else "" for key in record.space
        )
        mark = " (best)" if trial.number == record.best else ""
        return (f"{trial.number}{mark}", result, trial.state, *shown, trial.reason or "")

    print_table(
        f"{record.run_dir}: {record.spent} of {record.budget}",
        ("trial", name_of(record.metric), "state", *short_names(list(record.space)), "reason"),
        [row(trial) for trial in record.trials],
    )
    if record.importances.shares:
        shares = (f"{key} {share:.0%}" for key, share in record.importances.shares.items())
        typer.echo(f"{record.importances.title}: {', '.join(shares)}")
    if record.best_trial is not None:
        typer.echo(f"settings  {record.run_dir}/best.yaml")
        typer.echo(f"model     {record.run_dir}/model")
    typer.echo(f"page      {record.run_dir}/search.html")
