"""`fulltune finetune`: all weights of a model, on one task, from settings to a finished folder."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import torch
from pydantic import Field

from fulltune.config import BatchSize, Duration, Period, Quantity, Settings
from fulltune.data.loader import Loader, StepPlan, num_steps, prefetch
from fulltune.data.preview import require_sound, to_json
from fulltune.data.records import read_records
from fulltune.data.tasks import ChatExample, TaskConfig, TextExample
from fulltune.errors import CheckpointError, ConfigError, RunFolderError
from fulltune.evaluate.evaluator import (
    BestTracker,
    EvaluateConfig,
    EvaluationResult,
    Sample,
    encode_retention,
    evaluate_model,
    evaluate_retention,
    retention_source,
    sample_answers,
)
from fulltune.evaluate.metrics import check_metric
from fulltune.memory.plan import MemoryPlan, MemorySetting, plan_memory
from fulltune.models.families import layer_of, num_layers
from fulltune.models.kernels import install_fast_kernels
from fulltune.models.loading import load_model, save_model
from fulltune.models.scope import Scope, freeze
from fulltune.objectives.causal_lm import CausalLM
from fulltune.optim.master_weights import MasterWeights
from fulltune.optim.optimizers import Optimizer, OptimizerConfig, group_parameters
from fulltune.recipes.prepare import (
    Base,
    Prepared,
    find_examples,
    make_objective,
    open_base,
    prepare,
)
from fulltune.report.report import render_model_card, write_report
from fulltune.runtime import (
    Precision,
    PrecisionChoice,
    Runtime,
    choose_precision,
    describe_machine,
    finish_runtime,
    git_commit,
    peak_memory_bytes,
    seed_everything,
    start_runtime,
    versions,
)
from fulltune.tracking import Display, Tracker, TrackingConfig, format_bytes, make_display
from fulltune.train.checkpoint import (
    Checkpoint,
    find_damage,
    last_checkpoint,
    prune_checkpoints,
    remove_unfinished,
    save_checkpoint,
)
from fulltune.train.health import NonFiniteError, SpikeDetector, nonfinite_rows
from fulltune.train.interruption import agreed, caught_signals
from fulltune.train.loop import Ending, Every, Progress, fit
from fulltune.train.ranks import from_all_ranks, from_main_rank, on_all_ranks, on_main_rank
from fulltune.train.run_folder import (
    CHECKPOINTS,
    MODEL,
    check_run_folder,
    create_run_folder,
    flush_folder,
    is_finished,
    locked,
    remove_leftovers,
    replace_folder,
    write_atomically,
    write_errors,
    write_manifest,
)
from fulltune.train.step import MicroBatch, train_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fulltune")

STATE_BYTES = {"adamw": 8, "muon": 8, "adafactor": 1}
"""Bytes of optimizer state for each trained parameter, at most."""


class Config(Settings):
    """Settings of `fulltune finetune`."""

    model: str
    """What to start from: a folder, a Hub name, a `.gguf` file, a run folder, or `asset:NAME`."""
    task: TaskConfig
    scope: Scope = "all"
    """Which weights are trained: `all`, `head`, or `last N layers` with the head."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout everywhere in the model; null leaves the model's own."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target's probability that is spread over all classes."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log of the softmax's normaliser (chat and text)."""
    duration: Duration = Quantity(3, "epochs")
    """How long to train."""
    batch: BatchSize = Quantity(32768, "tokens")
    """What one optimizer step sees, over all micro-batches and ranks."""
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = "auto"
    """Of the forward and backward pass; weights are kept in float32 either way. `auto` measures."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    memory: MemorySetting = "auto"
    """Most memory the run may take: `auto` is what is free, or a limit such as `20 GiB`."""
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    run_dir: str
    """Folder of the run; made new."""
    save_every: Period = Quantity(100, "steps")
    """How often a checkpoint is saved; one is always saved at the end and when interrupted."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints kept."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that tokenize; null is one for each core."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split, the order of examples, dropout and a new head."""


@dataclass(frozen=True)
class Result:
    """How a run ended and where its result is."""

    run_dir: Path
    ending: Ending
    step: int
    metrics: dict[str, float]
    already_finished: bool = False
    is_main: bool = True
    """False on ranks that write nothing and have nothing to say."""


def run(config: Config, *, resume: bool = False, display: Display | None = None) -> Result:
    """Train, or go on with, the run in ``config.run_dir``.

    Raises:
        FulltuneError: of the kind that says what is wrong; nothing of another run is touched.
    """
    folder = Path(config.run_dir)
    metric = check_metric(
        config.evaluate.metric, config.task.kind, retention=bool(config.evaluate.retention)
    )
    runtime = start_runtime(config.device)
    try:
        found = on_all_ranks(runtime, lambda: check_run_folder(folder, config, resume=resume))
        if found is not None and is_finished(folder):
            return Result(folder, "finished", 0, {}, already_finished=True, is_main=runtime.is_main)
        if not runtime.is_main:
            return _run(config, found, metric, runtime, _Silent())
        with display or make_display(title=str(folder), metric=metric) as shown:
            return _run(config, found, metric, runtime, shown)
    finally:
        finish_runtime()


class _Silent:
    """The display of ranks other than the first."""

    num_steps: int | None = None

    def stage(self, text: str) -> None: ...
    def progress(self, description: str, done: int, total: int | None) -> None: ...
    def step(self, step: int, values: object) -> None: ...
    def evaluation(self, step: int, values: object) -> None: ...
    def notice(self, text: str) -> None: ...


def _run(
    config: Config,
    found: Config | None,
    metric: str,
    runtime: Runtime,
    display: Any,
) -> Result:
    folder = Path(config.run_dir)
    source = retention_source(config.evaluate, config.task.kind)
    base_bytes = psutil.Process().memory_info().rss
    # A resumed run computes as it began: another precision would be another run.
    precision = from_main_rank(
        runtime, choose_precision(found.precision if found else config.precision, runtime.device)
    )
    display.stage(f"precision {precision.reason}")
    config = config.model_copy(
        update={"precision": "bf16" if precision.dtype == torch.bfloat16 else "fp32"}
    )

    base = open_base(config.model, config.task)
    objective = make_objective(
        base, config.task, label_smoothing=config.label_smoothing, z_loss=config.z_loss
    )
    display.stage("reading and tokenizing the data")
    prepared = _prepare_on_all_ranks(config, objective, runtime, display)
    for finding in on_all_ranks(runtime, lambda: require_sound(prepared.facts)):
        if finding.level == "warning":
            display.notice(f"warning: {finding.message}")
    for note in prepared.notes:
        display.stage(note)

    display.stage("loading the model")
    trainer = Trainer(config, base, prepared, precision, runtime, display, base_bytes, metric)
    if source is not None:
        reader = trainer.objective
        assert isinstance(reader, CausalLM)
        texts = (
            TextExample(str(record.fields["text"]), record.where)
            for record in read_records(source, limit=64)
        )
        trainer.retention = encode_retention(texts, reader)

    with ExitStack() as held:

        def begin() -> None:
            held.enter_context(locked(folder))
            # Once more, now that no other run can begin here.
            check_run_folder(folder, config, resume=found is not None)
            remove_leftovers(folder)
            create_run_folder(folder, config)

        on_main_rank(runtime, begin)
        return trainer.train(resume=found is not None)


def _prepare_on_all_ranks(
    config: Config, objective: Any, runtime: Runtime, display: Any
) -> Prepared:
    """The first rank encodes; the others then find it in the cache."""

    def made() -> Prepared:
        return prepare(
            objective,
            config.task,
            seed=config.seed,
            num_workers=config.num_workers,
            progress=lambda done: display.progress("records tokenized", done, None),
        )

    prepared = on_main_rank(runtime, made)
    return on_all_ranks(runtime, lambda: prepared or made())


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
        self.retention: list[Any] = []
        self.started = time.time()

        self.model = on_all_ranks(runtime, self._load)
        layers = layer_of_parameters(self.model)
        depth = num_layers(self.model.config)
        freeze(self.model, config.scope, layer_of=layers, num_layers=depth)
        self.masters = MasterWeights(self.model, precision.dtype)
        self.kernels = install_fast_kernels(self.model)
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
            group_parameters(self.masters, config.optimizer, layer_of=layers, num_layers=depth),
            config.optimizer,
            num_steps=self.num_steps,
        )
        self.best = BestTracker(metric, config.evaluate.stop_after)
        self.spikes = SpikeDetector()
        self.progress = Progress()
        self.last_metrics: dict[str, float] = {}
        self.last_details: dict[str, Any] = {}
        self.seconds_before = 0.0
        self.flops = _flops_per_step(self.model, layers) if config.scope == "all" else None

    # -- before the first step ---------------------------------------------------------------------

    def _load(self) -> PreTrainedModel:
        """The base model in float32, its head new where it has none; the same for the same seed."""
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
        torch.nn.Module.to(model, self.runtime.device)  # in place
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
            has_vocabulary_loss=self.objective.head == "causal_lm",
            has_lean_kernels=bool(self.kernels),
        )
        self.display.stage(
            f"memory: about {format_bytes(plan.predicted_bytes)} predicted, "
            f"forward passes of {plan.micro_batch_tokens:,} tokens"
        )
        return plan

    def train(self, *, resume: bool) -> Result:
        """Train to the end, or until interrupted."""
        resumed_step = self._restore() if resume else None
        self.display.num_steps = self.num_steps
        steps_per_epoch = self.loader.steps_per_epoch()
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
                on_main_rank(self.runtime, lambda: self._sample(0))
                if self.config.task.validation is not None:
                    self._evaluate(0)
            if resumed_step is not None and self.best.should_stop:
                ending: Ending = "stopped early"  # killed after the decision, before the end
            else:
                ending = fit(
                    self.progress,
                    self._step,
                    self._batches(),
                    num_steps=self.num_steps,
                    evaluate=self._evaluate,
                    evaluate_every=_every(self.config.evaluate.every, steps_per_epoch),
                    save=lambda step: on_main_rank(self.runtime, lambda: self._save(step)),
                    save_every=_every(self.config.save_every, steps_per_epoch),
                    interrupted=lambda: agreed(interruption, self.runtime),
                )
            if ending == "interrupted":
                self.tracker.write(
                    "interrupted", step=self.progress.step, signal=interruption.signal_name
                )
                self.display.notice(
                    f"{interruption.signal_name}: saved after step {self.progress.step}; "
                    "go on with `--resume`"
                )
            else:
                on_main_rank(self.runtime, lambda: self._finish(ending))
        return Result(
            self.folder, ending, self.progress.step, self.last_metrics, is_main=self.runtime.is_main
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
        )
        share = self.num_trained / self.num_parameters
        self.display.notice(
            f"training {self.num_trained:,} of {self.num_parameters:,} parameters ({share:.0%}), "
            f"{self.num_steps:,} steps, {len(self.prepared.train):,} examples"
        )
        if resumed_step is not None:
            self.display.notice(f"resumed after step {resumed_step}")

    # -- each step ---------------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[StepPlan, list[MicroBatch]]]:
        """Steps of micro-batches, read and collated one step ahead."""
        rows = self.prepared.dataset

        def made() -> Iterator[tuple[StepPlan, list[MicroBatch]]]:
            for plan in self.loader:
                micro_batches = []
                for indices in plan.micro_batches:
                    examples = [rows[int(index)] for index in indices]
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
            rows = [example["where"] for micro in micro_batches for example in micro.examples]
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
            f"({error:+.0%})"
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

    # -- once in a while ---------------------------------------------------------------------------

    def _evaluate(self, step: int) -> bool:
        """Measure on the validation split; True asks to stop early."""
        if self.config.task.validation is None and not self.retention:
            return False
        self.display.stage("evaluating")
        metrics: dict[str, float] = {}
        if self.config.task.validation is not None:
            result: EvaluationResult = evaluate_model(
                self.model,
                self.objective,
                self.prepared.dataset,
                self.prepared.validation,
                kind=self.config.task.kind,
                micro_batch_tokens=self.plan.micro_batch_tokens,
            )
            metrics |= result.metrics
            self.last_details = result.details
        if self.retention:
            assert isinstance(self.objective, CausalLM)
            metrics["retention_loss"] = evaluate_retention(
                self.model,
                self.objective,
                self.retention,
                micro_batch_tokens=self.plan.micro_batch_tokens,
            )
        # Every rank measured all of it; where their last bits differ, they still stop together.
        metrics = from_main_rank(self.runtime, metrics)
        self.last_metrics = metrics
        judged = self.config.task.validation is not None
        is_best = judged and self.best.update(step, metrics)
        values = {"split": "validation", **metrics, "best": is_best}
        self.tracker.write("evaluation", step=step, **values)
        self.display.evaluation(step, values)
        if not judged:
            return False
        if is_best and step > 0:
            on_main_rank(self.runtime, lambda: self._save_best(step))
        if self.best.should_stop:
            self.tracker.write(
                "early_stop", step=step, metric=self.best.metric, best_step=self.best.best_step
            )
            self.display.notice(
                f"stopped early: no better `{self.best.metric}` than at step {self.best.best_step} "
                f"for {self.best.num_since_best} evaluations"
            )
        return self.best.should_stop

    def _sample(self, step: int) -> None:
        """Answer a few held-out prompts, to be read before and after."""
        count = self.config.evaluate.num_samples
        if self.config.task.kind != "chat" or not count or not len(self.prepared.validation):
            return
        self.display.stage("answering held-out prompts")
        wheres = [
            self.prepared.dataset.where(int(index))
            for index in self.prepared.validation[: 4 * count]
        ]
        examples = find_examples(self.config.task, wheres)
        conversations = [examples[where] for where in wheres if where in examples]
        samples: list[Sample] = sample_answers(
            self.model,
            self.base.tokenizer,
            [example for example in conversations if isinstance(example, ChatExample)],
            num_samples=count,
        )
        lines = [
            {
                "step": step,
                "prompt": [{"role": turn.role, "content": turn.content} for turn in sample.prompt],
                "answer": sample.answer,
                "reference": sample.reference,
            }
            for sample in samples
        ]
        # Written anew with what was there of other steps: a run killed here samples once more.
        path = self.folder / "samples.jsonl"
        kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in kept if json.loads(line)["step"] != step]
        made = [json.dumps(line, ensure_ascii=False) for line in lines]
        with write_errors(self.folder):
            write_atomically(path, "".join(f"{line}\n" for line in [*kept, *made]))
        for line in lines:
            self.tracker.write("sample", **line)

    # -- checkpoints -------------------------------------------------------------------------------

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "loader": self.loader.state(),
            "best": self.best.state(),
            "spike_losses": self.spikes.losses,
            "model_fingerprint": self._fingerprint(),
            "metrics": self.last_metrics,
            "details": self.last_details,
            "seconds": self._seconds(),
            "world_size": self.runtime.world_size,
            "micro_batch_tokens": self.plan.micro_batch_tokens,
        }
        folder = self.folder / CHECKPOINTS
        start = time.perf_counter()
        path = save_checkpoint(
            folder,
            f"step-{step:08d}",
            step=step,
            tensors={
                "weights": dict(self.masters.items()),
                "optimizer": dict(self.optimizer.state()),
            },
            state=state,
        )
        prune_checkpoints(folder, keep=self.config.keep_checkpoints)
        self.tracker.write(
            "checkpoint", step=step, path=str(path), seconds=time.perf_counter() - start
        )
        self.display.notice(f"saved checkpoint {path.name}")

    def _save_best(self, step: int) -> None:
        """The weights only; earlier ones stay until a checkpoint no longer needs them."""
        save_checkpoint(
            self.folder / CHECKPOINTS,
            f"best-{step:08d}",
            step=step,
            tensors={"weights": dict(self.masters.items())},
            state={"metrics": self.last_metrics, "details": self.last_details},
        )

    def _restore(self) -> int | None:
        """Go back to the newest whole checkpoint; None where the run saved none yet."""
        folder = self.folder / CHECKPOINTS
        on_main_rank(self.runtime, lambda: remove_unfinished(folder))
        checkpoint, problems = on_all_ranks(self.runtime, lambda: last_checkpoint(folder))
        for problem in problems:
            self.display.notice(f"not loaded: {problem}")
        if checkpoint is None:
            if self.runtime.is_main:
                for stale in ("samples.jsonl", "metrics.jsonl"):
                    (self.folder / stale).unlink(missing_ok=True)
            return None
        state = checkpoint.state
        if state["model_fingerprint"] != self._fingerprint():
            raise CheckpointError(
                f"`{checkpoint.path}` is a checkpoint of another model: its parameters differ",
                hint="resume with the `model` and `scope` the run began with, or start a new run",
            )
        self.masters.load(checkpoint.tensors("weights"))
        self.optimizer.load_state(checkpoint.tensors("optimizer"))
        self.loader.load_state(state["loader"])
        self.best.load_state(state["best"])
        self.spikes.losses = state["spike_losses"]
        self.last_metrics, self.last_details = state["metrics"], state["details"]
        self.seconds_before = state["seconds"]
        self._plan_as_before(state["micro_batch_tokens"])
        self.progress.step = checkpoint.step
        return checkpoint.step

    def _plan_as_before(self, micro_batch_tokens: int) -> None:
        """More free memory than before must not change the last bits of what is learned."""
        if self.plan.micro_batch_tokens < micro_batch_tokens:
            self.display.notice(
                f"forward passes of {self.plan.micro_batch_tokens:,} tokens fit now, and were "
                f"{micro_batch_tokens:,} before: the run goes on, its last bits may differ"
            )
            return
        self.plan = replace(self.plan, micro_batch_tokens=micro_batch_tokens)
        self.loader.micro_batch_tokens = micro_batch_tokens

    def _fingerprint(self) -> list[list[Any]]:
        """Names and shapes of what is trained."""
        return [[name, list(tensor.shape)] for name, tensor in self.masters.items()]

    def _seconds(self) -> float:
        return self.seconds_before + time.time() - self.started

    # -- the end -----------------------------------------------------------------------------------

    def _finish(self, ending: Ending) -> None:
        """Take the best weights, write the model, and say where everything came from."""
        step = self.progress.step
        prune_checkpoints(self.folder / CHECKPOINTS, keep=self.config.keep_checkpoints)
        best = self.folder / CHECKPOINTS / f"best-{self.best.best_step or 0:08d}"
        if self.best.best_step is not None and self.best.best_step != step and best.exists():
            self._write_model(self.folder / "model-last")
            self._take(best)
            self.display.notice(
                f"the weights of step {self.best.best_step} are kept, the best by "
                f"`{self.best.metric}`; those of step {step} are in `model-last`"
            )
        self._sample(step)
        change = self._weight_change()
        self._say_what_moved(change)
        manifest = self._manifest(ending, change)
        self._write_model(self.folder / MODEL, card=render_model_card(manifest))
        with write_errors(self.folder):
            self._write_facts(manifest)

    def _write_facts(self, manifest: dict[str, Any]) -> None:
        write_atomically(
            self.folder / "data.json", to_json(self.prepared.facts, self.prepared.findings)
        )
        if "confusion_matrix" in self.last_details:
            (self.folder / "predictions").mkdir(exist_ok=True)
            evaluation = {
                "labels": list(getattr(self.objective, "labels", ())),
                "confusion": self.last_details["confusion_matrix"],
                "per_class": self.last_details["per_label"],
            }
            write_atomically(
                self.folder / "predictions" / "evaluation.json",
                json.dumps(evaluation, ensure_ascii=False),
            )
        self.tracker.write(
            "end", step=self.progress.step, ending=manifest["ending"], seconds=self._seconds(),
            **self.last_metrics,
        )  # fmt: skip
        # The report reads the manifest; only the last write says that all of it is there.
        write_manifest(self.folder, {**manifest, "finished": False})
        try:
            write_report([self.folder], self.folder / "report.html")
        except RunFolderError as error:
            error.hint = "free some space, then go on with `--resume`: only the report is missing"
            raise
        write_manifest(self.folder, manifest)

    def _take(self, best: Path) -> None:
        problem = find_damage(best)
        if problem is not None:
            raise CheckpointError(f"the best weights, `{best}`, cannot be used: {problem}")
        state = json.loads((best / "state.json").read_text(encoding="utf-8"))
        self.masters.load(Checkpoint(best, _number(best), state).tensors("weights"))
        self.last_metrics, self.last_details = state["metrics"], state["details"]

    def _write_model(self, folder: Path, card: str | None = None) -> None:
        temporary = folder.with_name(f".{folder.name}.tmp")
        info = {
            "kind": self.config.task.kind,
            "max_length": self.objective.max_length,
            "base_model": self.config.model,
            "run": str(self.folder),
        }
        with write_errors(folder), ExitStack() as leftovers:
            # Gone by then, unless the disk was full: its room is wanted back.
            leftovers.callback(shutil.rmtree, temporary, ignore_errors=True)
            save_model(self.model, self.base.tokenizer, temporary, info=info)
            if card is not None:
                (temporary / "README.md").write_text(card, encoding="utf-8")
            flush_folder(temporary)
            replace_folder(temporary, folder)

    def _weight_change(self) -> list[dict[str, Any]]:
        """How far each layer moved from the base model, which is loaded once more to see it."""
        base = dict(self._load().named_parameters())
        groups: dict[str, list[float]] = {}
        layers = layer_of_parameters(self.model)
        for name, master in self.masters.items():
            layer = layers[name]
            group = groups.setdefault(
                layer if isinstance(layer, str) else f"layer {layer}", [0.0] * 4
            )
            before = base[name].detach()
            moved = master.detach() - before
            group[0] += float(moved.double().square().sum())
            group[1] += float(before.double().square().sum())
            group[2] += master.numel()
            group[3] += int((moved != 0).sum())
        return [
            {
                "group": name,
                "relative_change": (moved / max(before, 1e-30)) ** 0.5,
                "num_parameters": int(count),
                "share_moved": changed / count,
            }
            for name, (moved, before, count, changed) in groups.items()
        ]

    def _say_what_moved(self, change: list[dict[str, Any]]) -> None:
        total = sum(group["num_parameters"] for group in change)
        moved = sum(group["share_moved"] * group["num_parameters"] for group in change)
        still = [group["group"] for group in change if group["relative_change"] == 0]
        self.display.notice(
            f"{moved / total:.1%} of {total:,} trained weights moved"
            + (f"; nothing moved in {', '.join(still)}" if still else ", every layer among them")
        )
        for group in change:
            self.tracker.write("weight_change", step=self.progress.step, **group)

    def _manifest(self, ending: Ending, change: list[dict[str, Any]]) -> dict[str, Any]:

        return {
            "finished": True,
            "ending": ending,
            "name": self.folder.name,
            "base_model": self.config.model,
            "base_model_hash": source_fingerprint_of_model(self.base.path),
            "task": self.config.task.kind,
            "data": [
                {**source, "rows": self.prepared.dataset.num_records if index == 0 else None}
                for index, source in enumerate(self.prepared.sources)
            ],
            "settings": self.config.model_dump(mode="json"),
            "results": self.last_metrics,
            "best_step": self.best.best_step,
            "steps": self.progress.step,
            "versions": versions(),
            "machine": describe_machine(self.runtime.device),
            "git_commit": git_commit(Path.cwd()),
            "duration_seconds": self._seconds(),
            "num_parameters": self.num_parameters,
            "num_trained_parameters": self.num_trained,
            "memory": {
                "predicted_bytes": self.plan.predicted_bytes,
                "peak_bytes": peak_memory_bytes(self.runtime.device),
            },
            "weight_change": change,
        }


class _NoTracker:
    """The log of ranks other than the first."""

    def __enter__(self) -> _NoTracker:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def write(self, event: str, **values: object) -> None: ...


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products, forward and backward: 6 a weight and token.

    Attention's own products, which grow with the length of a document, are not counted.
    """

    body: float
    """A token."""
    head: float
    """A predicted token."""


def _flops_per_step(model: PreTrainedModel, layers: dict[str, Any]) -> Flops:
    body = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and isinstance(layers[name], int)
    )
    output = model.get_output_embeddings()
    return Flops(6.0 * body, 6.0 * output.weight.numel() if output is not None else 0.0)


def layer_of_parameters(model: PreTrainedModel) -> dict[str, Any]:
    """The layer of every parameter by name."""
    return {name: layer_of(name, model) for name, _ in model.named_parameters()}


def source_fingerprint_of_model(path: Path) -> dict[str, str]:
    """SHA-256 of the weight files of a model folder."""
    import hashlib

    hashes = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _every(period: Quantity, steps_per_epoch: int) -> Every:
    if period.unit == "steps":
        return Every(max(1, round(period.value)))
    return Every(max(1, round(period.value * steps_per_epoch)))


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
