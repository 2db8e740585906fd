"""Kill a training process at random moments, resume it, and compare the weights bit for bit.

    python benchmarks/kills.py --kills 200

Trains a tiny Llama on conversations in a child process that saves a checkpoint after every step. The
child is killed with SIGKILL after a random time, during a step, an evaluation, a save or the start,
and started again with `--resume`. When a run comes to its end, its weights, optimizer state and
exported model must equal those of a run that was never disturbed. Prints one line a run and a summary.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fulltune.config import build_config
from fulltune.recipes import finetune
from fulltune.train.checkpoint import find_damage, last_checkpoint


@dataclass
class Tally:
    """What happened over all runs."""

    kills: int = 0
    kills_in_a_save: int = 0
    runs: int = 0
    lost_checkpoints: int = 0
    unequal_runs: int = 0
    moments: list[int] = field(default_factory=list)
    """Steps that had been saved at each kill."""


def settings(run_dir: Path, model: Path, data: Path) -> finetune.Config:
    """A short run with dropout, evaluations, several epochs and a checkpoint after every step."""
    return build_config(
        finetune.Config,
        {
            "model": str(model),
            "task": {"kind": "chat", "train": str(data), "validation": "4 examples"},
            "duration": "12 steps",
            "batch": "8 examples",
            "dropout": 0.1,
            "precision": "bf16",
            "optimizer": {"lr": 1e-3},
            "evaluate": {"every": "3 steps", "num_samples": 1},
            "save_every": "1 steps",
            "num_workers": 0,
            "run_dir": str(run_dir),
        },
    )


def train_in_child(config: finetune.Config, log: Path) -> int:
    """Fork a process that trains; returns its id."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    try:
        finetune.run(config, resume=True)
        code = 0
    finally:
        os._exit(code)


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Everything a finished run holds, by name."""
    checkpoint, problems = last_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None, f"{run_dir} has no checkpoint"
    assert not problems, problems
    tensors = {**checkpoint.tensors("weights"), **checkpoint.tensors("optimizer")}
    exported = run_dir / "model" / "model.safetensors"
    tensors["exported"] = torch.frombuffer(bytearray(exported.read_bytes()), dtype=torch.uint8)
    return tensors


def main(arguments: list[str] | None = None) -> Tally:
    """Run until the wanted number of kills is reached and every run has finished."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, required=True, help="a small model folder")
    parser.add_argument("--data", type=Path, required=True, help="conversations, JSONL")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a fork must not inherit threads
    chance = random.Random(options.seed)
    tally = Tally()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        log = folder / "log"
        start = time.monotonic()
        _, status = os.waitpid(
            train_in_child(settings(folder / "unbroken", options.model, options.data), log), 0
        )
        assert status == 0, log.read_text(encoding="utf-8")
        duration = time.monotonic() - start
        expected = final_state(folder / "unbroken")
        while tally.kills < options.kills:
            run_dir = folder / f"run-{tally.runs}"
            torture(run_dir, options, chance, duration, tally, log)
            found = final_state(run_dir)
            equal = expected.keys() == found.keys() and all(
                torch.equal(expected[name], found[name]) for name in expected
            )
            tally.runs += 1
            tally.unequal_runs += not equal
            shutil.rmtree(run_dir)
    summary = {
        "kills": tally.kills, "kills_in_a_save": tally.kills_in_a_save, "runs": tally.runs,
        "lost_checkpoints": tally.lost_checkpoints, "unequal_runs": tally.unequal_runs,
        "kills_by_saved_step": {step: tally.moments.count(step) for step in sorted(set(tally.moments))},
    }  # fmt: skip
    print(json.dumps(summary))
    return tally


def torture(
    run_dir: Path,
    options: argparse.Namespace,
    chance: random.Random,
    duration: float,
    tally: Tally,
    log: Path,
) -> None:
    """Train one run to its end through kills."""
    config = settings(run_dir, options.model, options.data)
    saved = 0
    while True:
        child = train_in_child(config, log)
        kill = tally.kills < options.kills
        deadline = time.monotonic() + chance.uniform(0, duration) if kill else float("inf")
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done or time.monotonic() >= deadline:
                break
            time.sleep(0.001)
        if done:
            assert status == 0, log.read_text(encoding="utf-8")[-4000:]
            return
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tally.kills += 1
        folder = run_dir / "checkpoints"
        tally.kills_in_a_save += folder.is_dir() and any(folder.glob(".*"))
        whole = [path for path in folder.glob("step-*") if find_damage(path) is None]
        newest = max((int(path.name[5:]) for path in whole), default=0)
        damaged = len(list(folder.glob("step-*"))) - len(whole)
        tally.lost_checkpoints += damaged + (newest < saved)
        saved = newest
        tally.moments.append(newest)


if __name__ == "__main__":
    main()
