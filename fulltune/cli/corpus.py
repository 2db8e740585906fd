"""The verb that prepares a corpus."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fulltune.cli.app import FLAG, TRAIN, File, Json, Overrides, app
from fulltune.cli.printing import print_json, print_table

MOST_REASONS = 6


@app.command(rich_help_panel=TRAIN)
def corpus(
    file: File,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar=FLAG,
            help="Go on after the finished chunks, or start where there are none.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", metavar=FLAG, help="Print the full settings, and do nothing."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Prepare a corpus: clean, filter, deduplicate, decontaminate and split raw text."""
    from fulltune.config import dump_config
    from fulltune.recipes import corpus as recipe
    from fulltune.recipes import settings_files

    config = settings_files.load(recipe.Config, file, overrides or [], verb="corpus")
    if dry_run:
        typer.echo(dump_config(config), nl=False)
        return
    result = recipe.run(config, resume=resume)
    if as_json:
        print_json({"corpus": str(result.folder), **result.manifest})
        return
    if result.already_finished:
        typer.echo(f"{result.folder} is finished already")
    _print_stages(result.manifest)
    for split, held in result.manifest["splits"].items():
        typer.echo(
            f"{split:<11}{result.folder / split}: {held['documents']:,} documents, "
            f"{held['characters']:,} characters, {held['bytes']:,} bytes"
        )
    typer.echo(f"manifest   {result.folder / 'manifest.json'}")
    sides = [f"{split}: {result.folder / split}" for split in result.manifest["splits"]]
    typer.echo(f"next       task: {{kind: text, {', '.join(sides)}}}")


def _print_stages(manifest: dict[str, Any]) -> None:
    rows = []
    for stage in manifest["stages"]:
        removed, documents_in = stage["removed"]["documents"], stage["documents_in"]
        reasons = sorted(stage["reasons"].items(), key=lambda item: (-item[1], item[0]))
        said = ", ".join(f"{reason} {count:,}" for reason, count in reasons[:MOST_REASONS])
        if len(reasons) > MOST_REASONS:
            said += f", and {len(reasons) - MOST_REASONS} more"
        if stage["changed"]:
            characters = stage["removed"]["characters"]
            said = f"changed {stage['changed']:,} ({characters:,} characters less): {said}"
        share = f"{removed / documents_in:.1%}" if documents_in else "-"
        examples = f"\n{', '.join(stage['examples'])}" if stage["examples"] else ""
        rows.append((stage["name"], f"{documents_in:,}", f"{removed:,}", share, said + examples))
    print_table("Corpus", ("stage", "documents in", "removed", "share", "reasons"), rows)
