"""From settings to checked, encoded data: what `preview` shows and what training trains on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from fulltune.data.arranged import JoinedExamples
from fulltune.data.chat import end_of_turn_ids
from fulltune.data.encoded_dataset import EncodedDataset, encode_dataset
from fulltune.data.formats import ROWS_LOOKED_AT, make_example, recognise_format
from fulltune.data.joined import JoinedDataset
from fulltune.data.preview import examine
from fulltune.data.preview_checks import check
from fulltune.data.preview_facts import Finding, PreviewFacts
from fulltune.data.records import check_source, read_records, source_fingerprint
from fulltune.data.splits import Source, Split, Splittable, parse_validation, split_dataset
from fulltune.data.tasks import (
    SETTINGS_OF_SOME,
    TASKS,
    ChatExample,
    Example,
    PreferenceExample,
    TaskConfig,
)
from fulltune.data.unknown_tokens import unknown_token_id
from fulltune.errors import ConfigError, DataError
from fulltune.evaluate.tagging_metrics import require_seqeval
from fulltune.models.chat_template import CHAT_TEMPLATES, set_chat_template
from fulltune.models.loading import context_length, load_model_config, load_tokenizer
from fulltune.models.sources import resolve_model
from fulltune.models.vocabulary import add_markers
from fulltune.objectives.base import Objective
from fulltune.objectives.multi_label import MultiLabel
from fulltune.objectives.of_task import OF_TASK, ObjectiveSettings, make_task_objective
from fulltune.runtime import cache_dir, num_cores

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

IntArray = npt.NDArray[np.int64]
UNLIMITED = 2**31


@dataclass(frozen=True)
class Base:
    """The model to start from, before its weights are loaded."""

    path: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    source: Path | None = None
    """The model that ``path`` was converted from, where it was."""
    new_tokens: dict[int, list[int]] = field(default_factory=dict)
    """Tokens that the chat template needs and the model lacks: their ids -> the ids of the pieces
    that stood for them, as whose mean their embeddings begin."""


@dataclass(frozen=True)
class Prepared:
    """Encoded data, its splits, and what was found when it was counted."""

    objective: Objective
    dataset: JoinedDataset | JoinedExamples
    train: IntArray
    validation: IntArray
    facts: PreviewFacts
    findings: list[Finding]
    notes: tuple[str, ...]
    """What the user must know: how rows were read and split."""
    sources: list[dict[str, Any]]
    """For the manifest: source, content hash, rows."""
    info: dict[str, Any] = field(default_factory=dict)
    """What whoever uses the model must know of the data, for `fulltune.json`."""


@dataclass(frozen=True)
class EncodedTask:
    """The rows of a task as tokens, before any is set aside."""

    train: EncodedDataset
    validation: EncodedDataset | None
    """Where validation has a source of its own."""
    joined: JoinedDataset
    """Both end to end."""
    notes: tuple[str, ...]
    sources: list[dict[str, Any]]
    """The same two as in `Prepared`."""


def open_base(model: str, task: TaskConfig) -> Base:
    """Find the model and load its configuration and tokenizer, not its weights.

    Raises:
        ModelError: the folder is incomplete, or the model cannot do the task.
        AssetError: it could not be fetched.
    """
    check_task(task)
    path = resolve_model(model)
    return with_template(Base(path, load_model_config(path), load_tokenizer(path)), task)


def with_template(base: Base, task: TaskConfig) -> Base:
    """A model whose tokenizer is given the chat template of the task, in place, if it names one.

    Raises:
        ConfigError: no such template, or it cannot be rendered.
    """
    if task.template is None:
        return base
    set_chat_template(base.tokenizer, task.template)
    built_in = task.template in CHAT_TEMPLATES
    return replace(base, new_tokens=add_markers(base.tokenizer) if built_in else {})


def check_task(task: TaskConfig) -> None:
    """What is wrong without a look at the model or into the data, as it is quick to find.

    Raises:
        ConfigError: a setting has no effect, or says nothing.
        DataError: a source is not there.
    """
    check_task_settings(task)
    for _, source in task_sources(task):
        check_source(source)


def task_sources(task: TaskConfig) -> list[tuple[str, str]]:
    """The data that a task names, each source with the setting that names it."""
    names = (task.train,) if isinstance(task.train, str) else task.train
    sources = [("task.train", name) for name in names]
    wanted = parse_validation(task.validation) if task.validation is not None else None
    if isinstance(wanted, Source):
        sources.append(("task.validation", wanted.source))
    return sources


def check_task_settings(task: TaskConfig) -> None:
    """`check_task` without a look for the data, which may be still to be made.

    Raises:
        ConfigError: a setting has no effect, or says nothing.
    """
    for name in SETTINGS_OF_SOME:
        default = TaskConfig.model_fields[name].default
        if getattr(task, name) != default and name not in TASKS[task.kind].settings:
            why = ", whose documents are cut into windows" if name == "too_long" else ""
            raise ConfigError(
                f"`task.{name}` has no effect with `task.kind: {task.kind}`{why}",
                hint="leave it out",
            )
    if task.kind == "token_classification":
        require_seqeval()
    if task.labels is not None and len(set(task.labels)) != max(2, len(task.labels)):
        raise ConfigError(
            f"`task.labels` cannot be `[{', '.join(task.labels)}]`: "
            "it needs two or more, all different",
            hint="leave it out to take the labels of the training data",
        )
    if task.validation is not None:
        parse_validation(task.validation)


def make_objective(
    base: Base, task: TaskConfig, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Objective:
    """The objective of a task on a model; a classifier's labels are filled in once they are known.

    Raises:
        ConfigError: `max_length` is longer than the model's context.
        ModelError: the family cannot do the task.
    """
    context = context_length(base.config)
    if task.max_length is not None and task.max_length > context:
        raise ConfigError(
            f"`task.max_length` is {task.max_length:,}, but the model's context is {context:,} "
            "tokens",
            hint=f"give at most {context}, or null for all of it",
        )
    if task.max_target_length is not None and task.max_target_length >= context:
        raise ConfigError(
            f"`task.max_target_length` is {task.max_target_length:,}, but the model's context is "
            f"{context:,} tokens",
            hint="give less, or null for what the source leaves",
        )
    settings = ObjectiveSettings(
        base.tokenizer,
        base.config,
        task.max_length or context,
        labels=tuple(task.labels or ()),
        too_long=task.too_long,
        loss=task.loss,
        beta=task.dpo_beta,
        special_tokens=task.special_tokens,
        max_target_length=task.max_target_length,
        prefix=task.prefix,
        prompt=task.prompt,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        of_kind={name: getattr(task, name) for name in TASKS[task.kind].settings},
    )
    return make_task_objective(task.kind, settings)


def prepare(
    objective: Objective,
    task: TaskConfig,
    *,
    seed: int,
    num_workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Prepared:
    """Read, encode, split and count the data of a task.

    Raises:
        DataError: a row cannot be used. Findings of the checks are returned, not raised.
    """
    # One row that does not fit is an error, but first all of them are counted.
    may_truncate = task.too_long != "error"
    encoder = objective if may_truncate else replace(cast(Any, objective), too_long="truncate")
    encoded = encode_task(task, encoder, num_workers=num_workers, progress=progress)
    dataset = encoded.joined
    split = split_task(encoded, encoded.train, task, seed=seed)
    train = split.train
    notes = [*encoded.notes, *([split.note] if split.note else [])]
    if TASKS[task.kind].supervision == "labels":
        objective = _with_labels(objective, dataset, train, OF_TASK[task.kind].classes)
        if isinstance(objective, MultiLabel):
            objective = _with_label_shares(objective, dataset, train)
        if task.class_weights is not None:
            objective = _with_class_weights(objective, task.class_weights, dataset, train)
    ends = end_of_turn_ids(objective.tokenizer) if TASKS[task.kind].answers else set()
    facts = examine(
        dataset,
        sides(split, task),
        end_token_ids=ends,
        unknown_token_id=unknown_token_id(objective.tokenizer),
    )
    if task.kind == "text":
        has_end = objective.tokenizer.eos_token_id is not None
        facts = facts.model_copy(update={"documents_end": has_end})
    findings = check(facts, may_truncate=may_truncate)
    return Prepared(
        objective, dataset, train, split.validation, facts, findings, tuple(notes), encoded.sources,
        {"words_at_spaces": _words_at_spaces(task)} if facts.tags else {},
    )  # fmt: skip


def _words_at_spaces(task: TaskConfig) -> bool:
    _, source = task_sources(task)[0]
    first = list(read_records(source, limit=ROWS_LOOKED_AT))
    return recognise_format(first, task).words_at_spaces


def encode_task(
    task: TaskConfig,
    objective: Objective,
    *,
    num_workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> EncodedTask:
    """Read and encode all sources of a task, or open what an earlier run encoded.

    Raises:
        DataError: a row cannot be used.
    """

    def encode(sources: Sequence[str]) -> EncodedDataset:
        return encode_dataset(
            sources,
            task,
            objective.encode,
            encode_fingerprint=objective.fingerprint,
            num_workers=num_cores() if num_workers is None else num_workers,
            cache_dir=cache_dir() / "encoded",
            progress=progress,
        )

    names = (task.train,) if isinstance(task.train, str) else tuple(task.train)
    wanted = parse_validation(task.validation) if task.validation is not None else None
    train, validation = encode(names), None
    rows = train.num_records if len(names) == 1 else None
    sources = [_describe_source(name, rows) for name in names]
    if isinstance(wanted, Source):
        validation = encode([wanted.source])
        sources.append(_describe_source(wanted.source, validation.num_records))
    joined = JoinedDataset([train] if validation is None else [train, validation])
    notes = [f"rows read as {train.format}", *_notes_on_rows(joined, task)]
    if task.kind == "question_answering" and len(joined) > joined.num_records:
        notes.append(
            f"{joined.num_records:,} questions in {len(joined):,} windows of at most "
            f"{objective.max_length:,} tokens, of which examples are counted"
        )
    return EncodedTask(train, validation, joined, tuple(notes), sources)


def split_task(
    encoded: EncodedTask, documents: Splittable, task: TaskConfig, *, seed: int
) -> Split:
    """The examples of both sides, numbered as in `EncodedTask.joined`.

    Args:
        encoded: what was read.
        documents: its training data, or another view of it, whose numbers are then meant.
        task: says what is set aside.
        seed: another seed gives another split.

    Raises:
        ConfigError: one side would be empty.
    """
    split = split_dataset(documents, task.validation, seed=seed)
    if encoded.validation is None:
        return split
    first = len(encoded.train)
    return split._replace(validation=np.arange(first, len(encoded.joined), dtype=np.int64))


def sides(split: Split, task: TaskConfig) -> dict[str, IntArray]:
    """The sides of a split by name, as `examine` takes them."""
    if task.validation is None:
        return {"train": split.train}
    return {"train": split.train, "validation": split.validation}


def _notes_on_rows(dataset: JoinedDataset, task: TaskConfig) -> list[str]:
    """What the user must know of rows that are not in the data set."""
    reason = "longer than `task.max_length`" if task.too_long == "drop" else "without any token"
    if task.too_long == "drop" and task.max_target_length is not None:
        reason += " or `task.max_target_length`"
    notes = [
        f"{side}{part.num_left_out:,} of {part.num_records:,} rows left out: {reason}"
        for side, part in zip(("", "validation: "), dataset.parts, strict=False)
        if part.num_left_out
    ]
    if dataset.num_duplicates_dropped:
        notes.append(f"{dataset.num_duplicates_dropped:,} exact duplicates dropped")
    return notes


def _with_labels(
    objective: Objective,
    dataset: JoinedDataset,
    train: IntArray,
    classes: Callable[[Iterable[str]], tuple[str, ...]],
) -> Objective:
    """An objective that knows its labels: those that are given, or else those of training.

    Args:
        objective: with an empty `labels` where none are given.
        dataset: the examples.
        train: those that are trained.
        classes: the labels of training -> those of the model.

    Raises:
        DataError: labels are given, and the data has another one.
    """
    given: tuple[str, ...] = cast(Any, objective).labels
    offsets = dataset.label_offsets
    if not given:
        chosen = np.zeros(len(dataset), dtype=bool)
        chosen[train] = True
        present = np.unique(dataset.label_codes[np.repeat(chosen, np.diff(offsets))])
        names = classes(dataset.label_names[code] for code in present)
        return cast(Objective, replace(cast(Any, objective), labels=names))
    unknown = [code for code, name in enumerate(dataset.label_names) if name not in given]
    places = np.flatnonzero(np.isin(dataset.label_codes, unknown))
    if len(places):
        row = int(np.searchsorted(offsets, places[0], side="right")) - 1
        name = dataset.label_names[int(dataset.label_codes[places[0]])]
        raise DataError(
            f"{dataset.where(row)}: label `{name}` is not one of the labels "
            + ", ".join(f"`{label}`" for label in given),
            hint="correct the label, or name it in `task.labels`",
        )
    return objective


def _with_label_shares(
    objective: MultiLabel, dataset: JoinedDataset, train: IntArray
) -> MultiLabel:
    chosen = np.zeros(len(dataset), dtype=bool)
    chosen[train] = True
    codes = dataset.label_codes[np.repeat(chosen, np.diff(dataset.label_offsets))]
    counts = np.bincount(codes, minlength=len(dataset.label_names))
    count_of = dict(zip(dataset.label_names, counts.tolist(), strict=True))
    shares = tuple(count_of.get(name, 0) / len(train) for name in objective.labels)
    return replace(objective, label_shares=shares)


def _with_class_weights(
    objective: Objective,
    weights: Mapping[str, float] | Literal["balanced"],
    dataset: JoinedDataset,
    train: IntArray,
) -> Objective:
    """An objective that knows what an example of each class counts for.

    Balanced weights are n / (C n_c), as in scikit-learn: their mean over the training data is 1.

    Raises:
        ConfigError: weights are given, and not for exactly the labels.
    """
    labels: tuple[str, ...] = cast(Any, objective).labels
    if weights == "balanced":
        codes = dataset.labels[train]
        counts = [
            int((codes == dataset.label_names.index(name)).sum())
            if name in dataset.label_names
            else 0
            for name in labels
        ]
        chosen = [len(codes) / (len(labels) * count) if count else 1.0 for count in counts]
    else:
        if set(weights) != set(labels):
            raise ConfigError(
                f"`task.class_weights` is for {', '.join(f'`{name}`' for name in weights)}, and "
                f"the labels are {', '.join(f'`{name}`' for name in labels)}",
                hint="give one weight for each label, or `balanced`",
            )
        chosen = [weights[name] for name in labels]
    return cast(Objective, replace(cast(Any, objective), class_weights=tuple(chosen)))


def find_examples(
    task: TaskConfig, wheres: Collection[str], *, include_validation: bool = True
) -> dict[str, Example]:
    """Read the rows at some places again, as examples before tokens.

    A source that none of them lies in is not opened, and reading ends with the last of them.
    """
    wanted = set(wheres)
    sources = [task.train] if isinstance(task.train, str) else list(task.train)
    if include_validation and task.validation is not None:
        validation = parse_validation(task.validation)
        if isinstance(validation, Source):
            sources.append(validation.source)
    found: dict[str, Example] = {}
    for source in sources:
        # The name of each of its files begins with the name of the source.
        inside = {where for where in wanted - found.keys() if where.startswith(source.rstrip("/"))}
        if not inside:
            continue
        record_format = recognise_format(list(read_records(source, limit=ROWS_LOOKED_AT)), task)
        for record in read_records(source):
            if record.where in inside:
                found[record.where] = make_example(record, record_format, kind=task.kind)
                inside.remove(record.where)
                if not inside:
                    break
    return found


def first_examples(
    task: TaskConfig,
    dataset: JoinedDataset | JoinedExamples,
    indices: Sequence[int] | IntArray,
    *,
    num_samples: int,
) -> list[Example]:
    """The examples to sample answers from: a few more than asked for, as some do not fit."""
    wheres = [dataset.where(int(index)) for index in indices[: 4 * num_samples]]
    examples = find_examples(task, wheres)
    found = [examples[where] for where in dict.fromkeys(wheres) if where in examples]
    return [
        ChatExample(example.chosen, example.where)
        if isinstance(example, PreferenceExample)
        else example
        for example in found
    ]


def _describe_source(source: str, rows: int | None) -> dict[str, Any]:
    """Of several sources only the sum of their rows is known, which belongs to none of them."""
    return {"source": source, "fingerprint": source_fingerprint(source), "rows": rows}
