"""`search`: trials within a budget; stopped, gone on with and shared; no failure is hidden."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fulltune.cli import main
from fulltune.config import build_config, load_config
from fulltune.errors import FulltuneError, MissingExtraError, RunFolderError, TrainingError
from fulltune.recipes import finetune, range_test, search
from fulltune.recipes.search_space import Choices, Range, parse_space
from fulltune.report.search_record import SearchRecord
from fulltune.tracking import read_metrics
from fulltune.train.run_folder import is_finished


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def write_search(
    folder: Path, model: Path, data: Path, *, change: Callable[[dict[str, Any]], Any] | None = None
) -> Path:
    values: dict[str, Any] = {
        "finetune": {
            "model": str(model),
            "task": {"kind": "classification", "train": str(data), "validation": "30 examples"},
            "duration": "8 steps",
            "batch": "8 examples",
            "precision": "fp32",
            "evaluate": {"every": "2 steps"},
            "save_every": "2 steps",
            "num_workers": 0,
        },
        "space": {"optimizer.lr": "1e-5..1e-2 log", "batch": ["4 examples", "8 examples"]},
        "budget": "4 trials",
        "run_dir": str(folder / "search"),
    }
    if change:
        change(values)
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def run_search(path: Path, *overrides: str, resume: bool = False) -> SearchRecord:
    record, interrupted = search.run(search.load(path, overrides), resume=resume)
    assert not interrupted
    return record


def outcomes(record: SearchRecord) -> list[tuple[Any, ...]]:
    return [(t.number, t.state, t.values, t.result, t.evaluations) for t in record.trials]


# -- the space -------------------------------------------------------------------------------------


def test_a_space_is_read_as_it_is_written() -> None:
    space = parse_space(
        {
            "optimizer.lr": "1e-5..1e-3 log",
            "batch": ["16 examples", "32 examples"],
            "duration": "1..4 epochs",
            "reinitialize_layers": "0..2",
            "optimizer": {"warmup": "0..20%"},
            "optimizer.betas": [[0.9, 0.98], [0.9, 0.999]],
        }
    )
    assert space == {
        "optimizer.lr": Range(1e-5, 1e-3, log=True),
        "batch": Choices(("16 examples", "32 examples")),
        "duration": Range(1, 4, unit="epochs"),
        "reinitialize_layers": Range(0, 2, whole=True),
        "optimizer.warmup": Range(0, 20, unit="%"),
        "optimizer.betas": Choices(([0.9, 0.98], [0.9, 0.999])),
    }
    assert space["duration"].setting(2.34567) == "2.346 epochs"
    assert space["optimizer.lr"].setting(0.000123456) == 0.0001235
    assert space["optimizer.betas"].setting("[0.9, 0.98]") == [0.9, 0.98]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "a setting that is not there": (
        lambda v: v.update(space={"optimizer.lrr": "1e-5..1e-3 log"}),
        "unknown setting `optimizer.lrr`", "did you mean `optimizer.lr`?",
    ),
    "a value beyond its limits": (
        lambda v: v.update(space={"dropout": "0.0..1.5"}),
        "`dropout` cannot be `1.5`: it must be less than 1", "",
    ),
    "a choice that cannot be": (
        lambda v: v.update(space={"optimizer.name": ["adamw", "lion"]}),
        "`optimizer.name` cannot be `lion`", "",
    ),
    "a folder": (
        lambda v: v.update(space={"run_dir": ["a", "b"]}),
        "`space.run_dir` cannot be searched: each trial has a folder of its own", "",
    ),
    "how trials are compared": (
        lambda v: v.update(space={"evaluate.metric": ["loss", "accuracy"]}),
        "`space.evaluate.metric` cannot be searched: trials would be compared by different", "",
    ),
    "a seed that moves the split": (
        lambda v: v.update(space={"seed": [0, 1]}),
        "`space.seed` cannot be searched here: it decides which examples are held out", "--seeds",
    ),
    "choices that contradict each other": (
        lambda v: v.update(
            space={"optimizer.name": ["adamw", "muon"], "optimizer.momentum": "0.8..0.99"}
        ),
        "`optimizer.momentum` has no effect with `optimizer.name: adamw`", "",
    ),
    "a range the wrong way": (
        lambda v: v.update(space={"optimizer.lr": "1e-3..1e-5 log"}),
        "`space.optimizer.lr` cannot be `1e-3..1e-5 log`: a range goes from the lower", "",
    ),
    "ratios from zero": (
        lambda v: v.update(space={"optimizer.weight_decay": "0..0.1 log"}),
        "`log`, begins above zero", "",
    ),
    "a range without its unit": (
        lambda v: v.update(space={"duration": "1..4"}),
        "`space.duration` cannot be `1..4`: the unit is missing", "LOW..HIGH UNIT",
    ),
    "a range of words": (
        lambda v: v.update(space={"scope": "1..4"}), "`scope` is not a number", "[ONE, OTHER]",
    ),
    "one value": (
        lambda v: v.update(space={"optimizer.lr": 1e-4}),
        "`space.optimizer.lr` cannot be `0.0001`", "write a range",
    ),
    "nothing": (lambda v: v.update(space={}), "`space` is empty", ""),
    "a choice twice": (
        lambda v: v.update(space={"batch": ["8 examples", "8 examples"]}), "a choice twice", "",
    ),
    "no unit of a budget": (
        lambda v: v.update(budget="5"), "`budget` cannot be `5`: the unit is missing", "trials",
    ),
    "nothing to compare by": (
        lambda v: v["finetune"].update(
            task={**v["finetune"]["task"], "validation": None}, evaluate={}
        ),
        "`finetune.task.validation` is null", "hold something out",
    ),
    "a range test of nothing": (
        lambda v: v.update(range_test=True, space={"optimizer.lr": [1e-4, 1e-3]}),
        "`range_test: true` narrows a range of `optimizer.lr`", "",
    ),
    "a folder for all trials": (
        lambda v: v["finetune"].update(run_dir="runs/a"), "`finetune.run_dir` has no effect", "",
    ),
    "a wrong setting of the trials": (
        lambda v: v["finetune"].update(durration="1 epoch"), "unknown setting `durration`", "",
    ),
    "data that is not there": (
        lambda v: v["finetune"]["task"].update(train="没有.jsonl"), "没有.jsonl", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_search_that_cannot_be_run_is_refused_before_its_folder_is_made(
    tmp_path: Path, tiny_bert: Path, classification_file: Path, name: str
) -> None:
    change, message, hint = WRONG[name]
    path = write_search(tmp_path, tiny_bert, classification_file, change=change)
    with pytest.raises(FulltuneError, match=re.escape(message)) as caught:
        search.run(search.load(path))
    assert caught.value.exit_code == 2
    assert hint in str(caught.value.hint)
    assert not (tmp_path / "search").exists()


def test_without_optuna_the_extra_is_named(
    tmp_path: Path, tiny_bert: Path, classification_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_search(tmp_path, tiny_bert, classification_file)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match="optuna") as caught:
        search.run(search.load(path))
    assert caught.value.hint == "pip install 'fulltune[search]'"


def test_under_torchrun_a_search_is_refused(
    tmp_path: Path, tiny_bert: Path, classification_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_search(tmp_path, tiny_bert, classification_file)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FulltuneError, match="does not run under `torchrun`"):
        search.run(search.load(path))


# -- trials ----------------------------------------------------------------------------------------


def test_the_best_trial_is_kept_its_settings_run_again_and_the_page_stands_alone(
    tmp_path: Path,
    tiny_bert: Path,
    classification_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_search(tmp_path, tiny_bert, classification_file)
    monkeypatch.setattr(sys, "argv", ["fulltune", "search", str(path), "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["is_over"]
    trials = found["trials"]
    assert [trial["number"] for trial in trials] == [0, 1, 2, 3]
    finished = [trial for trial in trials if trial["state"] == "finished"]
    best = min(finished, key=lambda trial: (trial["result"], trial["number"]))
    assert found["best"] == best["number"]
    assert len(finished) >= 3, "the first three are never given up"
    given_up = [trial for trial in trials if trial["state"] == "given up"]
    for trial in given_up:
        assert "best third" in trial["reason"]
        assert len(trial["evaluations"]) < 4
    folder = tmp_path / "search"
    kept = [trial["number"] for trial in trials if (Path(trial["folder"]) / "model").is_dir()]
    assert kept == [best["number"]]
    assert not list(folder.glob("trials/*/checkpoints")) or [
        each.parent.name for each in folder.glob("trials/*/checkpoints")
    ] == [f"{best['number']:04}"]
    model = Path(best["folder"]) / "model" / "model.safetensors"
    assert (folder / "model" / "model.safetensors").samefile(model)

    again = load_config(finetune.Config, folder / "best.yaml")
    result = finetune.run(again)
    assert result.metrics["loss"] == best["result"]

    page = (folder / "search.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=.?(?:https?:)?//|@import", page)
    for chart in ("line-chart", "parallel"):
        assert f'<svg class="{chart}"' in page
    for trial in given_up:
        assert trial["reason"] in page
    with pytest.raises(RunFolderError, match="holds a search"):
        run_search(path)


def test_a_budget_may_be_raised_and_nothing_else_may_change(
    tmp_path: Path, tiny_bert: Path, classification_file: Path
) -> None:
    path = write_search(tmp_path, tiny_bert, classification_file)
    first = run_search(path, "budget=2 trials", "keep=all")
    assert all((Path(trial.folder) / "model").is_dir() for trial in first.trials)
    with pytest.raises(RunFolderError, match="differs in `space`"):
        run_search(path, "space.optimizer.lr=1e-4..1e-3 log", resume=True)
    more = run_search(path, "budget=3 trials", "keep=all", resume=True)
    assert outcomes(more)[:2] == outcomes(first)
    assert len(more.trials) == 3
    tokens = sum(trial.tokens for trial in more.trials)
    steps = [
        event
        for trial in more.trials
        for event in read_metrics(Path(trial.folder) / "metrics.jsonl")
        if event["event"] == "step"
    ]
    assert tokens == sum(step["num_tokens"] for step in steps)
    same = run_search(path, f"budget={tokens} tokens", resume=True)
    assert outcomes(same) == outcomes(more), "the budget is spent"
    assert [(Path(trial.folder) / "model").is_dir() for trial in same.trials].count(True) == 1


def test_a_trial_whose_loss_is_not_finite_is_failed_by_name_and_the_search_goes_on(
    tmp_path: Path, tiny_bert: Path, classification_file: Path
) -> None:
    def change(values: dict[str, Any]) -> None:
        values["space"] = {"optimizer.lr": [1e-3, 1e30]}
        values["finetune"]["optimizer"] = {"clip_norm": None}

    path = write_search(tmp_path, tiny_bert, classification_file, change=change)
    record = run_search(path)
    states = {trial.values["optimizer.lr"]: trial for trial in record.trials}
    assert states[1e30].state == "failed"
    assert "nan" in str(states[1e30].reason).lower()
    assert states[1e-3].state == "finished"
    assert record.best == next(t.number for t in record.trials if t.state == "finished")
    page = (tmp_path / "search" / "search.html").read_text(encoding="utf-8")
    assert str(states[1e30].reason) in page


def test_where_no_trial_fits_the_memory_the_search_says_so_and_ends(
    tmp_path: Path, tiny_bert: Path, classification_file: Path
) -> None:
    path = write_search(
        tmp_path, tiny_bert, classification_file,
        change=lambda values: values["finetune"].update(memory="1 MiB"),
    )  # fmt: skip
    with pytest.raises(TrainingError, match="none of 5 trials gave a result: did not fit: the run"):
        run_search(path, "budget=9 trials")
    with pytest.raises(TrainingError, match="none of 5 trials"):
        run_search(path, "budget=9 trials", resume=True)


# -- the range test --------------------------------------------------------------------------------


def test_the_range_test_narrows_to_where_the_loss_falls() -> None:
    given = Range(1e-6, 1.0, log=True)
    rates = [1e-6 * 10 ** (6 * step / 99) for step in range(100)]
    losses = [
        2.0 - min(max(math.log10(rate) + 4, 0), 2) / 2 + max(math.log10(rate) + 1.5, 0) * 4
        for rate in rates
    ]
    low, high, verdict = range_test.judge(rates, losses, given)
    assert 1e-4 < low < 3e-4
    assert 5e-3 < high < 5e-2
    assert "lowest" in verdict
    low, high, verdict = range_test.judge(rates, [2.0] * 100, given)
    assert (low, high) == (1e-6, 1.0)
    assert "did not fall" in verdict
    low, high, verdict = range_test.judge(rates, [2.0] * 3, given)
    assert (low, high) == (1e-6, 1.0)
    assert "not finite after 3 steps" in verdict


def test_a_search_begins_in_the_range_that_the_test_found(
    tmp_path: Path, tiny_bert: Path, classification_file: Path
) -> None:
    def change(values: dict[str, Any]) -> None:
        values["space"]["optimizer.lr"] = "1e-7..1 log"
        values["range_test"] = True

    path = write_search(tmp_path, tiny_bert, classification_file, change=change)
    record = run_search(path, "budget=2 trials")
    test = record.range_test
    assert test is not None
    assert 1e-7 < test.low < test.high < 1
    assert all(test.low <= trial.values["optimizer.lr"] <= test.high for trial in record.trials)
    page = (tmp_path / "search" / "search.html").read_text(encoding="utf-8")
    assert "Range test of the learning rate" in page
    assert test.verdict in page
    assert run_search(path, "budget=2 trials", resume=True).range_test == test


# -- several processes, and kills ------------------------------------------------------------------


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fulltune", "search", str(path), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def has_checkpoint(trial: Path) -> bool:
    return any((trial / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_same_trial_to_the_same_end(
    tmp_path: Path, tiny_bert: Path, classification_file: Path
) -> None:
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "killed").mkdir()
    unbroken = run_search(write_search(tmp_path / "unbroken", tiny_bert, classification_file))
    path = write_search(tmp_path / "killed", tiny_bert, classification_file)
    folder = tmp_path / "killed" / "search"
    trial = folder / "trials" / "0001"
    process = start(path)
    wait_for(lambda: has_checkpoint(trial) or process.poll() is not None)
    process.kill()
    process.communicate()
    assert not is_finished(trial), "killed too late to prove anything"
    killed = run_search(path, resume=True)
    assert outcomes(killed) == outcomes(unbroken)
    assert any(event["event"] == "resume" for event in read_metrics(trial / "metrics.jsonl"))
    best = Path("model") / "model.safetensors"
    assert (folder / best).read_bytes() == (tmp_path / "unbroken/search" / best).read_bytes()


@pytest.mark.slow
def test_two_processes_share_a_search_and_ctrl_c_ends_one_with_its_trial_saved(
    tmp_path: Path, tiny_bert: Path, classification_file: Path
) -> None:
    path = write_search(
        tmp_path, tiny_bert, classification_file,
        change=lambda values: values.update(budget="6 trials", prune="none"),
    )  # fmt: skip
    folder = tmp_path / "search"
    first = start(path)
    wait_for(lambda: (folder / "search.db").exists() or first.poll() is not None)
    second = start(path, "--resume")
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    began = [re.findall(r"^trial (\d+): batch", errors, re.M) for _, errors in outputs]
    assert sorted(map(int, began[0] + began[1])) == [0, 1, 2, 3, 4, 5], "each trial once"
    assert all(began), "both processes had a share"
    record = run_search(path, resume=True)
    assert [trial.state for trial in record.trials] == ["finished"] * 6
    assert len({tuple(map(str, trial.values.values())) for trial in record.trials}) == 6

    third = start(path, "--resume", "budget=40 trials")
    wait_for(lambda: has_checkpoint(folder / "trials" / "0007") or third.poll() is not None)
    third.send_signal(signal.SIGINT)
    _, errors = third.communicate(timeout=60)
    assert third.returncode == 130, errors
    assert "go on with `--resume`" in errors
    assert "Traceback" not in errors


def test_a_search_file_is_not_taken_for_another_verb_s(
    tmp_path: Path, tiny_bert: Path, classification_file: Path
) -> None:
    path = write_search(tmp_path, tiny_bert, classification_file)
    other = tmp_path / "finetune.yaml"
    shared = yaml.safe_load(path.read_text(encoding="utf-8"))["finetune"]
    other.write_text(yaml.safe_dump({**shared, "run_dir": "runs/a"}), encoding="utf-8")
    values = {**yaml.safe_load(path.read_text(encoding="utf-8")), "finetune": str(other)}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert search.load(path).finetune == shared, "the settings may stand in a file of their own"
    with pytest.raises(FulltuneError, match="is a file for `fulltune finetune`"):
        search.load(other)
    assert build_config(search.Config, values).budget.unit == "trials"
