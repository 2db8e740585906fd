"""Evaluations kept in the folder of their run: `evaluations/NAME.json`, and in its report.

The file of a result is replaced only by the same measurement again: of the same weights on the same
data with the same options. Any other gets a name of its own.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from fulltune.errors import FulltuneError
from fulltune.recipes.evaluate import EvaluationReport
from fulltune.recipes.held_out import run_folder
from fulltune.report.report import write_report
from fulltune.tracking import to_json_text
from fulltune.train.run_folder import EVALUATIONS, MODEL_LAST, write_atomically

REPORT = "report.html"


def keep_evaluation(report: EvaluationReport) -> str | None:
    """Keep an evaluation in the run that the model is or lies in, and show it in its report.

    Returns:
        What became of it, in words; None for a model that is in no run.
    """
    model = Path(report.model)
    folder = run_folder(model)
    if folder is None:
        return None
    document = {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "of": {**report.measured_on, "weights": _weights_of(folder, model)},
        **report.as_json(),
    }
    try:
        path = _place(folder / EVALUATIONS, _name_of(report, model), document["of"])
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, to_json_text(document, indent=1))
        if (folder / REPORT).exists():
            write_report([folder], folder / REPORT)
            return f"kept in {path}, shown in {folder / REPORT}"
    except OSError as error:
        return f"not kept in {folder}: {error.strerror or error}"
    except FulltuneError as error:
        return f"kept in {path}; the report was not written anew: {error}"
    return f"kept in {path}"


def _name_of(report: EvaluationReport, model: Path) -> str:
    """A name of letters of any script, digits and dashes."""
    data = report.measured_on["data"]
    parts = [MODEL_LAST] if model.name == MODEL_LAST else []
    parts.append(Path(data).stem if data and Path(data).suffix else data or "validation")
    if report.comparison is not None:
        parts += ["against", *Path(report.comparison.model).parts[-2:]]
    return re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-.") or "data"


def _place(folder: Path, name: str, of: dict[str, Any]) -> Path:
    """The file of this name, unless it is of another measurement: then the next that is free."""
    path, number = folder / f"{name}.json", 1
    while path.exists() and _measurement(path) != of:
        number += 1
        path = folder / f"{name}-{number}.json"
    return path


def _measurement(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("of")
    except (ValueError, AttributeError):
        return None  # not one of ours, and so not to be replaced


def _weights_of(folder: Path, model: Path) -> list[list[Any]]:
    """Name, size and time of the weight files, which tell a resumed run's model from the old."""
    inside = model if model != folder else folder / "model"
    return [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(inside.glob("*.safetensors"))
    ]
