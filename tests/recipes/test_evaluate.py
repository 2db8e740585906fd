"""`evaluate` measures on what a run held out, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fulltune.config import build_config
from fulltune.errors import ConfigError, DataError, ModelError
from fulltune.recipes import evaluate, finetune


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, classification_file: Path
) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLTUNE_CACHE", str(folder / "cache"))
        data = shutil.copy(classification_file, folder / "questions.jsonl")
        values = {
            "model": str(tiny_bert),
            "task": {"kind": "classification", "train": str(data), "validation": "20 examples"},
            "duration": "2 steps",
            "batch": "16 examples",
            "precision": "fp32",
            "num_workers": 0,
            "run_dir": str(folder / "run"),
        }
        finetune.run(build_config(finetune.Config, values))
    return folder / "run"


def test_a_run_is_measured_on_what_it_held_out_as_it_measured_itself(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    report = evaluate.run(str(run), device="cpu")
    assert report.num_examples == 20
    assert report.metrics == pytest.approx(manifest["results"])
    assert [source["rows"] for source in manifest["data"]] == [120]


def test_what_only_other_data_needs_is_refused_without_it(run: Path) -> None:
    with pytest.raises(ConfigError, match="`--too-long` have no effect"):
        evaluate.run(str(run), too_long="drop", device="cpu")
    with pytest.raises(ConfigError, match="`--column`"):
        evaluate.run(str(run), columns={"text": "question"}, device="cpu")


def test_changed_data_has_another_validation_split_and_is_refused(run: Path) -> None:
    data = run.parent / "questions.jsonl"
    before = data.read_text(encoding="utf-8")
    data.write_text(before + '{"text": "Where is Bern?", "label": "place"}\n', encoding="utf-8")
    try:
        with pytest.raises(DataError, match=r"questions\.jsonl` changed since the run"):
            evaluate.run(str(run), device="cpu")
    finally:
        data.write_text(before, encoding="utf-8")


def test_a_settings_file_beside_a_model_does_not_make_it_a_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(run / "config.yaml", tmp_path / "config.yaml")
    shutil.copytree(run / "model", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="`model` is not a run"):
        evaluate.run("model", device="cpu")


def test_an_unfinished_run_says_how_it_goes_on(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        evaluate.run(str(tmp_path / "run"), device="cpu")
    assert "--resume" in str(caught.value.hint)
