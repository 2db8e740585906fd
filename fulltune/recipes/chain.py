"""`fulltune chain`: text to a measured model in one file, each step from the folder of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


VERBS: dict[str, type[Settings]] = {
    "tokenizer": TokenizerStep,
    "pretrain": pretrain.Config,
    "finetune": finetune.Config,
    "evaluate": EvaluateStep,
}


@dataclass(frozen=True)
class StepResult:
    """What a step made or measured."""

    verb: str
    result: str
    """Folder or model."""
    metrics: dict[str, float]
    done_before: bool = False


def load(path: Path) -> list[Settings]:
    """Read the file of a chain; what is wrong is said before the first step.

    Returns:
        The settings of each step, of the classes in `VERBS`.

    Raises:
        ConfigError: a setting of any step is unknown or not possible.
    """
    values = read_yaml(path)
    steps = values.get("steps")
    if set(values) != {"steps"} or not isinstance(steps, list) or not steps:
        raise ConfigError(
            f"`{path}` is not a list of steps",
            hint="write `steps:` and below it `- tokenizer: {...}`, `- pretrain: {...}` and so on",
        )
    return [_read_step(step, number) for number, step in enumerate(steps, start=1)]


def _read_step(step: object, number: int) -> Settings:
    verb = next(iter(step), None) if isinstance(step, dict) and len(step) == 1 else None
    if verb not in VERBS or not isinstance(step, dict) or not isinstance(step[verb], dict):
        raise ConfigError(
            f"step {number} is not one verb with its settings",
            hint=f"begin it with one of {', '.join(f'`{name}:`' for name in VERBS)}",
        )
    try:
        return build_config(VERBS[verb], step[verb])
    except ConfigError as error:
        raise ConfigError(f"step {number}, {verb}: {error}", hint=error.hint) from None


def run(
    steps: Sequence[Settings],
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[StepResult]:
    """Take the steps in their order; with ``resume``, those that are finished are passed over.

    Returns:
        What the steps made, up to the first that was interrupted.

    Raises:
        FulltuneError: of the step that failed; what the steps before it made stays.
    """
    results: list[StepResult] = []
    for number, step in enumerate(steps, start=1):
        verb = next(name for name, kind in VERBS.items() if type(step) is kind)
        say(f"step {number} of {len(steps)}: {verb}")
        result = _take(step, verb, resume=resume)
        if result is None:
            break
        results.append(result)
    return results


def _take(step: Settings, verb: str, *, resume: bool) -> StepResult | None:
    """None where the step was interrupted."""
    if isinstance(step, TokenizerStep):
        output = Path(step.output)
        options = step.model_dump(exclude={"train", "output"})
        config = build_config(TokenizerConfig, options)
        if resume and (output / INFO_FILE).is_file():
            tokenizer.check_same(step.train, output, config)
            return StepResult(verb, str(output), {}, done_before=True)
        trained = tokenizer.train(step.train, output, config)
        return StepResult(verb, str(output), _numbers(asdict(trained.statistics)))
    if isinstance(step, EvaluateStep):
        report = evaluate.run(step.model, data=step.data)
        return StepResult(verb, step.model, report.metrics)
    assert isinstance(step, finetune.Config)
    again = resume and has_run(Path(step.run_dir))
    recipe = pretrain if isinstance(step, pretrain.Config) else finetune
    ended = recipe.run(step, resume=again)
    if ended.ending == "interrupted":
        return None
    return StepResult(verb, str(ended.run_dir), ended.metrics, ended.already_finished)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
