"""The kinds of step of a chain: their settings, what each starts from, and what it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from pydantic import Field

from fulltune.config import SettingRow, Settings, build_config, list_settings
from fulltune.data.tokenizers import TokenizerConfig
from fulltune.recipes import corpus, finetune, pretrain
from fulltune.recipes.prepare import task_sources

Made: TypeAlias = Literal["corpus", "tokenizer", "model"]


class TokenizerStep(TokenizerConfig):
    """Train a tokenizer: the options of `fulltune tokenizer train`."""

    train: str | tuple[str, ...]
    """Text: a file, a folder, `asset:NAME`, or a list of them."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The column that holds the text, if it has another name: `{text: article}`."""
    output: str
    """Folder of the tokenizer; made new."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The text in order."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def config(self) -> TokenizerConfig:
        """What the tokenizer is to be."""
        return build_config(TokenizerConfig, self.model_dump(include=_OF_TOKENIZERS))


_OF_TOKENIZERS = set(TokenizerConfig.model_fields)


class EvaluateStep(Settings):
    """Measure a model."""

    model: str
    """A run folder, or any model."""
    data: str | None = None
    """Labelled rows or text; null is the validation split of the run."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field name -> the column's name in `data`, where it is not as in training."""


@dataclass(frozen=True)
class StepSource:
    """What a step starts from."""

    setting: str
    value: str
    wanted: Made
    may_be_new: bool = False
    """Whether the size of a new model may stand for a model."""


@dataclass(frozen=True)
class StepKind:
    """A kind of step."""

    settings: type[Settings]
    summary: str
    sources: Callable[[Any], list[StepSource]]
    makes: Made | None = None
    folder: str | None = None
    """The setting that names the folder it makes."""
    has_verb: bool = False
    """Whether `fulltune settings` lists its settings under its name."""


def _sources_of_corpus(step: corpus.Config) -> list[StepSource]:
    return [
        *(StepSource("sources", source, "corpus") for source in step.source_list),
        *(
            StepSource("decontaminate.against", source, "corpus")
            for source in step.decontaminate.against
        ),
    ]


def _sources_of_tokenizer(step: TokenizerStep) -> list[StepSource]:
    return [StepSource("train", source, "corpus") for source in step.sources]


def _sources_of_run(step: finetune.Config) -> list[StepSource]:
    sources = [StepSource(name, source, "corpus") for name, source in task_sources(step.task)]
    if isinstance(step.evaluate.retention, str):
        sources.append(StepSource("evaluate.retention", step.evaluate.retention, "corpus"))
    if isinstance(step, pretrain.Config) and step.tokenizer is not None:
        sources.append(StepSource("tokenizer", step.tokenizer, "tokenizer"))
    may_be_new = isinstance(step, pretrain.Config)
    return [StepSource("model", step.model, "model", may_be_new), *sources]


def _sources_of_evaluation(step: EvaluateStep) -> list[StepSource]:
    data = [] if step.data is None else [StepSource("data", step.data, "corpus")]
    return [StepSource("model", step.model, "model"), *data]


KINDS: dict[str, StepKind] = {
    "corpus": StepKind(
        corpus.Config,
        "Clean, filter, deduplicate and split raw text. Later steps read `OUTPUT/train` and "
        "`OUTPUT/validation`.",
        _sources_of_corpus,
        makes="corpus",
        folder="output",
        has_verb=True,
    ),
    "tokenizer": StepKind(
        TokenizerStep,
        "Train a tokenizer. Later steps name its `output` as their `tokenizer`.",
        _sources_of_tokenizer,
        makes="tokenizer",
        folder="output",
    ),
    "pretrain": StepKind(
        pretrain.Config,
        "Train a new model on raw text, or go on with one. Later steps name its `run_dir` as "
        "their `model`.",
        _sources_of_run,
        makes="model",
        folder="run_dir",
        has_verb=True,
    ),
    "finetune": StepKind(
        finetune.Config,
        "Fine-tune a model on a task. Later steps name its `run_dir` as their `model`.",
        _sources_of_run,
        makes="model",
        folder="run_dir",
        has_verb=True,
    ),
    "evaluate": StepKind(EvaluateStep, "Measure a model.", _sources_of_evaluation),
}


def kind_of(step: Settings) -> str:
    """The name under which `KINDS` has the settings of a step."""
    return next(name for name, kind in KINDS.items() if type(step) is kind.settings)


def list_step_settings() -> Iterator[SettingRow]:
    """What a chain file may hold: the kinds of step, and the settings that no other verb lists."""
    yield SettingRow(
        "steps",
        " | ".join(KINDS),
        "required",
        "The steps in their order. Each is a kind with its settings, as `- tokenizer: {train: "
        "my.txt, family: gpt, output: runs/tokenizer}`, and names the folder of an earlier one "
        "where it needs it. All are checked before the first is taken.",
    )
    for name, kind in KINDS.items():
        if kind.has_verb:
            yield SettingRow(
                name, f"the settings of `fulltune settings {name}`", "a step", kind.summary
            )
            continue
        yield SettingRow(name, "the settings below", "a step", kind.summary)
        for row in list_settings(kind.settings):
            yield replace(row, key=f"{name}.{row.key}")
