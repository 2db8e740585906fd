"""What a run measures once in a while: metrics, when to stop, and answers to prompts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fulltune.data.tasks import TASKS
from fulltune.evaluate.evaluator import (
    EvaluationResult,
    evaluate_model,
    evaluate_retention,
    sample_answers,
)
from fulltune.recipes.resume import save_best
from fulltune.train.ranks import from_main_rank, on_main_rank
from fulltune.train.run_folder import write_atomically, write_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fulltune.recipes.trainer import Trainer


def measure(trainer: Trainer, model: PreTrainedModel) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and details of a model on the validation split and on the retention text."""
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    if trainer.config.task.validation is not None:
        result: EvaluationResult = evaluate_model(
            model,
            trainer.objective,
            trainer.prepared.dataset,
            trainer.prepared.validation,
            kind=trainer.config.task.kind,
            micro_batch_tokens=trainer.plan.micro_batch_tokens,
        )
        metrics, details = dict(result.metrics), result.details
    if trainer.retention is not None:
        metrics["retention_loss"] = evaluate_retention(
            model,
            trainer.retention.reader,
            trainer.retention.windows,
            micro_batch_tokens=trainer.plan.micro_batch_tokens,
        )
    return metrics, details


def evaluate(trainer: Trainer, step: int) -> bool:
    """Measure on the validation split; True asks to stop early."""
    if trainer.config.task.validation is None and trainer.retention is None:
        return False
    trainer.display.stage("evaluating")
    metrics, trainer.last_details = measure(trainer, trainer.model)
    # Every rank measured all of it; where their last bits differ, they still stop together.
    metrics = from_main_rank(trainer.runtime, metrics)
    trainer.last_metrics = metrics
    judged = trainer.config.task.validation is not None
    is_best = judged and trainer.best.update(step, metrics)
    values = {"split": "validation", **metrics, "best": is_best}
    trainer.tracker.write("evaluation", step=step, **values)
    trainer.display.evaluation(step, values)
    if not judged:
        return False
    if is_best and step > 0:
        on_main_rank(trainer.runtime, lambda: save_best(trainer, step))
    if trainer.best.should_stop:
        trainer.tracker.write(
            "early_stop", step=step, metric=trainer.best.metric, best_step=trainer.best.best_step
        )
        trainer.display.notice(
            f"stopped early: no better `{trainer.best.metric}` than at step "
            f"{trainer.best.best_step} for {trainer.best.num_since_best} evaluations"
        )
    given_up = _is_given_up(trainer, step)
    return trainer.best.should_stop or given_up


def _is_given_up(trainer: Trainer, step: int) -> bool:
    """Whether whoever watches the run asks to end it here, before its last step."""
    watch = trainer.watch
    if watch is None or step == 0:
        return False
    asked = on_main_rank(trainer.runtime, lambda: watch(step, trainer.last_metrics))
    is_over = trainer.best.should_stop or step == trainer.num_steps
    trainer.given_up = from_main_rank(trainer.runtime, bool(asked)) and not is_over
    if trainer.given_up:
        trainer.tracker.write("given_up", step=step)
        trainer.display.notice(f"given up after step {step}")
    return trainer.given_up


def sample(trainer: Trainer, step: int, model: PreTrainedModel) -> None:
    """Answer a few held-out prompts, to be read before and after."""
    count = trainer.config.evaluate.num_samples
    answers = TASKS[trainer.config.task.kind].answers
    if not answers or not count or not len(trainer.prepared.validation):
        return
    trainer.display.stage("answering held-out prompts")
    samples = sample_answers(
        model,
        trainer.base.tokenizer,
        trainer.conversations,
        num_samples=count,
    )
    lines = [{"step": step, **sample.as_json()} for sample in samples]
    # Written anew with what was there of other steps: a run killed here samples once more.
    path = trainer.folder / "samples.jsonl"
    kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in kept if json.loads(line)["step"] != step]
    made = [json.dumps(line, ensure_ascii=False) for line in lines]
    with write_errors(trainer.folder):
        write_atomically(path, "".join(f"{line}\n" for line in [*kept, *made]))
    for line in lines:
        trainer.tracker.write("sample", **line)
