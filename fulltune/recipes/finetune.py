"""`fulltune finetune`: all weights of a model, on one task, from settings to a finished folder."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import torch
from pydantic import Field

from fulltune.config import BatchSize, Duration, Period, Quantity, Settings
from fulltune.data.formats import make_example, recognise_format
from fulltune.data.preview_checks import require_sound
from fulltune.data.records import check_source, read_records
from fulltune.data.tasks import TASKS, TaskConfig, TextExample
from fulltune.errors import ConfigError
from fulltune.evaluate.evaluator import (
    EvaluateConfig,
    Retention,
    encode_retention,
    retention_reader,
    retention_source,
)
from fulltune.evaluate.metrics import check_metric
from fulltune.memory.plan import MemorySetting
from fulltune.models.scope import Scope
from fulltune.objectives.base import Objective
from fulltune.optim.optimizers import OptimizerConfig
from fulltune.recipes.finish import finish
from fulltune.recipes.prepare import (
    Base,
    Prepared,
    make_objective,
    open_base,
    prepare,
)
from fulltune.recipes.reference import add_reference
from fulltune.recipes.trainer import Trainer, Watch
from fulltune.runtime import (
    Precision,
    Runtime,
    choose_precision,
    start_runtime,
)
from fulltune.tracking import Display, TrackingConfig, check_sinks, make_display
from fulltune.train.loop import Ending
from fulltune.train.ranks import from_main_rank, on_all_ranks, on_main_rank
from fulltune.train.run_folder import (
    check_run_folder,
    create_run_folder,
    is_finished,
    locked,
    remove_leftovers,
)


class Config(Settings):
    """Settings of `fulltune finetune`."""

    model: str
    """What to start from: a folder, a Hub name, a `.gguf` file, a run folder, or `asset:NAME`."""
    task: TaskConfig
    scope: Scope = "all"
    """Which weights are trained: `all`, `head`, or `last N layers` with the head. `lora RANK` is
    there for comparison (peft), and merged into plain weights at the end."""
    reinitialize_layers: Annotated[int, Field(ge=0)] = 0
    """Layers from the top that start with new weights, and the pooler with them: 1 to 4 steady the
    fine-tuning of an encoder on little data (Zhang et al., 2021); 0 keeps all."""
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
    """Newest checkpoints kept; beside them `best-*`, the weights of the best evaluation."""
    save_as: Literal["fp32", "bf16"] = "fp32"
    """Weights in `model/`: exact in `fp32`; `bf16` rounds them and halves the folder."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that tokenize; null is one for each core."""
    seed: Annotated[int, Field(ge=0, lt=10**9)] = 0
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
    signal_name: str | None = None
    """The signal that asked to stop, also where it came while a run was finishing."""


@dataclass(frozen=True)
class Start:
    """How a verb opens its model and reads its data; the rest of a run is the same for all."""

    open: Callable[[Any], tuple[Base, Objective]]
    """Settings -> the model to start from and what it is trained on."""
    prepare: Callable[[Any, Any, Callable[[int], None]], Prepared]
    """Settings, objective and a report of records read -> data."""
    metrics: tuple[str, ...] = ()
    """Measured besides those of the task's kind."""


def _open(config: Config) -> tuple[Base, Objective]:
    base = open_base(config.model, config.task)
    return base, make_objective(
        base, config.task, label_smoothing=config.label_smoothing, z_loss=config.z_loss
    )


def _prepare(config: Config, objective: Any, progress: Callable[[int], None]) -> Prepared:
    return prepare(
        objective,
        config.task,
        seed=config.seed,
        num_workers=config.num_workers,
        progress=progress,
    )


FINETUNE = Start(_open, _prepare)


def run(
    config: Config,
    *,
    resume: bool = False,
    display: Display | None = None,
    start: Start = FINETUNE,
    watch: Watch | None = None,
) -> Result:
    """Train, or go on with, the run in ``config.run_dir``.

    Args:
        config: the settings of the run.
        resume: go on with the run that the folder holds.
        display: told what is being done; None is a new one on stderr.
        start: how the model is opened and the data is read.
        watch: told of each evaluation; may give the run up.

    Raises:
        FulltuneError: of the kind that says what is wrong; nothing of another run is touched.
    """
    folder = Path(config.run_dir)
    metric = check_settings(config, start)
    runtime = start_runtime(config.device)
    found = on_all_ranks(runtime, lambda: check_run_folder(folder, config, resume=resume))
    if found is not None and is_finished(folder):
        return Result(folder, "finished", 0, {}, already_finished=True, is_main=runtime.is_main)
    with display_of(runtime, display, title=str(folder), metric=metric) as shown:
        return _run(config, found, metric, runtime, shown, start, watch)


@contextmanager
def display_of(
    runtime: Runtime, display: Display | None = None, *, title: str, metric: str
) -> Generator[Any]:
    """A display on the first rank, by default a new one; the others have nothing to say."""
    if not runtime.is_main:
        yield _Silent()
        return
    with display or make_display(title=title, metric=metric) as shown:
        yield shown


def check_settings(config: Config, start: Start = FINETUNE) -> str:
    """Refuse what the settings alone show to be wrong; the metric that decides which step is best.

    Raises:
        ConfigError: a setting says nothing, or has no effect beside the others.
    """
    metric = check_metric(
        config.evaluate.metric,
        config.task.kind,
        retention=bool(config.evaluate.retention),
        more=start.metrics,
    )
    check_sinks(config.tracking)
    _refuse_settings_without_effect(config)
    _refuse_new_layers_that_are_not_trained(config)
    return metric


def _refuse_settings_without_effect(config: Config) -> None:
    # Settings with their defaults are those of every run's `config.yaml`, and 0 asks for nothing.
    default = EvaluateConfig()
    num_samples = config.evaluate.num_samples
    asks_for_samples = num_samples not in (0, default.num_samples)
    if config.task.validation is None:
        fine = {
            "metric": config.evaluate.metric is None,
            "stop_after": config.evaluate.stop_after is None,
            "every": config.evaluate.every == default.every or bool(config.evaluate.retention),
            "num_samples": not asks_for_samples or not TASKS[config.task.kind].answers,
        }
        if name := next((name for name, is_fine in fine.items() if not is_fine), None):
            raise ConfigError(
                f"`evaluate.{name}` has no effect with `task.validation: null`",
                hint="hold something out, such as `task.validation: 5%`, or leave it out",
            )
    if asks_for_samples and not TASKS[config.task.kind].answers:
        raise ConfigError(
            f"`evaluate.num_samples` has no effect with `task.kind: {config.task.kind}`, which "
            "answers no prompts",
            hint="leave it out",
        )
    if config.scope == "head" and config.optimizer.layer_lr_decay != 1:
        raise ConfigError(
            "`optimizer.layer_lr_decay` has no effect with `scope: head`, which trains no layer",
            hint="leave it out, and set the rate of the head with `optimizer.lr`",
        )


def _refuse_new_layers_that_are_not_trained(config: Config) -> None:
    count, scope = config.reinitialize_layers, config.scope
    num_trained = count if scope == "all" else 0
    if scope.startswith("last"):
        num_trained = int(scope.split()[1])
    if count > num_trained:
        raise ConfigError(
            f"`reinitialize_layers: {count}` beside `scope: {scope}` would leave layers random, "
            "which are not trained",
            hint="train them with `scope: all`, or keep them with `reinitialize_layers: 0`",
        )


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
    start: Start,
    watch: Watch | None,
) -> Result:
    folder = Path(config.run_dir)
    trainer = assemble(config, found, metric, runtime, display, start)
    trainer.watch = watch
    add_reference(trainer)
    with ExitStack() as held:

        def begin() -> None:
            held.enter_context(locked(folder))
            # Once more, now that no other run can begin here.
            check_run_folder(folder, trainer.config, resume=found is not None)
            remove_leftovers(folder)
            create_run_folder(folder, trainer.config)

        on_main_rank(runtime, begin)
        ending = trainer.train(resume=found is not None, finish=finish)
        return Result(
            folder,
            ending,
            trainer.progress.step,
            trainer.last_metrics,
            is_main=runtime.is_main,
            signal_name=trainer.signal_name,
        )


def assemble(
    config: Config,
    found: Config | None,
    metric: str,
    runtime: Runtime,
    display: Any,
    start: Start = FINETUNE,
) -> Trainer:
    """Everything up to the first step: model, data, memory and optimizer; no run folder yet.

    Args:
        config: of the run, checked by `check_settings`.
        found: what the run that is gone on with began with; None for a new one.
        metric: what decides which step is best.
        runtime: device and ranks.
        display: told what is being done.
        start: how the model is opened and the data is read.
    """
    source = retention_source(config.evaluate)
    if source is not None:
        on_all_ranks(runtime, lambda: check_source(source))
    base_bytes = psutil.Process().memory_info().rss
    # Paths that are not there are found before anything is measured.
    base, objective = on_all_ranks(runtime, lambda: start.open(config))
    # A resumed run computes as it began: another precision would be another run.
    precision = from_main_rank(
        runtime, choose_precision(found.precision if found else config.precision, runtime.device)
    )
    display.stage(f"precision {precision.reason}")
    config = config.model_copy(
        update={"precision": "bf16" if precision.dtype == torch.bfloat16 else "fp32"}
    )

    reader = retention_reader(objective) if source is not None else None
    display.stage("reading and tokenizing the data")
    prepared = _prepare_on_all_ranks(config, objective, runtime, display, start)
    may_truncate = config.task.too_long != "error"
    for finding in on_all_ranks(
        runtime, lambda: require_sound(prepared.facts, may_truncate=may_truncate)
    ):
        if finding.level == "warning":
            display.notice(f"warning: {finding.message}")
    for note in prepared.notes:
        display.stage(note)

    display.stage("loading the model")
    trainer = Trainer(config, base, prepared, precision, runtime, display, base_bytes, metric)
    if source is not None and reader is not None:
        trainer.retention = Retention(
            reader, on_all_ranks(runtime, lambda: encode_retention(_texts_of(source), reader))
        )
    return trainer


def _texts_of(source: str) -> list[TextExample]:
    """The first documents of the text that retention is measured on."""
    records = list(read_records(source, limit=64))
    task = TaskConfig(kind="text", train=source)
    layout = recognise_format(records, task)
    examples = (make_example(record, layout, kind="text") for record in records)
    return [example for example in examples if isinstance(example, TextExample)]


def _prepare_on_all_ranks(
    config: Config, objective: Any, runtime: Runtime, display: Any, start: Start
) -> Prepared:
    """The first rank encodes; the others then find it in the cache."""

    def made() -> Prepared:
        return start.prepare(
            config, objective, lambda done: display.progress("records tokenized", done, None)
        )

    prepared = on_main_rank(runtime, made)
    return on_all_ranks(runtime, lambda: prepared or made())
