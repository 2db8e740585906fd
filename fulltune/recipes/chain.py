"""`fulltune chain`: text to a measured model in one file, each step from the folder of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from fulltune.config import Settings, build_config, read_yaml
from fulltune.data.tokenizers import INFO_FILE, TokenizerConfig
from fulltune.errors import ConfigError
from fulltune.recipes import evaluate, finetune, pretrain, tokenizer
from fulltune.train.run_folder import has_run


class TokenizerStep(TokenizerConfig):
    """Train a tokenizer: the options of `fulltune tokenizer train`."""

    train: tuple[str, ...]
    """Text: files, folders, `asset:NAME`."""
    output: str
    """Folder of the tokenizer."""


class EvaluateStep(Settings):
    """Measure a model."""

    model: str
    """A run folder, or any model."""
    data: str | None = None
    """Labelled rows or text; null is the validation split of the run."""


class Step(Settings):
    """One verb with its settings."""

    tokenizer: TokenizerStep | None = None
    pretrain: pretrain.Config | None = None
    finetune: finetune.Config | None = None
    evaluate: EvaluateStep | None = None

    @model_validator(mode="after")
    def _one_verb(self) -> Step:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            named = ", ".join(f"`{name}`" for name in given) or "nothing"
            raise ValueError(f"a step is one verb, and this one has {named}; write one a step")
        return self


class Config(Settings):
    """Settings of `fulltune chain`."""

    steps: tuple[Step, ...] = Field(min_length=1)
    """What is done, in this order; a later step names the folder of an earlier one."""


@dataclass(frozen=True)
class StepResult:
    """What a step made or measured."""

    verb: str
    result: str
    """Folder or model."""
    metrics: dict[str, float]
    done_before: bool = False


def load(path: Path) -> Config:
    """Read the file of a chain; what is wrong is said before the first step.

    Raises:
        ConfigError: a setting of any step is unknown or not possible.
    """
    values = read_yaml(path)
    steps = values.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ConfigError(
            f"`{path}` has no list of steps",
            hint="write `steps:` and below it `- tokenizer: {...}`, `- pretrain: {...}` and so on",
        )
    return build_config(Config, values)


def run(
    config: Config,
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[StepResult]:
    """Take the steps in their order; with ``resume``, those that are finished are passed over.

    Raises:
        FulltuneError: of the step that failed; what the steps before it made stays.
    """
    results: list[StepResult] = []
    for number, step in enumerate(config.steps, start=1):
        verb = next(name for name in Step.model_fields if getattr(step, name) is not None)
        say(f"step {number} of {len(config.steps)}: {verb}")
        result = _take(step, resume=resume)
        if result is None:
            break
        results.append(result)
    return results


def _take(step: Step, *, resume: bool) -> StepResult | None:
    """None where the step was interrupted."""
    if step.tokenizer is not None:
        output = Path(step.tokenizer.output)
        if resume and (output / INFO_FILE).is_file():
            return StepResult("tokenizer", str(output), {}, done_before=True)
        options = step.tokenizer.model_dump(exclude={"train", "output"})
        trained = tokenizer.train(
            step.tokenizer.train, output, build_config(TokenizerConfig, options)
        )
        return StepResult("tokenizer", str(output), _numbers(asdict(trained.statistics)))
    if step.evaluate is not None:
        report = evaluate.run(step.evaluate.model, data=step.evaluate.data)
        return StepResult("evaluate", step.evaluate.model, report.metrics)
    verb = "pretrain" if step.pretrain is not None else "finetune"
    if step.pretrain is not None:
        again = resume and has_run(Path(step.pretrain.run_dir))
        ended = pretrain.run(step.pretrain, resume=again)
    else:
        assert step.finetune is not None
        again = resume and has_run(Path(step.finetune.run_dir))
        ended = finetune.run(step.finetune, resume=again)
    if ended.ending == "interrupted":
        return None
    return StepResult(verb, str(ended.run_dir), ended.metrics, ended.already_finished)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
