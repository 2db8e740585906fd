"""`finetune --seeds`: several seeds in one command, their mean and spread."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from fulltune.cli import main
from fulltune.config import build_config, dump_config
from fulltune.errors import ConfigError, RunFolderError
from fulltune.recipes import finetune, seeds
from fulltune.report.seeds_page import SeedRun


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def make_config(run_dir: Path, model: Path, data: Path, **changes: Any) -> finetune.Config:
    values: dict[str, Any] = {
        "model": str(model),
        "task": {"kind": "classification", "train": str(data), "validation": "30 examples"},
        "duration": "4 steps",
        "batch": "8 examples",
        "precision": "fp32",
        "optimizer": {"lr": 1e-3},
        "num_workers": 0,
        "run_dir": str(run_dir),
    }
    return build_config(finetune.Config, {**values, **changes})


def test_three_seeds_give_mean_deviation_and_range(
    tmp_path: Path,
    tiny_bert: Path,
    classification_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(tmp_path / "run", tiny_bert, classification_file)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    monkeypatch.setattr(
        sys, "argv", ["fulltune", "finetune", str(file), "--seeds", "3", "--json", "seed=4"]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    found = json.loads(capsys.readouterr().out)
    losses = [
        json.loads((tmp_path / "run" / f"seed-{seed}" / "manifest.json").read_text("utf-8"))[
            "results"
        ]["loss"]
        for seed in (4, 5, 6)
    ]
    assert [run["metrics"]["loss"] for run in found["runs"]] == losses
    spread = found["spreads"]["loss"]
    assert spread["mean"] == pytest.approx(statistics.mean(losses))
    assert spread["deviation"] == pytest.approx(statistics.stdev(losses))
    assert (spread["low"], spread["high"]) == (min(losses), max(losses))
    page = (tmp_path / "run" / "seeds.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=.?(?:https?:)?//|@import", page)
    assert "seed-6/report.html" in page

    with pytest.raises(RunFolderError, match="holds a run"):
        seeds.run(config.model_copy(update={"seed": 4}), 3)
    written = (tmp_path / "run" / "seed-5" / "model" / "model.safetensors").stat().st_mtime_ns
    record, interrupted = seeds.run(config.model_copy(update={"seed": 4}), 4, resume=True)
    assert not interrupted
    assert [run.seed for run in record.runs] == [4, 5, 6, 7]
    assert [run.metrics["loss"] for run in record.runs[:3]] == losses
    path = tmp_path / "run" / "seed-5" / "model" / "model.safetensors"
    assert path.stat().st_mtime_ns == written


def test_a_result_that_is_not_finite_is_not_left_out_of_the_spread() -> None:
    runs = [
        SeedRun(0, "seed-0", {"loss": 1.0}, 1.0),
        SeedRun(1, "seed-1", {"loss": math.nan}, 1.0),
    ]
    spread = seeds.spreads_of(runs)["loss"]
    assert all(map(math.isnan, (spread.mean, spread.deviation, spread.low, spread.high)))


def test_what_has_no_spread_is_refused(
    tmp_path: Path, tiny_bert: Path, classification_file: Path
) -> None:
    config = make_config(tmp_path / "run", tiny_bert, classification_file)
    with pytest.raises(ConfigError, match="`--seeds 1` has no spread"):
        seeds.run(config, 1)
    task = config.task.model_copy(update={"validation": None})
    with pytest.raises(ConfigError, match="holds nothing out"):
        seeds.run(config.model_copy(update={"task": task}), 2)
    assert not (tmp_path / "run").exists()
