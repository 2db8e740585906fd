"""The neutral judge: held-out loss of a saved model, and the machine's rate of matrix products.

Run by `cpu_finetune.py` and `cpu_pretrain.py` in its own process: `python measure.py JOB.json`.
Nothing of any peer is imported here; a model is a folder in the plain Hugging Face layout.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Measure what ``job`` names and write it to its result file."""
    if job["what"] == "rate":
        result = {"bf16_flops": matmul_rate()}
    else:
        result = held_out_loss(job["model"], Path(job["rows"]), job.get("head", "causal"))
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of a square bf16 product: the best of eight, since a busy machine only slows."""
    import torch

    left = torch.randn(size, size).bfloat16()
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def held_out_loss(model: str, rows: Path, head: str = "causal") -> dict[str, float]:
    """Mean loss per target in nats: float32, one row at a time, no padding and no packing.

    With a ``causal`` head a label is predicted one token before it, with a ``masked`` one in its
    place; the masks are in the rows.

    Twice: of the weights as they were saved, and of the same weights rounded to bf16. A short run
    moves many weights by less than bf16 can hold, so what a folder is saved in is seen in the loss.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    classes = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
    network = classes[head].from_pretrained(model, dtype=torch.float32).eval()
    lines = rows.read_text(encoding="utf-8").splitlines()
    parsed = [json.loads(line) for line in lines]
    shift = {"causal": 1, "masked": 0}[head]
    as_saved = mean_loss(network, parsed, shift)
    return {"loss": as_saved, "loss_bf16": mean_loss(network.bfloat16().float(), parsed, shift)}


def mean_loss(network: Any, rows: list[dict[str, list[int]]], shift: int) -> float:
    """Loss summed over all targets, then divided once."""
    import torch
    from torch.nn import functional

    loss_sum, num_targets = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            logits = network(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            labels = torch.tensor(row["labels"][shift:])
            logits = logits[: len(labels)]
            loss_sum += functional.cross_entropy(logits, labels, reduction="sum").item()
            num_targets += int((labels != -100).sum())
    return loss_sum / num_targets


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
