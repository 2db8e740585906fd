"""What of a run is saved, and how it goes on from there."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fulltune.errors import CheckpointError
from fulltune.train.checkpoint import (
    last_checkpoint,
    prune_checkpoints,
    remove_unfinished,
    save_checkpoint,
)
from fulltune.train.ranks import on_all_ranks, on_main_rank
from fulltune.train.run_folder import CHECKPOINTS

if TYPE_CHECKING:
    from fulltune.recipes.trainer import Trainer


def save(trainer: Trainer, step: int) -> None:
    """Everything that the next step depends on; older checkpoints than are kept are removed."""
    state = {
        "step": step,
        "loader": trainer.loader.state(),
        "best": trainer.best.state(),
        "spike_losses": trainer.spikes.losses,
        "model_fingerprint": _fingerprint(trainer),
        "frozen_hash": trainer.frozen_hash,
        "metrics": trainer.last_metrics,
        "details": trainer.last_details,
        "seconds": trainer.seconds(),
        "world_size": trainer.runtime.world_size,
        "micro_batch_tokens": trainer.plan.micro_batch_tokens,
    }
    folder = trainer.folder / CHECKPOINTS
    start = time.perf_counter()
    path = save_checkpoint(
        folder,
        f"step-{step:08d}",
        step=step,
        tensors={
            "weights": dict(trainer.masters.items()),
            "optimizer": dict(trainer.optimizer.state()),
        },
        state=state,
    )
    prune_checkpoints(folder, keep=trainer.config.keep_checkpoints, step=step)
    trainer.tracker.write(
        "checkpoint", step=step, path=str(path), seconds=time.perf_counter() - start
    )
    trainer.display.notice(f"saved checkpoint {path.name}")


def save_best(trainer: Trainer, step: int) -> None:
    """The weights only; those before them stay where a checkpoint still names them."""
    folder = trainer.folder / CHECKPOINTS
    save_checkpoint(
        folder,
        f"best-{step:08d}",
        step=step,
        tensors={"weights": dict(trainer.masters.items())},
        state={"metrics": trainer.last_metrics, "details": trainer.last_details},
    )
    prune_checkpoints(folder, keep=trainer.config.keep_checkpoints, step=step, best_step=step)


def restore(trainer: Trainer) -> int | None:
    """Go back to the newest whole checkpoint; None where the run saved none yet."""
    folder = trainer.folder / CHECKPOINTS
    on_main_rank(trainer.runtime, lambda: remove_unfinished(folder))
    checkpoint, problems = on_all_ranks(trainer.runtime, lambda: last_checkpoint(folder))
    for problem in problems:
        trainer.display.notice(f"not loaded: {problem}")
    if checkpoint is None:
        if trainer.runtime.is_main:
            for stale in ("samples.jsonl", "metrics.jsonl"):
                (trainer.folder / stale).unlink(missing_ok=True)
        return None
    state = checkpoint.state
    if state["model_fingerprint"] != _fingerprint(trainer):
        raise CheckpointError(
            f"`{checkpoint.path}` is a checkpoint of another model: its parameters differ",
            hint="resume with the `model` and `scope` the run began with, or start a new run",
        )
    if state["frozen_hash"] != trainer.frozen_hash:
        raise CheckpointError(
            f"`{checkpoint.path}` was trained on top of other weights: those of "
            f"`{trainer.config.model}` that `scope: {trainer.config.scope}` leaves as they are "
            "have changed since",
            hint="put the model back as it was, or start a new run",
        )
    trainer.masters.load(checkpoint.tensors("weights"))
    trainer.optimizer.load_state(checkpoint.tensors("optimizer"))
    trainer.loader.load_state(state["loader"])
    trainer.best.load_state(state["best"])
    trainer.spikes.losses = state["spike_losses"]
    trainer.last_metrics, trainer.last_details = state["metrics"], state["details"]
    trainer.seconds_before = state["seconds"]
    _plan_as_before(trainer, state["micro_batch_tokens"])
    trainer.progress.step = checkpoint.step
    return checkpoint.step


def _plan_as_before(trainer: Trainer, micro_batch_tokens: int) -> None:
    """More free memory than before must not change the last bits of what is learned."""
    if trainer.plan.micro_batch_tokens < micro_batch_tokens:
        trainer.display.notice(
            f"forward passes of {trainer.plan.micro_batch_tokens:,} tokens fit now, and were "
            f"{micro_batch_tokens:,} before: the run goes on, its last bits may differ"
        )
        return
    trainer.plan = replace(trainer.plan, micro_batch_tokens=micro_batch_tokens)
    trainer.loader.micro_batch_tokens = micro_batch_tokens


def _fingerprint(trainer: Trainer) -> list[list[Any]]:
    """Names and shapes of what is trained."""
    return [[name, list(tensor.shape)] for name, tensor in trainer.masters.items()]
