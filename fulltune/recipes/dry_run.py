"""`--dry-run` of `fulltune finetune` and `pretrain`: what a run would take, and no training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fulltune.recipes import pretrain
from fulltune.recipes.finetune import FINETUNE, Config, assemble, check_settings, display_of
from fulltune.recipes.prepare import check_task
from fulltune.runtime import start_runtime
from fulltune.tracking import format_bytes
from fulltune.train.run_folder import check_run_folder


@dataclass(frozen=True)
class Plan:
    """What a run would do, as the run itself finds it out before its first step."""

    num_parameters: int
    num_trained_parameters: int
    num_examples: int
    """That are trained on."""
    num_held_out: int
    num_tokens: int
    """Of the examples that are trained on, once."""
    num_steps: int
    steps_per_epoch: int
    """Of the first epoch; with a batch in tokens the others differ a little."""
    micro_batch_tokens: int
    """Most tokens of a forward pass."""
    predicted_memory_bytes: int
    memory_parts: dict[str, int]
    """Bytes by what holds them."""
    precision: str
    device: str
    world_size: int
    is_main: bool
    """False on ranks that have nothing to say."""

    def lines(self) -> list[str]:
        """The plan in words, a line each."""
        share = self.num_trained_parameters / self.num_parameters
        parts = ", ".join(
            f"{name} {format_bytes(size)}" for name, size in self.memory_parts.items()
        )
        ranks = f", {self.world_size} ranks" if self.world_size > 1 else ""
        return [
            f"parameters    {self.num_trained_parameters:,} of {self.num_parameters:,} trained "
            f"({share:.0%})",
            f"examples      {self.num_examples:,} with {self.num_tokens:,} tokens, "
            f"{self.num_held_out:,} held out",
            f"steps         {self.num_steps:,}, {self.steps_per_epoch:,} an epoch",
            f"forward pass  at most {self.micro_batch_tokens:,} tokens",
            f"memory        about {format_bytes(self.predicted_memory_bytes)} predicted: {parts}",
            f"computes in   {self.precision} on {self.device}{ranks}",
        ]


def plan(config: Config, *, resume: bool = False) -> Plan:
    """Read the data and load the model as a run does, and say what it would take.

    Args:
        config: the settings of the run, of either verb.
        resume: whether the run in `run_dir` is to go on: it must be of these settings. Otherwise
            the folder is not looked at, so that the plan of a run can be seen again.

    Raises:
        FulltuneError: what would stop the run before its first step.
    """
    start = FINETUNE
    if isinstance(config, pretrain.Config):
        pretrain.check_settings(config)
        check_task(config.task)
        start = pretrain.start()
    metric = check_settings(config, start)
    runtime = start_runtime(config.device)
    found = check_run_folder(Path(config.run_dir), config, resume=True) if resume else None
    with display_of(runtime, title="dry run", metric=metric) as display:
        trainer = assemble(config, found, metric, runtime, display, start)
    return Plan(
        num_parameters=trainer.num_parameters,
        num_trained_parameters=trainer.num_trained,
        num_examples=len(trainer.prepared.train),
        num_held_out=len(trainer.prepared.validation),
        num_tokens=trainer.loader.num_tokens,
        num_steps=trainer.num_steps,
        steps_per_epoch=trainer.loader.steps_per_epoch(),
        micro_batch_tokens=trainer.plan.micro_batch_tokens,
        predicted_memory_bytes=trainer.plan.predicted_bytes,
        memory_parts=dict(trainer.plan.parts),
        precision=trainer.config.precision,
        device=str(runtime.device),
        world_size=runtime.world_size,
        is_main=runtime.is_main,
    )
