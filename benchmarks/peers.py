"""The other trainers, each at its best honest setting for a CPU, one process per run.

Run by `cpu_finetune.py`: `python peers.py JOB.json`. Every peer gets the same encoded rows in the
same order and reports seconds, real tokens, targets and loss of each optimizer step. `fulltune`
itself is not here: it is run as its users run it, by its command line.

    hf-bf16            Trainer, bf16 autocast over float32 weights, rows padded to the longest
    hf-fp32            the same without autocast
    hf-bf16-weights    Trainer on bf16 weights without a float32 copy: fast, but rounds updates away
    trl                SFTTrainer, bf16 autocast, packing off, rows padded
    trl-padding-free   SFTTrainer, packing off, the rows of a step laid end to end
    trl-packed         SFTTrainer, packing on (best fit), one pack as long as a mean batch per step
    hand               a plain packed loop: bf16 weights, float32 master copy, loss at targets only
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def main(job: dict[str, Any]) -> None:
    """Train as ``job`` says, save the model, and write the steps to the result file."""
    peer = job["peer"]
    if job.get("imports_only"):
        import_peer(peer)
        return
    lines = Path(job["rows"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(lines[index]) for step in job["rows_of_steps"] for index in step]
    train = {"hand": train_hand}.get(peer, train_trl if peer.startswith("trl") else train_hf)
    steps = train(rows, job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"steps": steps, "peak_bytes_before_saving": peak}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def import_peer(peer: str) -> None:
    """Load the code of a peer and nothing else: the memory that no setting can save."""
    import torch  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    if peer == "fulltune":
        import fulltune.recipes.finetune  # noqa: F401
    elif peer.startswith("hf"):
        import datasets  # noqa: F401
        from transformers import Trainer  # noqa: F401
    elif peer.startswith("trl"):
        from trl import SFTTrainer  # noqa: F401


def trainer_arguments(job: dict[str, Any], num_steps: int, batch: int) -> dict[str, Any]:
    """What `Trainer` and `SFTTrainer` share; the optimizer is the same for every peer."""
    return {
        "output_dir": job["model_out"],
        "use_cpu": True,
        "bf16": not job["peer"].endswith("fp32"),
        "max_steps": num_steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "optim": "adamw_torch_fused",
        "learning_rate": job["lr"],
        "adam_beta1": job["betas"][0],
        "adam_beta2": job["betas"][1],
        "weight_decay": job["weight_decay"],
        "max_grad_norm": job["clip_norm"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job["seed"],
    }


def train_hf(rows: list[Row], job: dict[str, Any]) -> list[dict[str, float]]:
    """Transformers' `Trainer` with its own padding collator."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    bf16_weights = job["peer"] == "hf-bf16-weights"
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.bfloat16 if bf16_weights else torch.float32
    )
    arguments = trainer_arguments(job, job["steps"], job["batch"])
    if bf16_weights:
        arguments["bf16"] = False  # the weights are bf16 already: autocast would only add casts
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest"),
        processing_class=tokenizer,
    )
    return run_trainer(trainer, job)


def train_trl(rows: list[Row], job: dict[str, Any]) -> list[dict[str, float]]:
    """TRL's `SFTTrainer` on rows that already carry labels, which it keeps as they are."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer, pack_dataset

    dataset = Dataset.from_list(rows)
    arguments = trainer_arguments(job, job["steps"], job["batch"])
    arguments |= {"max_length": None, "model_init_kwargs": {"dtype": torch.float32}}
    if job["peer"] == "trl-padding-free":
        arguments["padding_free"] = True
    if job["peer"] == "trl-packed":
        # One pack a step, long enough that there are no more steps than everyone else takes, and
        # never shorter than the longest row, which packing would truncate.
        num_tokens = sum(len(row["input_ids"]) for row in rows)
        longest = max(len(row["input_ids"]) for row in rows)
        pack_length = max(longest, math.ceil(num_tokens / job["steps"]))
        while len(pack_dataset(dataset, pack_length, "bfd")) > job["steps"]:
            pack_length = math.ceil(1.01 * pack_length)
        arguments |= {
            "packing": True,
            "packing_strategy": "bfd",
            "max_length": pack_length,
            "per_device_train_batch_size": 1,
            "shuffle_dataset": True,  # best fit sorts by length; packs must not come in that order
            "max_steps": -1,
            "num_train_epochs": 1,
        }
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(**arguments),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    return run_trainer(trainer, job)


def run_trainer(trainer: Any, job: dict[str, Any]) -> list[dict[str, float]]:
    """Train, timing whole steps (data, forward, backward, update) and counting what was in them."""
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import TrainerCallback

    counts: list[tuple[int, int]] = []
    seconds: list[tuple[float, float]] = []
    collate = trainer.data_collator

    def counted(features: list[Any]) -> Any:
        batch = collate(features)
        # Without padding there is no attention mask, and every position is a real token.
        real = batch["attention_mask"] if "attention_mask" in batch else batch["input_ids"] >= 0
        counts.append((int(real.sum()), int((batch["labels"][:, 1:] != -100).sum())))
        return batch

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last, self.last_cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now, cpu = time.perf_counter(), time.process_time()
            seconds.append((now - self.last, cpu - self.last_cpu))
            self.last, self.last_cpu = now, cpu

    # Trainer's own warmup wastes the first step on a rate of zero; this one is everybody's.
    trainer.create_optimizer()
    trainer.lr_scheduler = LambdaLR(
        trainer.optimizer, lambda step: warmup_factor(step, job["warmup"])
    )
    trainer.data_collator = counted
    trainer.add_callback(Clock())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model(job["model_out"])
    # Batches are collated one ahead of their step, in order; the trainer may prefetch one more.
    return [
        {
            "seconds": second,
            "cpu_seconds": cpu_second,
            "tokens": tokens,
            "targets": targets,
            "loss": loss,
        }
        for (second, cpu_second), (tokens, targets), loss in zip(
            seconds, counts[: len(seconds)], losses, strict=True
        )
    ]


def warmup_factor(step: int, warmup: int) -> float:
    """The factor on the learning rate of the update that follows ``step`` finished ones."""
    return min(1.0, (step + 1) / max(1, warmup))


def train_hand(rows: list[Row], job: dict[str, Any]) -> list[dict[str, float]]:
    """A reference point: the rows of a step as one packed row, nothing cleverer than that.

    Position ids restart at every document, from which transformers builds the mask that keeps the
    documents apart. T tokens, N targets, D width of the model.
    """
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    weights = list(model.parameters())
    masters = [weight.detach().float().requires_grad_() for weight in weights]
    optimizer = torch.optim.AdamW(
        [
            {"params": [m for m in masters if m.ndim > 1], "weight_decay": job["weight_decay"]},
            {"params": [m for m in masters if m.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=job["lr"],
        betas=tuple(job["betas"]),
        fused=True,
    )
    head_VD = model.get_output_embeddings().weight
    steps = []
    last, last_cpu = time.perf_counter(), time.process_time()
    for step in range(job["steps"]):
        batch = rows[step * job["batch"] : (step + 1) * job["batch"]]
        input_ids_T = torch.tensor([token for row in batch for token in row["input_ids"]])
        positions_T = torch.cat([torch.arange(len(row["input_ids"])) for row in batch])
        labels_T = torch.tensor([label for row in batch for label in (*row["labels"][1:], -100)])
        hidden_TD = model.base_model(
            input_ids=input_ids_T[None], position_ids=positions_T[None], use_cache=False
        ).last_hidden_state[0]
        where_N = (labels_T != -100).nonzero()[:, 0]
        picked_ND = hidden_TD[where_N].detach().requires_grad_()
        loss_sum = 0.0
        for start in range(0, len(where_N), 512):
            chunk = slice(start, start + 512)
            logits = functional.linear(picked_ND[chunk], head_VD).float()
            labels = labels_T[where_N[chunk]]
            loss = functional.cross_entropy(logits, labels, reduction="sum") / len(where_N)
            loss.backward()
            loss_sum += loss.item()
        hidden_TD[where_N].backward(picked_ND.grad)
        for group in optimizer.param_groups:
            group["lr"] = job["lr"] * warmup_factor(step, job["warmup"])
        for weight, master in zip(weights, masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, job["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        now, cpu = time.perf_counter(), time.process_time()
        steps.append(
            {
                "seconds": now - last,
                "cpu_seconds": cpu - last_cpu,
                "tokens": len(input_ids_T),
                "targets": len(where_N),
                "loss": loss_sum,
            }
        )
        last, last_cpu = now, cpu
    del optimizer
    model.float()
    for weight, master in zip(model.parameters(), masters, strict=True):
        weight.data = master.data
    model.save_pretrained(job["model_out"])
    AutoTokenizer.from_pretrained(job["model"]).save_pretrained(job["model_out"])
    return steps


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
