"""Everything about a chain that can be wrong is found before its first step.

A step names folders that are still to be made, so that it cannot be tried. What is known of them is
enough: which step makes a folder and what will lie in it, the special tokens of a tokenizer before
it is trained, and the shape of a model before it has weights.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fulltune.config import Settings
from fulltune.data.chat import require_template
from fulltune.data.records import ASSET_PREFIX, check_source
from fulltune.data.tokenizers import INFO_FILE, check_output, check_vocabulary_size, stand_in
from fulltune.errors import ConfigError, FulltuneError, ModelError, near_names
from fulltune.models.presets import is_new_model
from fulltune.models.sources import check_model_source, is_hub_name
from fulltune.recipes import corpus, finetune, pretrain
from fulltune.recipes.chain_settings import in_settings
from fulltune.recipes.chain_steps import (
    KINDS,
    EvaluateStep,
    Made,
    StepSource,
    TokenizerStep,
    kind_of,
)
from fulltune.recipes.prepare import Base, check_task_settings, make_objective, with_template
from fulltune.runtime import choose_device
from fulltune.train.run_folder import MODEL, MODEL_LAST, check_run_folder, has_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS: dict[Made, str] = {"corpus": "a corpus", "tokenizer": "a tokenizer", "model": "a model"}
TAKEN: dict[Made, tuple[Made, ...]] = {
    "corpus": ("corpus",),
    "tokenizer": ("tokenizer", "model"),
    "model": ("model",),
}
"""What is wanted -> what may be given: a model has a tokenizer."""


@dataclass(frozen=True)
class Folder:
    """A folder that a step of the chain makes."""

    number: int
    """Of the step, from 1."""
    verb: str
    made: Made
    setting: str
    named: str
    """As the file writes it."""
    path: Path
    step: Settings

    def __str__(self) -> str:
        return f"step {self.number} ({self.verb})"


@contextmanager
def naming(number: int, verb: str) -> Generator[None]:
    """Errors say in which step they are, and name its settings where a verb has options."""
    has_task = "task" in KINDS[verb].settings.model_fields
    try:
        with placed(f"step {number}, {verb}"):
            yield
    except FulltuneError as error:
        error.args = (in_settings(str(error), has_task=has_task),)
        error.hint = error.hint and in_settings(error.hint, has_task=has_task)
        raise


@contextmanager
def placed(where: str) -> Generator[None]:
    """Errors begin with where they are."""
    try:
        yield
    except FulltuneError as error:
        # The same error: it may know more than its message, such as the rows of a loss.
        error.args = (f"{where}: {error}",)
        raise


def check(steps: Sequence[Settings], *, resume: bool) -> None:
    """Refuse a chain of which a step could not be taken, as far as that can be known.

    Args:
        steps: the settings of each, of the classes in `KINDS`.
        resume: whether folders of finished steps may be there.

    Raises:
        FulltuneError: the number and kind of the step, and what is wrong with it.
    """
    folders = _folders(steps)
    models: dict[int, Base] = {}
    for number, step in enumerate(steps, start=1):
        verb = kind_of(step)
        with naming(number, verb):
            _check_settings(step)
            for source in () if _is_finished_corpus(step, resume) else KINDS[verb].sources(step):
                _check_source(source, number, folders)
            model = _check_model(step, folders, models)
            if model is not None:
                models[number] = model
            if isinstance(step, EvaluateStep):
                _check_held_out(step, folders)
            _check_output(step, resume=resume)


def _is_finished_corpus(step: Settings, resume: bool) -> bool:
    """Its raw text may be gone; where it is not, it is compared when the step is passed over."""
    if not (resume and isinstance(step, corpus.Config)):
        return False
    return (Path(step.output) / corpus.MANIFEST).exists()


# -- folders ---------------------------------------------------------------------------------------


def _folders(steps: Sequence[Settings]) -> list[Folder]:
    folders: list[Folder] = []
    for number, step in enumerate(steps, start=1):
        verb = kind_of(step)
        kind = KINDS[verb]
        if kind.folder is None or kind.makes is None:
            continue
        named = getattr(step, kind.folder)
        new = Folder(number, verb, kind.makes, kind.folder, named, _absolute(named), step)
        with naming(number, verb):
            for other in folders:
                _check_apart(new, other)
        folders.append(new)
    return folders


def _check_apart(new: Folder, other: Folder) -> None:
    if new.path == other.path:
        what = f"which is the folder of {other} already"
    elif other.path in new.path.parents:
        what = f"which lies in the folder of {other}, `{other.named}`"
    elif new.path in other.path.parents:
        what = f"in which the folder of {other} lies, `{other.named}`"
    else:
        return
    raise ConfigError(
        f"`{new.setting}` is `{new.named}`, {what}", hint=f"give `{new.setting}` another name"
    )


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(path))


def _maker(source: str, folders: Sequence[Folder]) -> Folder | None:
    """The step in whose folder a source lies."""
    path = _absolute(os.path.expanduser(source))
    return next((folder for folder in folders if folder.path in (path, *path.parents)), None)


def _check_output(step: Settings, *, resume: bool) -> None:
    """That the folder is free, or holds what is to be gone on with."""
    try:
        _look_into_output(step, resume=resume)
    except FulltuneError as error:
        if not resume:
            with suppress(FulltuneError):
                _look_into_output(step, resume=True)
                error.hint = "pass over finished steps by `--resume`, or give other folders"
        raise


def _look_into_output(step: Settings, *, resume: bool) -> None:
    if isinstance(step, TokenizerStep):
        if not (resume and (Path(step.output) / INFO_FILE).is_file()):
            check_output(Path(step.output))
    elif isinstance(step, corpus.Config):
        corpus.check_folder(Path(step.output), step, resume=resume)
    elif isinstance(step, finetune.Config):
        folder = Path(step.run_dir)
        check_run_folder(folder, step, resume=resume and has_run(folder))


# -- what a step starts from -----------------------------------------------------------------------


def _check_source(source: StepSource, number: int, folders: Sequence[Folder]) -> None:
    maker = _maker(source.value, folders)
    if maker is None:
        _check_there(source, [folder for folder in folders if folder.number < number])
        return
    said = f"`{source.setting}` is `{source.value}`"
    if maker.number >= number:
        itself = "which this step is to make" if maker.number == number else f"which {maker} makes"
        raise ConfigError(
            f"{said}, {itself}{'' if maker.number == number else ' only afterwards'}",
            hint="name the folder of an earlier step, or something that is there",
        )
    if maker.made not in TAKEN[source.wanted]:
        wanted = "data" if source.wanted == "corpus" else WORDS[source.wanted]
        raise ConfigError(
            f"{said}, which {maker} makes, and which is {WORDS[maker.made]}, not {wanted}",
            hint=_possible(source.wanted, [each for each in folders if each.number < number]),
        )
    _check_place(source, maker)


def _possible(wanted: Made, earlier: Sequence[Folder]) -> str:
    places = [
        f"`{folder.named}/train`" if folder.made == "corpus" else f"`{folder.named}`"
        for folder in earlier
        if folder.made in TAKEN[wanted]
    ]
    if places:
        return f"earlier steps make {', '.join(places)}"
    return "no earlier step makes one: add such a step, or name something that is there"


def _check_place(source: StepSource, maker: Folder) -> None:
    """That a source is a part of a folder that will be there."""
    inside = _absolute(os.path.expanduser(source.value)).relative_to(maker.path).parts
    said = f"`{source.setting}` is `{source.value}`"
    if isinstance(maker.step, corpus.Config):
        splits = ["train", *(["validation"] if maker.step.validation is not None else [])]
        name = " or ".join(f"`{maker.named}/{split}`" for split in splits)
        if not inside:
            raise ConfigError(
                f"{said}, and the corpus of {maker} holds training and validation apart",
                hint=f"name {name}",
            )
        if inside[0] not in splits:
            raise ConfigError(
                f"{said}, and the corpus of {maker} has no `{inside[0]}`", hint=f"name {name}"
            )
    elif inside and not (maker.made == "model" and inside in ((MODEL,), (MODEL_LAST,))):
        raise ConfigError(
            f"{said}, which is no part of what {maker} makes", hint=f"name `{maker.named}`"
        )


def _check_there(source: StepSource, earlier: Sequence[Folder]) -> None:
    """That a source which no step makes is there, or could be fetched."""
    try:
        with placed(f"`{source.setting}`"):
            _look_for(source, earlier)
    except FulltuneError as error:
        names = {folder.named: folder for folder in earlier if folder.made in TAKEN[source.wanted]}
        near = near_names(source.value, names)
        if near:
            error.hint = f"did you mean `{near[0]}`, which {names[near[0]]} makes?"
        raise


def _look_for(source: StepSource, earlier: Sequence[Folder]) -> None:
    value = source.value
    if source.wanted == "corpus":
        check_source(value)
    elif source.wanted == "tokenizer" and not value.startswith(ASSET_PREFIX):
        pretrain.tokenizer_folder(value)
    elif is_new_model(value) and source.may_be_new:
        pass  # the check of the model looks for it
    else:
        # A folder of that name is a trained model.
        if is_new_model(value) and not Path(value).is_dir():
            raise ConfigError(
                f"`{value}` is a new model, which has no trained weights to start from",
                hint=_possible("model", earlier),
            )
        _refuse_missing_path(value, earlier)
        check_model_source(value)


def _refuse_missing_path(value: str, earlier: Sequence[Folder]) -> None:
    """`runs/mine` could be a name of the hub too, but not where `runs` is a folder of ours."""
    if Path(value).exists() or not is_hub_name(value) or "/" not in value:
        return
    first = Path(value).parts[0]
    ours = {Path(folder.named).parts[0] for folder in earlier}
    if Path(first).is_dir() or first in ours:
        raise ModelError(
            f"`{value}` does not exist, and no earlier step makes it",
            hint=_possible("model", earlier),
        )


# -- what a step does ------------------------------------------------------------------------------


def _check_settings(step: Settings) -> None:
    if isinstance(step, TokenizerStep):
        if not step.sources:
            raise ConfigError("`train` names no text", hint="name a file or a folder")
        check_vocabulary_size(step.config)
    elif isinstance(step, corpus.Config):
        corpus.check_settings(step)
    elif isinstance(step, finetune.Config):
        start = finetune.FINETUNE
        if isinstance(step, pretrain.Config):
            pretrain.check_settings(step)
            start = pretrain.start()
        check_task_settings(step.task)
        finetune.check_settings(step, start)
        choose_device(step.device)
    elif isinstance(step, EvaluateStep) and step.columns and step.data is None:
        raise ConfigError(
            "`columns` has no effect on the validation split of a run, which is read as the run "
            "read it",
            hint="leave it out, or name other `data`",
        )


def _check_model(step: Settings, folders: Sequence[Folder], models: dict[int, Base]) -> Base | None:
    """What a step makes of its model, where that follows from the chain alone.

    A model that is there already is opened when its step begins.
    """
    if not isinstance(step, finetune.Config):
        return None
    if isinstance(step, pretrain.Config) and is_new_model(step.model):
        tokenizer = None
        if step.tokenizer is not None and (maker := _maker(step.tokenizer, folders)) is not None:
            if isinstance(maker.step, TokenizerStep):
                tokenizer = _stand_in(maker.step)
            elif maker.number in models:
                tokenizer = models[maker.number].tokenizer
            else:
                return None
        return pretrain.open_start(step, with_weights=False, tokenizer=tokenizer)[0]
    if isinstance(step, pretrain.Config):
        pretrain.refuse_settings_of_new_models(step)
    maker = _maker(step.model, folders)
    base = models.get(maker.number) if maker is not None else None
    if base is None:
        return None
    if isinstance(step, pretrain.Config):
        if step.convert_to is not None:
            return None  # another family, which needs the weights
        pretrain.make_objective(base, step)
    else:
        base = with_template(replace(base, tokenizer=deepcopy(base.tokenizer)), step.task)
        if step.task.kind == "chat":
            require_template(base.tokenizer)
        make_objective(base, step.task, label_smoothing=step.label_smoothing, z_loss=step.z_loss)
    return base


def _stand_in(step: TokenizerStep) -> PreTrainedTokenizerBase:
    tokenizer = stand_in(step.config)
    tokenizer.name_or_path = step.output
    return tokenizer


def _check_held_out(step: EvaluateStep, folders: Sequence[Folder]) -> None:
    """That there is something to measure on."""
    maker = _maker(step.model, folders)
    if step.data is not None:
        return
    if maker is None:
        path = Path(step.model).expanduser()
        if not has_run(path) and not has_run(path.parent):
            raise ConfigError(
                f"`data` is not set, and `{step.model}` is no run, which would hold some out",
                hint="name the data as `data`",
            )
        return
    if isinstance(maker.step, finetune.Config) and maker.step.task.validation is None:
        raise ConfigError(
            f"`data` is not set, and {maker} holds nothing out", hint="name the data as `data`"
        )
