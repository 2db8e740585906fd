"""The verb that measures methods against each other."""

from __future__ import annotations

import typer

from fulltune.cli.app import TRAIN, File, Json, Overrides, Resume, app
from fulltune.cli.printing import print_json, print_table


@app.command(rich_help_panel=TRAIN)
def compare(
    file: File, overrides: Overrides = None, resume: Resume = False, as_json: Json = False
) -> None:
    """Measure training all weights against less: head, last layers, LoRA."""
    from dataclasses import asdict
    from pathlib import Path

    from fulltune.recipes import compare as recipe
    from fulltune.recipes import compare_page

    config = recipe.load(file, overrides or [])
    result = recipe.run(config, resume=resume, say=lambda line: typer.echo(line, err=True))
    if not result.finished:
        typer.echo(f"interrupted; go on with `fulltune compare {file} --resume`", err=True)
        raise typer.Exit(130)
    page = compare_page.write(result, config, Path(config.run_dir))
    if as_json:
        print_json(asdict(result))
        return
    print_table(config.run_dir, compare_page.HEADERS, compare_page.rows_of(result))
    for sentence in compare_page.findings(result):
        typer.echo(sentence)
    typer.echo(f"page  {page}")
