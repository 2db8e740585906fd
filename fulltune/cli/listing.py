"""Verbs that say what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fulltune.cli.app import LIST, Json, app
from fulltune.cli.printing import print_entries, print_json, print_table

if TYPE_CHECKING:
    from fulltune.config import SettingRow


@app.command(rich_help_panel=LIST)
def settings(
    verb: Annotated[
        Literal["finetune", "search", "pretrain", "corpus", "chain", "compare"],
        typer.Argument(help="The verb whose settings to list."),
    ] = "finetune",
    as_json: Json = False,
) -> None:
    """List every setting with what it accepts, its default and its meaning."""
    rows = _rows_of(verb)
    if as_json:
        print_json([vars(row) for row in rows])
        return
    print_entries(
        f"Settings of fulltune {verb}, with default, meaning, and what is accepted",
        [(row.key, row.default, row.meaning, row.kind) for row in rows],
    )


def _rows_of(verb: str) -> list[SettingRow]:
    from dataclasses import replace
    from importlib import import_module

    from fulltune.config import list_settings

    if verb == "chain":
        from fulltune.recipes.chain_steps import list_step_settings

        return list(list_step_settings())
    recipe = import_module(f"fulltune.recipes.{verb}")
    without_effect = getattr(recipe, "WITHOUT_EFFECT", ())
    only = getattr(recipe, "ONLY_CHOICE", {})
    return [
        replace(row, kind=only.get(row.key, row.kind))
        for row in list_settings(recipe.Config)
        if row.key not in without_effect
    ]


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
        print_json(rows)
        return
    print_table(
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
    from fulltune.models.families import FAMILIES, GPT
    from fulltune.models.presets import PRESETS
    from fulltune.objectives.of_task import kinds_of
    from fulltune.recipes.pretrain import objectives_of

    families: dict[tuple[str, str, bool], list[str]] = {}
    for name, family in FAMILIES.items():
        tasks = ", ".join(kinds_of(family))
        objectives = ", ".join(objectives_of(family))
        families.setdefault((tasks, objectives, family.can_pack), []).append(name)
    if as_json:
        print_json(
            {
                "families": [
                    {
                        "tasks": tasks.split(", "), "objectives": objectives.split(", "),
                        "packs": packs, "model_types": names,
                    }
                    for (tasks, objectives, packs), names in families.items()
                ],
                "models": _describe_assets("model"),
                "sizes": {
                    name: {"model_type": preset.model_type, **preset.values}
                    for name, preset in PRESETS.items()
                },
            }
        )  # fmt: skip
        return
    rows = sorted(families.items())
    rows.append(
        (
            (", ".join(kinds_of(GPT)), "causal_lm", False),
            ["every other decoder with a language model head"],
        )
    )
    print_entries(
        "Families: what they are pre-trained on and fine-tuned for, and the types of transformers",
        [
            (
                objectives,
                "packed without padding" if packs else "padded batches of like lengths",
                f"finetune: {tasks}",
                ", ".join(names),
            )
            for (tasks, objectives, packs), names in rows
        ],
    )
    typer.echo()
    _print_table_of_sizes()
    typer.echo()
    _print_assets("model")
    typer.echo("\nAlso a model folder, a run folder, a .gguf file, or a Hub name, OWNER/NAME.")


def _print_table_of_sizes() -> None:
    from fulltune.models.presets import PRESETS

    print_table(
        "Sizes of new models, for `fulltune pretrain`",
        ("name", "what differs from the defaults of transformers"),
        [
            (name, ", ".join(f"{key} {value}" for key, value in preset.values.items()))
            for name, preset in PRESETS.items()
        ],
    )


@app.command(rich_help_panel=LIST)
def assets(as_json: Json = False) -> None:
    """List models and data that can be fetched by name, with source and licence."""
    if as_json:
        print_json(_describe_assets(None))
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
            "package": asset.package.pinned, "registry": asset.package.registry,
        }
        for asset in list_assets()
        if kind in (None, asset.kind)
    ]  # fmt: skip


def _print_assets(kind: str) -> None:
    print_table(
        "Models by name" if kind == "model" else "Data by name",
        ("name", "what it is; source, licence and package"),
        [
            (
                row["name"],
                f"{row['summary']}\n{row['source']}; {row['licence']}; {row['package']}"
                + (" of npm" if row["registry"] == "npm" else ""),
            )
            for row in _describe_assets(kind)
        ],
    )
