"""`fulltune report`: one self-contained HTML page about a run, or about several side by side.

The page asks nothing of the network: style, script and charts are inside it. Everything that comes
from data, settings or answers is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from fulltune.errors import RunFolderError
from fulltune.report.comparison import describe_comparison
from fulltune.report.model_card import render_model_card
from fulltune.report.one_run import describe_run
from fulltune.report.run_record import read_run

__all__ = ["render_model_card", "write_page", "write_report"]


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write one HTML page about one run, or comparing several.

    Args:
        runs: run folders; an unfinished run works too.
        output: the file to write.

    Returns:
        `output`.

    Raises:
        RunFolderError: a folder is not a run's, or the page cannot be written.
        DataError: a run has no metrics, or a file in it was changed.
    """
    if not runs:
        raise RunFolderError("no run was given", hint="give the folder of at least one run")
    records = [read_run(run) for run in runs]
    if len(records) == 1:
        return write_page(output, "run.html.j2", describe_run(records[0]))
    return write_page(output, "comparison.html.j2", describe_comparison(records))


def write_page(output: Path, template: str, values: Mapping[str, Any]) -> Path:
    """Fill a template of this package, and write it whole or not at all.

    Raises:
        RunFolderError: the page cannot be written.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("fulltune.report"), PackageLoader("fulltune.data")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(values)
    temporary = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(output)
    except OSError as error:
        raise RunFolderError(
            f"`{output}` cannot be written: {error.strerror or error}",
            hint="choose another place with `--output`",
        ) from error
    return output
