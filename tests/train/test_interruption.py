"""A signal is answered: by a saved state while training goes on, and by words once it is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fulltune.config import build_config, dump_config
from fulltune.recipes import finetune
from fulltune.train.interruption import Interruption
from fulltune.train.run_folder import is_finished

STEPS = 3


@pytest.fixture
def settings_file(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "cache"))
    values = {
        "model": str(tiny_llama),
        "task": {"kind": "chat", "train": str(chat_file), "validation": "20 examples"},
        "duration": f"{STEPS} steps",
        "batch": "8 examples",
        "precision": "fp32",
        "evaluate": {"num_samples": 20},  # so that finishing takes a while
        "num_workers": 0,
        "run_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(build_config(finetune.Config, values)), encoding="utf-8")
    return path


def start(settings_file: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fulltune", "finetune", str(settings_file), *arguments],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_the_last_checkpoint(process: subprocess.Popen[str], run_dir: Path) -> None:
    """From here on only the model and the report are written."""
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []
        events = [json.loads(line) for line in lines]
        if any(event["event"] == "checkpoint" and event["step"] == STEPS for event in events):
            return
        time.sleep(0.005)
    raise TimeoutError


def test_a_signal_while_the_run_finishes_is_answered_and_the_run_finishes(
    settings_file: Path, tmp_path: Path
) -> None:
    process = start(settings_file)
    wait_for_the_last_checkpoint(process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors.count("SIGINT: training is over and its state saved") == 1
    assert "A second signal stops that, and `--resume` goes on" in errors
    assert is_finished(tmp_path / "run")


def test_a_second_signal_stops_the_finishing_and_resume_goes_on_with_it(
    settings_file: Path, tmp_path: Path
) -> None:
    process = start(settings_file)
    assert process.stderr is not None
    wait_for_the_last_checkpoint(process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "A second signal" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert not is_finished(tmp_path / "run")
    process = start(settings_file, "--resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert is_finished(tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_signal_that_came_during_the_last_step_is_answered_when_finishing_begins() -> None:
    interruption, said = Interruption(), list[str]()
    interruption.request("SIGTERM")
    interruption.answer_from_now_on(said.append)
    assert said == ["SIGTERM"]
