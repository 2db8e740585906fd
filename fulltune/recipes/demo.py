"""`fulltune demo`: the main job on a real model and real data, with nothing to configure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune.config import build_config
from fulltune.recipes import finetune
from fulltune.tracking import show_answer

SETTINGS = {
    "model": "asset:smollm2-135m-instruct",
    "task": {"kind": "chat", "train": "asset:alpaca-en", "validation": "50 examples"},
    "duration": "24 steps",
    "batch": "16 examples",
    "optimizer": {"lr": 1e-4, "warmup": "5%", "schedule": "cosine"},
    "evaluate": {"every": "12 steps"},
    "save_every": "12 steps",
}


@dataclass(frozen=True)
class BeforeAndAfter:
    """A held-out prompt, and the model's answers before and after training."""

    prompt: list[dict[str, str]]
    """Its turns: `role` and `content`."""
    before: str
    after: str
    reference: str


def config(run_dir: str) -> finetune.Config:
    """The settings of the demo: SmolLM2-135M-Instruct, all weights, on English instructions."""
    return build_config(finetune.Config, {**SETTINGS, "run_dir": run_dir})


def compare_samples(run_dir: Path) -> Iterator[BeforeAndAfter]:
    """The sampled answers of a run, side by side."""
    path = run_dir / "samples.jsonl"
    if not path.exists():
        return
    before: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        key = json.dumps(sample["prompt"], ensure_ascii=False)
        if key not in before:
            before[key] = sample
            continue
        yield BeforeAndAfter(
            prompt=sample["prompt"],
            before=show_answer(before[key]),
            after=show_answer(sample),
            reference=sample["reference"],
        )
