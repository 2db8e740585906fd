"""`fulltune chain`: text to a measured model in one file, each step from the folder of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fulltune.config import Settings, build_config, read_yaml
from fulltune.data.tokenizers import INFO_FILE
from fulltune.errors import ConfigError
from fulltune.recipes import corpus, evaluate, finetune, pretrain, settings_files, tokenizer
from fulltune.recipes.chain_checks import check, naming
from fulltune.recipes.chain_steps import KINDS, EvaluateStep, TokenizerStep, kind_of
from fulltune.recipes.kept_evaluations import keep_evaluation
from fulltune.runtime import Runtime, join_ranks
from fulltune.train.ranks import from_main_rank, on_all_ranks, on_main_rank, patient_group
from fulltune.train.run_folder import has_run

__all__ = ["StepResult", "check", "load", "run"]


@dataclass(frozen=True)
class StepResult:
    """What a step made or measured."""

    verb: str
    result: str
    """Folder or model."""
    metrics: dict[str, float]
    done_before: bool = False


def load(path: Path) -> list[Settings]:
    """Read the file of a chain.

    Returns:
        The settings of each step, of the classes in `KINDS`.

    Raises:
        ConfigError: a setting of any step is unknown or not possible, or the file is no chain.
    """
    values = read_yaml(path)
    settings_files.require(path, values, "chain")
    steps = values.get("steps")
    if not isinstance(steps, list) or not steps:
        raise ConfigError(
            f"`{path}` is not a list of steps",
            hint="write `steps:` and below it `- tokenizer: {...}`, `- pretrain: {...}` and so on; "
            "`fulltune settings chain` lists what is possible",
        )
    if others := [f"`{name}`" for name in values if name != "steps"]:
        raise ConfigError(
            f"`{path}` has {', '.join(others)} beside `steps`",
            hint="write settings within the step they are of",
        )
    return [_read_step(step, number) for number, step in enumerate(steps, start=1)]


def _read_step(step: object, number: int) -> Settings:
    verb = next(iter(step), None) if isinstance(step, dict) and len(step) == 1 else None
    if verb not in KINDS or not isinstance(step, dict) or not isinstance(step[verb], dict):
        raise ConfigError(
            f"step {number} is not one kind of step with its settings",
            hint=f"begin it with one of {', '.join(f'`{name}:`' for name in KINDS)}, and indent "
            "its settings below",
        )
    with naming(number, verb):
        return build_config(KINDS[verb].settings, step[verb])


def run(
    steps: Sequence[Settings],
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[StepResult]:
    """Check all steps, then take them in their order.

    Under `torchrun` all ranks train; what is no training the first rank does, while the others
    wait, and all get its results.

    Args:
        steps: the settings of each, of the classes in `KINDS`.
        resume: pass over those that are finished.
        say: told which step begins.

    Returns:
        What the steps made, up to the first that was interrupted.

    Raises:
        FulltuneError: of the step that failed; what the steps before it made stays.
    """
    runtime = _join_ranks(steps)
    # On all before the first step begins on one: it makes a folder, which must not be there yet.
    on_all_ranks(runtime, lambda: check(steps, resume=resume))
    waiting = patient_group(runtime)
    results: list[StepResult] = []
    for number, step in enumerate(steps, start=1):
        verb = kind_of(step)
        if runtime.is_main:
            say(f"step {number} of {len(steps)}: {verb}")
        with naming(number, verb):
            if isinstance(step, finetune.Config):
                result = _train(step, verb, resume=resume)
            else:
                made = on_main_rank(
                    runtime, partial(_take_alone, step, resume=resume), group=waiting
                )
                result = from_main_rank(runtime, made)
        if result is None:
            break
        results.append(result)
    return results


def _join_ranks(steps: Sequence[Settings]) -> Runtime:
    """The ranks of all steps, joined as the first that trains needs it."""
    for number, step in enumerate(steps, start=1):
        if isinstance(step, finetune.Config):
            with naming(number, kind_of(step)):
                return join_ranks(step.device)
    return join_ranks("cpu")


def _train(step: finetune.Config, verb: str, *, resume: bool) -> StepResult | None:
    """None where the step was interrupted."""
    again = resume and has_run(Path(step.run_dir))
    recipe = pretrain if isinstance(step, pretrain.Config) else finetune
    ended = recipe.run(step, resume=again)
    if ended.ending == "interrupted":
        return None
    return StepResult(verb, str(ended.run_dir), ended.metrics, ended.already_finished)


def _take_alone(step: Settings, *, resume: bool) -> StepResult:
    """A step without training, which one process takes."""
    if isinstance(step, corpus.Config):
        return _prepare_corpus(step, resume=resume)
    if isinstance(step, TokenizerStep):
        return _train_tokenizer(step, resume=resume)
    assert isinstance(step, EvaluateStep)
    report = evaluate.run(step.model, data=step.data, columns=step.columns or None)
    keep_evaluation(report)
    return StepResult("evaluate", step.model, report.metrics)


def _prepare_corpus(step: corpus.Config, *, resume: bool) -> StepResult:
    prepared = corpus.run(step, resume=resume)
    counted = {
        f"{split}_{unit}": held[unit]
        for split, held in prepared.manifest["splits"].items()
        for unit in ("documents", "characters")
    }
    return StepResult("corpus", str(prepared.folder), counted, prepared.already_finished)


def _train_tokenizer(step: TokenizerStep, *, resume: bool) -> StepResult:
    output, config = Path(step.output), step.config
    if resume and (output / INFO_FILE).is_file():
        tokenizer.check_same(step.sources, output, config, columns=step.columns)
        return StepResult("tokenizer", str(output), {}, done_before=True)
    trained = tokenizer.train(step.sources, output, config, columns=step.columns)
    return StepResult("tokenizer", str(output), _numbers(asdict(trained.statistics)))


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
