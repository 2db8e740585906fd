"""The parts of one run, joined: model, optimizer, loader, evaluation and checkpoints."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import psutil
import torch

from fulltune.data.loader import Loader, StepPlan, num_steps, prefetch
from fulltune.data.tasks import ChatExample
from fulltune.errors import ConfigError
from fulltune.evaluate.evaluator import BestTracker, Retention
from fulltune.memory.plan import MemoryPlan, plan_memory
from fulltune.models.adapters import add_lora
from fulltune.models.families import layers_of, num_layers
from fulltune.models.flops import count_flops
from fulltune.models.kernels import install_fast_kernels
from fulltune.models.loading import TASK_HEADS, load_model
from fulltune.models.reinitialize import reinitialize_layers
from fulltune.models.scope import freeze, lora_rank, require_own_weights
from fulltune.models.vocabulary import grow_embeddings
from fulltune.objectives.causal_lm import require_plain_head
from fulltune.objectives.multi_label import MultiLabel, start_at_shares
from fulltune.objectives.noise import noise_seed
from fulltune.objectives.span_corruption import require_plain_decoder_head
from fulltune.optim.master_weights import MasterWeights
from fulltune.optim.optimizers import Optimizer, group_parameters
from fulltune.recipes.measuring import evaluate, sample
from fulltune.recipes.prepare import Base, Prepared, first_conversations
from fulltune.recipes.resume import restore, save
from fulltune.runtime import (
    PrecisionChoice,
    Runtime,
    peak_memory_bytes,
    seed_everything,
)
from fulltune.tracking import Tracker, TrackingConfig, format_bytes, format_miss
from fulltune.train.health import NonFiniteError, SpikeDetector, nonfinite_rows
from fulltune.train.interruption import agreed, caught_signals
from fulltune.train.loop import Ending, Progress, every, fit
from fulltune.train.ranks import from_all_ranks, on_all_ranks, on_main_rank
from fulltune.train.step import MicroBatch, train_step
from fulltune.train.trial import require_trainable, require_trainable_in, tried

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fulltune.recipes.finetune import Config

Watch: TypeAlias = Callable[[int, Mapping[str, float]], bool]
"""Told the step and the metrics of each evaluation after a step, in their order; True gives the run
up there: its state is saved, and it ends without a result. Called on the first rank."""

STATE_BYTES = {"adamw": 8, "adamw_scaled": 8, "muon": 8, "adafactor": 1}
"""Bytes of optimizer state for each trained parameter, at most."""


class Trainer:
    """The parts of one run, joined: model, optimizer, loader, evaluation and checkpoints."""

    def __init__(
        self,
        config: Config,
        base: Base,
        prepared: Prepared,
        precision: PrecisionChoice,
        runtime: Runtime,
        display: Any,
        base_bytes: int,
        metric: str,
    ) -> None:
        self.config, self.base, self.prepared = config, base, prepared
        self.precision, self.runtime, self.display = precision, runtime, display
        self.objective = prepared.objective
        self.folder = Path(config.run_dir)
        self.retention: Retention | None = None
        self.watch: Watch | None = None
        self.given_up = False
        self.signal_name: str | None = None
        self.started = time.time()

        self.model = on_all_ranks(runtime, self.load_base)
        layers = layers_of(self.model)
        self.layers = layers
        depth = num_layers(self.model.config)
        tied_heads = freeze(self.model, config.scope, layer_of=layers, num_layers=depth)
        if config.optimizer.layer_lr_decay != 1:
            require_own_weights(
                layers, depth, setting="optimizer.layer_lr_decay", hint="leave it out"
            )
        on_all_ranks(runtime, lambda: require_trainable(self.model, self.objective))
        self.masters = MasterWeights(self.model, precision.dtype)
        self.kernels = install_fast_kernels(self.model)
        on_all_ranks(
            runtime,
            lambda: require_trainable_in(precision.dtype, self.model, self.objective, self.masters),
        )
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self.num_trained = sum(tensor.numel() for tensor in self.masters.tensors())
        if not self.num_trained:
            raise ConfigError(f"`scope` is `{config.scope}`, which leaves nothing to train")

        plans = from_all_ranks(runtime, on_all_ranks(runtime, lambda: self._plan(base_bytes)))
        # Ranks that cut a step differently would not divide it.
        self.plan = min(plans, key=lambda plan: plan.micro_batch_tokens)
        self.loader = Loader(
            prepared.dataset.lengths,
            prepared.train,
            batch=config.batch,
            micro_batch_tokens=self.plan.micro_batch_tokens,
            seed=config.seed,
            packing=self.objective.packing,
            rank=runtime.rank,
            world_size=runtime.world_size,
            dataset_fingerprint=prepared.dataset.fingerprint,
        )
        self.num_steps = num_steps(config.duration, self.loader)
        self.optimizer = Optimizer(
            self.masters,
            group_parameters(
                self.masters,
                config.optimizer,
                layer_of=layers,
                num_layers=depth,
                tied_heads=tied_heads,
            ),
            config.optimizer,
            num_steps=self.num_steps,
        )
        self.best = BestTracker(metric, config.evaluate.stop_after)
        self.spikes = SpikeDetector()
        self.progress = Progress()
        self.last_metrics: dict[str, float] = {}
        self.last_details: dict[str, Any] = {}
        self.seconds_before = 0.0
        self.flops = count_flops(self.model, layers) if config.scope == "all" else None

    @cached_property
    def frozen_hash(self) -> str | None:
        """Of the weights that are not trained, which no checkpoint holds; None if all are."""
        named = self.model.named_parameters()
        frozen = [(name, weight) for name, weight in named if not weight.requires_grad]
        if not frozen:
            return None
        digest = hashlib.blake2b(digest_size=16)
        for name, weight in frozen:
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def conversations(self) -> list[ChatExample]:
        """Held-out conversations whose prompts are answered before and after training."""
        return first_conversations(
            self.config.task,
            self.prepared.dataset,
            self.prepared.validation,
            num_samples=self.config.evaluate.num_samples,
        )

    # -- before the first step ---------------------------------------------------------------------

    def load_base(self) -> PreTrainedModel:
        """The base model in float32, with what of it starts anew; the same for the same seed."""
        seed_everything(self.config.seed)
        labels = getattr(self.objective, "labels", None)
        model: PreTrainedModel = load_model(
            self.base.path,
            head=self.objective.head,
            labels=labels,
            dtype=torch.float32,
            attention="fulltune",
            dropout=self.config.dropout,
            seed=self.config.seed,
        )
        if isinstance(self.objective, MultiLabel):
            start_at_shares(model, self.objective.label_shares)
        if self.base.new_tokens:
            grow_embeddings(model, self.base.new_tokens)
        if self.config.reinitialize_layers:
            reinitialize_layers(
                model,
                self.config.reinitialize_layers,
                layer_of=layers_of(model),
                num_layers=num_layers(model.config),
                seed=self.config.seed,
            )
        if (rank := lora_rank(self.config.scope)) is not None:
            add_lora(model, rank)
        torch.nn.Module.to(model, self.runtime.device)  # in place
        if self.objective.head == "causal_lm":
            with tried(model):
                require_plain_head(model)
        if self.objective.head == "sequence_to_sequence":
            require_plain_decoder_head(model)
        return model

    def _plan(self, base_bytes: int) -> MemoryPlan:
        device = self.runtime.device
        if device.type == "cuda":
            available = int(torch.cuda.mem_get_info(device)[0])
        else:
            available = int(psutil.virtual_memory().available) + self.num_parameters * 4
        plan = plan_memory(
            self.config.memory,
            self.model.config,
            num_parameters=self.num_parameters,
            num_trained=self.num_trained,
            optimizer_bytes=STATE_BYTES[self.config.optimizer.name],
            compute_bytes=self.precision.dtype.itemsize,
            base_bytes=0 if device.type == "cuda" else base_bytes,
            available_bytes=available,
            longest=int(self.prepared.dataset.lengths.max()),
            has_vocabulary_loss=self.objective.head not in TASK_HEADS,
            has_lean_kernels=any(name.endswith(("RMSNorm", "MLP")) for name in self.kernels),
            device_type=device.type,
        )
        self.display.stage(
            f"memory: about {format_bytes(plan.predicted_bytes)} predicted, "
            f"forward passes of {plan.micro_batch_tokens:,} tokens"
        )
        return plan

    def train(self, *, resume: bool, finish: Callable[[Trainer, Ending], None]) -> Ending:
        """Train to the end, or until interrupted; ``finish`` runs on the first rank at the end."""
        resumed_step = restore(self) if resume else None
        self.display.num_steps = self.num_steps
        with (
            Tracker(
                self.folder,
                self.config.tracking if self.runtime.is_main else TrackingConfig(),
                settings=self.config.model_dump(mode="json"),
                resume_step=resumed_step,
            )
            if self.runtime.is_main
            else _NoTracker() as self.tracker,
            caught_signals() as interruption,
        ):
            self._say_what_starts(resumed_step)
            if resumed_step is None:
                on_main_rank(self.runtime, lambda: sample(self, 0, self.model))
                if self.config.task.validation is not None:
                    evaluate(self, 0)
            if resumed_step is not None and self.best.should_stop:
                ending: Ending = "stopped early"  # killed after the decision, before the end
            else:
                ending = fit(
                    self.progress,
                    self._step,
                    self.batches(),
                    num_steps=self.num_steps,
                    evaluate=lambda step: evaluate(self, step),
                    evaluate_every=every(self.config.evaluate.every, self.loader.epochs_after),
                    save=lambda step: on_main_rank(self.runtime, lambda: save(self, step)),
                    save_every=every(self.config.save_every, self.loader.epochs_after),
                    interrupted=lambda: agreed(interruption, self.runtime),
                )
            if ending == "stopped early" and self.given_up:
                ending = "given up"
            if ending == "interrupted":
                self.tracker.write(
                    "interrupted", step=self.progress.step, signal=interruption.signal_name
                )
                self.display.notice(
                    f"{interruption.signal_name}: saved after step {self.progress.step}; "
                    "go on with `--resume`"
                )
            elif ending != "given up":
                interruption.answer_from_now_on(self._say_that_it_finishes)
                on_main_rank(self.runtime, lambda: finish(self, ending))
            self.signal_name = interruption.signal_name
        return ending

    def _say_that_it_finishes(self, signal_name: str) -> None:
        self.display.notice(
            f"{signal_name}: training is over and its state saved; finishing the model and the "
            "report. A second signal stops that, and `--resume` goes on with it"
        )

    def _say_what_starts(self, resumed_step: int | None) -> None:
        self.tracker.write(
            "start" if resumed_step is None else "resume",
            step=resumed_step or 0,
            model=self.config.model,
            num_parameters=self.num_parameters,
            num_trained_parameters=self.num_trained,
            precision=self.config.precision,
            matmul_rate=self.precision.matmul_rate,
            num_steps=self.num_steps,
            device=str(self.runtime.device),
            world_size=self.runtime.world_size,
            micro_batch_tokens=self.plan.micro_batch_tokens,
            predicted_memory_bytes=self.plan.predicted_bytes,
            kernels=self.kernels,
            new_tokens=self.new_tokens,
        )
        if self.new_tokens:
            self.display.notice(
                f"`task.template: {self.config.task.template}` writes "
                f"{' and '.join(f'`{token}`' for token in self.new_tokens)}, which the model does "
                "not have: they are new tokens, whose embeddings begin as the mean of the pieces "
                "that spelled them"
            )
        share = self.num_trained / self.num_parameters
        self.display.notice(
            f"training {self.num_trained:,} of {self.num_parameters:,} parameters ({share:.0%}), "
            f"{self.num_steps:,} steps, {len(self.prepared.train):,} examples"
        )
        if resumed_step is not None:
            self.display.notice(f"resumed after step {resumed_step}")

    # -- each step ---------------------------------------------------------------------------------

    def batches(self) -> Generator[tuple[StepPlan, list[MicroBatch]]]:
        """Steps of micro-batches, read and collated one step ahead."""
        rows = self.prepared.dataset

        def made() -> Iterator[tuple[StepPlan, list[MicroBatch]]]:
            for plan in self.loader:
                micro_batches = []
                for indices in plan.micro_batches:
                    examples = [rows[int(index)] for index in indices]
                    for index, example in zip(indices, examples, strict=True):
                        example["noise_seed"] = noise_seed(self.config.seed, plan.epoch, int(index))
                    micro_batches.append(MicroBatch(self.objective.collate(examples), examples))
                yield plan, micro_batches

        with prefetch(made(), 1) as prefetched:
            yield from prefetched

    def _step(self, item: tuple[StepPlan, list[MicroBatch]]) -> None:
        plan, micro_batches = item
        step = self.progress.step
        start = time.perf_counter()
        self.model.train()
        # Dropout is a function of (seed, step, rank): a resumed run needs no generator's state.
        seed_everything((self.config.seed * 1_000_003 + step) * 4096 + self.runtime.rank)
        try:
            result = train_step(
                self.model,
                self.objective,
                micro_batches,
                self.optimizer,
                step,
                runtime=self.runtime,
                clip_norm=self.config.optimizer.clip_norm,
                measure_rounding=self.precision.dtype == torch.bfloat16,
            )
        except NonFiniteError as error:
            self._explain_nonfinite(error, micro_batches)
            raise
        seconds = time.perf_counter() - start
        self.loader.advance(plan)
        speed = result.num_tokens / seconds
        share = None
        if self.flops is not None:
            done = self.flops.body * result.num_tokens + self.flops.head * result.num_targets
            share = done / seconds / self.precision.matmul_rate / self.runtime.world_size
        memory = peak_memory_bytes(self.runtime.device)
        values = {
            "loss": result.loss,
            "lr": self.optimizer.lr(step),
            "grad_norm": result.grad_norm,
            "num_targets": result.num_targets,
            "num_tokens": result.num_tokens,
            "tokens_per_second": speed,
            "matmul_share": share,
            "memory_bytes": memory,
            "updates_rounded_away": result.updates_rounded_away,
            "epoch": plan.epoch
            + (plan.step_in_epoch + 1) / self.loader.steps_per_epoch(plan.epoch),
            "seconds": seconds,
        }
        self.tracker.write("step", step=step + 1, **values)
        self.display.step(step + 1, values)
        if step + 1 == 3:
            self._check_memory(memory)
        if self.spikes.is_spike(result.loss):
            own = [example["where"] for micro in micro_batches for example in micro.examples]
            rows = [row for found in from_all_ranks(self.runtime, own) for row in found]
            self.tracker.write("spike", step=step + 1, loss=result.loss, rows=rows)
            self.display.notice(
                f"spike: loss {result.loss:.3f} at step {step + 1}, rows {', '.join(rows[:5])}"
                + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
            )

    def _check_memory(self, measured: int) -> None:
        predicted = self.plan.predicted_bytes
        error = predicted / measured - 1
        self.tracker.write(
            "memory", step=3, predicted_bytes=predicted, measured_bytes=measured, error=error,
            parts=dict(self.plan.parts),
        )  # fmt: skip
        self.display.notice(
            f"memory: {format_bytes(measured)} at the peak, {format_bytes(predicted)} predicted "
            f"({format_miss(error)})"
        )

    def _explain_nonfinite(self, error: NonFiniteError, micro_batches: list[MicroBatch]) -> None:
        chosen = error.micro_batches or range(len(micro_batches))
        examples = [example for index in chosen for example in micro_batches[index].examples]
        rows = nonfinite_rows(
            self.model, self.objective, examples, self.masters, self.runtime.device
        )
        rows = [row for found in from_all_ranks(self.runtime, rows) for row in found]
        self.tracker.write("nonfinite", step=error.step, message=str(error), rows=rows)
        named = f"rows: {', '.join(rows[:10])}" if rows else "no single row is at fault"
        error.hint = (
            f"{named}; the last checkpoint is intact. Look at these rows with `fulltune preview`, "
            "or lower `optimizer.lr`"
        )

    @property
    def new_tokens(self) -> list[str]:
        """The tokens that the chat template added to the model."""
        return [str(self.base.tokenizer.convert_ids_to_tokens(i)) for i in self.base.new_tokens]

    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.seconds_before + time.time() - self.started


class _NoTracker:
    """The log of ranks other than the first."""

    def __enter__(self) -> _NoTracker:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def write(self, event: str, **values: object) -> None: ...
