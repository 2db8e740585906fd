"""The benchmark of labelling is run for real on a tiny model, and all peers give one answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fulltune.config import build_config
from fulltune.recipes import finetune

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "evaluate_speed.py"


@pytest.mark.slow
def test_all_peers_give_every_row_the_same_label(
    tiny_bert: Path, classification_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "cache"))
    settings = {
        "model": str(tiny_bert),
        "task": {"kind": "classification", "train": str(classification_file), "validation": None},
        "duration": "8 steps", "batch": "16 examples", "optimizer": {"lr": 3e-3},
        "precision": "fp32", "num_workers": 0, "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    finetune.run(build_config(finetune.Config, settings))
    options = f"--model {tmp_path / 'run' / 'model'} --data {classification_file} --rows 60"
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *options.split(), "--threads", "1", "--json", "out.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert result["num_rows"] == 60
    assert {peer: row["labels_that_differ"] for peer, row in result["peers"].items()} == {
        "fulltune": 0, "fulltune-quick": 0, "pipeline": 0, "pipeline-batched": 0,
    }  # fmt: skip
    assert all(row["seconds"] > 0 for row in result["peers"].values())
    assert "pipeline-batched" in ended.stdout
