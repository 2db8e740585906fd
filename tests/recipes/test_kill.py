"""A run that is killed, or whose disk is full or read-only, loses nothing and resumes exactly."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fulltune.config import build_config, dump_config
from fulltune.errors import CheckpointError, FulltuneError, RunFolderError
from fulltune.recipes import finetune, finish, resume, trainer
from fulltune.tracking import read_metrics
from fulltune.train.checkpoint import last_checkpoint

KILLS = Path(__file__).parents[2] / "benchmarks" / "kills.py"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    ["--verb finetune", "--verb pretrain --objectives causal_lm"],
    ids=["fine-tuning", "a stream of a corpus"],
)
def test_killed_runs_resume_to_the_same_bits(options: str) -> None:
    numbers = "--kills 6 --kills-per-run 3 --seed 1"
    done = subprocess.run(
        [sys.executable, str(KILLS), *options.split(), *numbers.split()],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["kills"] == 6
    assert summary["lost_checkpoints"] == 0
    assert summary["faults"] == []


# -- a disk that is full, or read-only -------------------------------------------------------------


def make_config(run_dir: Path, model: Path, data: Path) -> finetune.Config:
    return build_config(
        finetune.Config,
        {
            "model": str(model),
            "task": {"kind": "chat", "train": str(data), "validation": "4 examples"},
            "duration": "36 steps",
            "batch": "2 examples",
            "dropout": 0.1,
            "precision": "fp32",
            "optimizer": {"lr": 1e-3},
            "evaluate": {"every": "12 steps", "num_samples": 1},
            "save_every": "12 steps",
            "num_workers": 0,
            "run_dir": str(run_dir),
        },
    )


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, chat_file: Path
) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLTUNE_CACHE", str(run_dir.parent / "cache"))
        finetune.run(make_config(run_dir, tiny_llama, chat_file))
    return left_behind(run_dir)


def left_behind(run_dir: Path) -> dict[str, Any]:
    checkpoint, problems = last_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None
    assert not problems
    events = read_metrics(run_dir / "metrics.jsonl")
    return {
        "weights": checkpoint.tensors("weights"),
        "optimizer": checkpoint.tensors("optimizer"),
        "exported": load_file(run_dir / "model" / "model.safetensors"),
        "losses": [(e["step"], e["loss"]) for e in events if e["event"] == "step"],
        "samples": (run_dir / "samples.jsonl").read_text(encoding="utf-8"),
        "files": {str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file()},
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("weights", "optimizer", "exported"):
        assert found[name].keys() == expected[name].keys()
        assert all(torch.equal(found[name][key], expected[name][key]) for key in expected[name])
    for name in ("losses", "samples", "files"):
        assert found[name] == expected[name], name


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs permission to mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A disk of eight MiB, which a run of the tiny model does not fill."""
    if shutil.which("mount") is None or sys.platform != "linux":
        pytest.skip("needs `mount` of Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk))
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def before_call(
    monkeypatch: pytest.MonkeyPatch,
    attribute: str,
    number: int,
    action: Callable[[], None],
    *,
    of_checkpoint: str = "",
) -> None:
    """Have something happen to the disk just before the engine's nth call of a function."""
    module = next(module for module in (trainer, resume, finish) if hasattr(module, attribute))
    function = getattr(module, attribute)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += not of_checkpoint or args[1].startswith(of_checkpoint)
        if calls == number:
            calls += 1
            action()
        return function(*args, **kwargs)

    monkeypatch.setattr(module, attribute, wrapped)


@pytest.mark.parametrize(
    ("attribute", "number", "of_checkpoint", "saved", "error", "message"),
    [
        ("save_checkpoint", 2, "step-", 12, CheckpointError, "checkpoint of step 24"),
        ("save_checkpoint", 2, "best-", 12, CheckpointError, "checkpoint of step 24"),
        ("save_model", 1, "", 36, RunFolderError, "model` cannot be written"),
        ("write_report", 1, "", 36, RunFolderError, "cannot be written"),
        ("train_step", 13, "", 12, RunFolderError, r"metrics\.jsonl` cannot be written"),
    ],
    ids=["checkpoint", "best", "model", "report", "metrics"],
)
def test_a_full_disk_stops_the_run_and_resume_goes_on_to_the_same_bits(
    small_disk: Path,
    tiny_llama: Path,
    chat_file: Path,
    unbroken: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    attribute: str,
    number: int,
    of_checkpoint: str,
    saved: int,
    error: type[FulltuneError],
    message: str,
) -> None:
    config = make_config(small_disk / "run", tiny_llama, chat_file)
    with monkeypatch.context() as patch:
        before_call(patch, attribute, number, lambda: fill(small_disk), of_checkpoint=of_checkpoint)
        with pytest.raises(error, match=message) as caught:
            finetune.run(config)
    assert "No space left on device" in str(caught.value)
    assert caught.value.hint is not None
    assert "free" in caught.value.hint
    checkpoint, problems = last_checkpoint(small_disk / "run" / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, problems) == (saved, [])
    assert not list((small_disk / "run").rglob(".*.tmp"))

    with pytest.raises(FulltuneError, match="No space left on device"):
        finetune.run(config, resume=True)
    (small_disk / "filler").unlink()
    finetune.run(config, resume=True)
    assert_equal(left_behind(small_disk / "run"), unbroken)


def test_a_limit_on_files_ends_the_command_with_2_and_resume_goes_on(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, unbroken: dict[str, Any]
) -> None:
    """As a quota does, where no disk can be mounted."""
    config = make_config(tmp_path / "run", tiny_llama, chat_file)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))

    done = subprocess.run(
        [sys.executable, "-m", "fulltune", "finetune", str(file)],
        capture_output=True, text=True, timeout=300, check=False, preexec_fn=limit_files,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "the checkpoint of step 12 could not be written" in done.stderr
    assert "go on with `--resume`" in " ".join(done.stderr.split())
    finetune.run(config, resume=True)
    assert_equal(left_behind(tmp_path / "run"), unbroken)


def test_a_folder_that_turns_read_only_stops_the_run_and_resume_goes_on(
    small_disk: Path,
    tiny_llama: Path,
    chat_file: Path,
    unbroken: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(small_disk / "run", tiny_llama, chat_file)
    folder = str(small_disk / "run" / "checkpoints")

    def make_read_only() -> None:
        mount("--bind", folder, folder)
        mount("-o", "remount,bind,ro", folder)

    with monkeypatch.context() as patch:
        before_call(patch, "save_checkpoint", 2, make_read_only, of_checkpoint="step-")
        with pytest.raises(CheckpointError, match="Read-only file system") as caught:
            finetune.run(config)
    assert "writable" in str(caught.value.hint)
    with pytest.raises(FulltuneError, match="Read-only file system"):
        finetune.run(config, resume=True)
    subprocess.run(["umount", folder], check=True)
    finetune.run(config, resume=True)
    assert_equal(left_behind(small_disk / "run"), unbroken)


def test_a_read_only_disk_is_named_and_nothing_resumes_on_it(
    small_disk: Path, tiny_llama: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(small_disk / "run", tiny_llama, chat_file)
    with monkeypatch.context() as patch:
        before_call(patch, "save_checkpoint", 2, lambda: fill(small_disk), of_checkpoint="step-")
        with pytest.raises(CheckpointError):
            finetune.run(config)
    mount("-o", "remount,ro", str(small_disk))
    with pytest.raises(RunFolderError, match=r"cannot be written.*Read-only file system"):
        finetune.run(config, resume=True)
    with pytest.raises(RunFolderError, match=r"cannot be (made|written)"):
        finetune.run(make_config(small_disk / "other", tiny_llama, chat_file))
