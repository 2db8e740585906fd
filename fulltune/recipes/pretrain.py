"""`fulltune pretrain`: a new model, or one to go on with, from raw text to a run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field, model_validator

from fulltune.config import Settings
from fulltune.data.arranged import JoinedExamples
from fulltune.data.encoded_dataset import EncodedDataset
from fulltune.data.preview import examine
from fulltune.data.preview_checks import check
from fulltune.data.sections import Sections
from fulltune.data.sentence_pairs import SentencePairsConfig
from fulltune.data.unknown_tokens import unknown_token_id
from fulltune.errors import AssetError, ConfigError, ModelError, near_names
from fulltune.models.families import Family, family_of
from fulltune.models.loading import (
    UNLIMITED_CONTEXT,
    Head,
    context_length,
    load_model_config,
    load_tokenizer,
)
from fulltune.models.presets import PRESETS, is_new_model, make_config, make_model
from fulltune.models.sources import resolve_model
from fulltune.models.warm_start import converted_xlnet
from fulltune.objectives.base import ArrangingObjective
from fulltune.objectives.causal_lm import CausalLM
from fulltune.objectives.causal_stream import CausalStream
from fulltune.objectives.masked_lm import MaskedLM, MaskingConfig
from fulltune.objectives.permutation_lm import PermutationLM
from fulltune.objectives.permutation_noise import PermutationConfig
from fulltune.objectives.sentence_order import SentenceOrder
from fulltune.objectives.span_corruption import SpanConfig, SpanCorruption
from fulltune.recipes import finetune
from fulltune.recipes.prepare import (
    Base,
    Prepared,
    check_task,
    check_task_settings,
    encode_task,
    open_base,
    sides,
    split_task,
)
from fulltune.recipes.prepare import prepare as prepare_windows
from fulltune.tracking import Display

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PretrainingObjective: TypeAlias = CausalLM | ArrangingObjective
"""`CausalLM` cuts a document when it encodes it, the others once the documents are split."""

Name = Literal["causal_lm", "masked_lm", "sentence_pairs", "permutation_lm", "span_corruption"]


class ObjectiveConfig(Settings):
    """What the model learns to predict; settings that its objective does not have are refused."""

    name: Name | None = None
    """The objective; null is the family's own."""
    length: Annotated[int, Field(ge=8)] | None = None
    """Tokens the model sees of one example; null is its context, at most 512."""
    stream: bool = False
    """`causal_lm`: join documents end to end, so that a window may hold several; otherwise each
    window holds one document, or a part of it, and windows are packed apart."""
    masking: MaskingConfig = MaskingConfig()
    pairs: SentencePairsConfig = SentencePairsConfig()
    permutation: PermutationConfig = PermutationConfig()
    spans: SpanConfig = SpanConfig()
    fim_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """`causal_lm` with `stream`: share of the documents, or of their parts in a window, that are
    written with `<fim_prefix>`, `<fim_suffix>` and `<fim_middle>`, their middle at the end; a new
    tokenizer has these by `--fill-in-the-middle`. Held-out text is left as it is."""

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self) -> ObjectiveConfig:
        if self.fim_rate and not self.stream:
            raise ValueError(
                "`objective.fim_rate` has no effect without `objective.stream: true`; set it"
            )
        return self


DEFAULT_LENGTH = 512
FEW_DOCUMENTS = 20
SECTION_TOKENS = 4096


WITHOUT_EFFECT = frozenset({"task.labels", "task.template", "task.too_long", "reinitialize_layers"})
"""Settings that pre-training has no use for; a run refuses them."""
ONLY_CHOICE = {"task.kind": "text", "task.format": "auto | text"}
"""What pre-training accepts of settings that accept more elsewhere."""


class Config(finetune.Config):
    """Settings of `fulltune pretrain`."""

    model: str
    """A size (`fulltune models` lists them), a config.json, or a model to go on with."""
    tokenizer: str | None = None
    """Folder of a tokenizer, a model or a run: for a new model, which has none of its own."""
    architecture: dict[str, Any] = Field(default_factory=dict)
    """Fields of a new model's config that differ, e.g. `{n_layer: 6}`."""
    convert_to: Literal["xlnet"] | None = None
    """`xlnet` makes an XLNet of the BERT that `model` names: it keeps the BERT's vocabulary and all
    weights that compute the same in both; positions and segments start anew."""
    objective: ObjectiveConfig = ObjectiveConfig()


@dataclass(frozen=True)
class Kind:
    """An objective: the head it needs, the families that can do it, and how it is made."""

    head: Head
    families: tuple[str, ...]
    build: Callable[[Base, Family, ObjectiveConfig, int], PretrainingObjective]
    settings: tuple[str, ...]
    """Settings of `ObjectiveConfig` that have an effect."""
    needs: str | None = None
    """The field of `Family` that a model without the head has empty."""
    metrics: tuple[str, ...] = ("target_accuracy",)
    """What is measured besides the loss and its perplexity."""


def _causal_lm(
    base: Base, family: Family, config: ObjectiveConfig, length: int
) -> CausalLM | CausalStream:
    model = CausalLM(base.tokenizer, length, packing=family.can_pack)
    return CausalStream(model, fim_rate=config.fim_rate) if config.stream else model


def _span_corruption(
    base: Base, family: Family, config: ObjectiveConfig, length: int
) -> SpanCorruption:
    return SpanCorruption(base.tokenizer, length, config.spans)


def _masked_lm(base: Base, family: Family, config: ObjectiveConfig, length: int) -> MaskedLM:
    return MaskedLM(base.tokenizer, length, config.masking, packing=family.can_pack)


def _sentence_order(
    base: Base, family: Family, config: ObjectiveConfig, length: int
) -> SentenceOrder:
    return SentenceOrder(
        base.tokenizer, length, config.masking, config.pairs, packing=family.can_pack
    )


def _permutation_lm(
    base: Base, family: Family, config: ObjectiveConfig, length: int
) -> PermutationLM:
    return PermutationLM(base.tokenizer, length, config.permutation)


OBJECTIVES: dict[str, Kind] = {
    "causal_lm": Kind("causal_lm", ("gpt",), _causal_lm, ("stream", "fim_rate"), metrics=()),
    "masked_lm": Kind(
        "masked_lm",
        ("bert",),
        _masked_lm,
        ("masking",),
        needs="predict_masked",
        metrics=("masked_accuracy",),
    ),
    "sentence_pairs": Kind(
        "sentence_order",
        ("bert",),
        _sentence_order,
        ("masking", "pairs"),
        needs="relate_sentences",
        metrics=("masked_accuracy", "sentence_accuracy"),
    ),
    "permutation_lm": Kind("permutation_lm", ("xlnet",), _permutation_lm, ("permutation",)),
    "span_corruption": Kind("sequence_to_sequence", ("t5",), _span_corruption, ("spans",)),
}


def run(config: Config, *, resume: bool = False, display: Display | None = None) -> finetune.Result:
    """Pre-train, or go on with, the run in ``config.run_dir``.

    Raises:
        FulltuneError: of the kind that says what is wrong; nothing of another run is touched.
    """
    check_settings(config)
    check_task(config.task)
    return finetune.run(config, resume=resume, display=display, start=start())


def start() -> finetune.Start:
    """How a run of pre-training opens its model and reads its data."""
    metrics = {name for kind in OBJECTIVES.values() for name in kind.metrics}
    return finetune.Start(open_start, prepare, tuple(sorted(metrics)))


def check_settings(config: Config) -> None:
    """What is wrong without a look at the model or for the data, as it is quick to find.

    Raises:
        ConfigError: the task is not of documents, or a setting has no effect.
    """
    if config.task.kind != "text":
        raise ConfigError(
            f"`task.kind` is `{config.task.kind}`, and pre-training reads documents",
            hint="write `task.kind: text`, or use `fulltune finetune`",
        )
    if config.task.max_length is not None:
        raise ConfigError(
            "`task.max_length` has no effect in pre-training, whose examples are made of documents",
            hint="set `objective.length` instead",
        )
    if config.reinitialize_layers:
        raise ConfigError(
            "`reinitialize_layers` has no effect in pre-training, whose new models are new in all "
            "layers and whose others go on as they are",
            hint="leave it out",
        )
    check_task_settings(config.task)


def open_start(
    config: Config,
    *,
    with_weights: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Base, PretrainingObjective]:
    """The model to start from, made where it is new, and what it learns.

    Args:
        config: of the run.
        with_weights: without them the path of a new model is that of its tokenizer.
        tokenizer: stands for that of a new model, where its folder is still to be made.

    Raises:
        ConfigError: the family cannot do the objective, or a setting has no effect with it.
        ModelError: there is no tokenizer for a new model.
    """
    if not is_new_model(config.model):
        base = _open_trained(config)
        if config.convert_to is not None:
            base = _converted(base, config.seed)
    else:
        if config.convert_to is not None:
            raise ConfigError(
                f"`convert_to` has no effect with the new model `{config.model}`",
                hint="name a trained BERT as `model`, or leave it out",
            )
        if config.tokenizer is None:
            raise ConfigError(
                f"`model: {config.model}` is new and has no tokenizer",
                hint="train one by `fulltune tokenizer train`, and name its folder as `tokenizer`",
            )
        if tokenizer is None:
            path = tokenizer_folder(config.tokenizer)
            tokenizer = load_tokenizer(path)
        else:
            path = Path(config.tokenizer)
        new = make_config(config.model, tokenizer, config.architecture)
        kind = _kind_for(config, family_of(new), new.model_type)
        if with_weights:
            path = make_model(new, tokenizer, head=kind.head, seed=config.seed)
        base = Base(path, new, tokenizer)
    return base, make_objective(base, config)


def make_objective(base: Base, config: Config) -> PretrainingObjective:
    """What a model learns by the settings.

    Raises:
        ConfigError: the family cannot do the objective, or a setting has no effect with it.
        ModelError: the tokenizer lacks what the objective needs.
    """
    chosen, family = config.objective, family_of(base.config)
    kind = _kind_for(config, family, base.config.model_type)
    context = context_length(base.config)
    length = chosen.length or min(context, DEFAULT_LENGTH)
    if length > context and context < UNLIMITED_CONTEXT:
        raise ConfigError(
            f"`objective.length` is {length:,}, but the model's context is {context:,} tokens",
            hint=f"give at most {context}",
        )
    objective = kind.build(base, family, chosen, length)
    if kind.head == "causal_lm" and is_new_model(config.model):
        _require_end_token(base.tokenizer)
    return _with_loss_settings(objective, config)


def _require_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Without it a new model would never learn where a text ends, and could not stop writing."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of `{tokenizer.name_or_path}` has no `eos_token`, so that a new model "
            "would not learn where a text ends",
            hint="use a tokenizer made for GPT (`--family gpt`), or name the token in "
            "tokenizer_config.json",
        )


def _open_trained(config: Config) -> Base:
    try:
        base = open_base(config.model, config.task)
    except (ModelError, AssetError) as error:
        if near := near_names(config.model, PRESETS):
            error.hint = f"did you mean the size `{near[0]}`? " + (error.hint or "")
        raise
    refuse_settings_of_new_models(config)
    return base


def refuse_settings_of_new_models(config: Config) -> None:
    """Refuse what has no effect with a trained model.

    Raises:
        ConfigError: it is set.
    """
    for name in ("tokenizer", "architecture"):
        if getattr(config, name):
            raise ConfigError(
                f"`{name}` has no effect with the trained model `{config.model}`",
                hint=f"leave it out, or start anew from a size: {', '.join(PRESETS)}",
            )


def _with_loss_settings(objective: PretrainingObjective, config: Config) -> PretrainingObjective:
    """Label smoothing and z-loss, which next tokens and the targets of a decoder have."""
    if isinstance(objective, CausalStream):
        model = replace(
            objective.language_model, label_smoothing=config.label_smoothing, z_loss=config.z_loss
        )
        return replace(objective, language_model=model)
    if isinstance(objective, CausalLM | SpanCorruption):
        return replace(objective, label_smoothing=config.label_smoothing, z_loss=config.z_loss)
    for name in ("label_smoothing", "z_loss"):
        if getattr(config, name):
            raise ConfigError(
                f"`{name}` has no effect here: only `objective.name: causal_lm` and "
                "`span_corruption` have it",
                hint="leave it out",
            )
    return objective


def objectives_of(family: Family) -> dict[str, Kind]:
    """The objectives that models of a family can do, its own first."""
    return {
        name: kind
        for name, kind in OBJECTIVES.items()
        if family.name in kind.families and (kind.needs is None or getattr(family, kind.needs))
    }


def _converted(bert: Base, seed: int) -> Base:
    path = converted_xlnet(bert.path, seed=seed)
    return Base(path, load_model_config(path), load_tokenizer(path), source=bert.path)


def _kind_for(config: Config, family: Family, model_type: str) -> Kind:
    chosen, metric = config.objective, config.evaluate.metric
    possible = objectives_of(family)
    name: str = chosen.name or next(iter(possible))
    if name not in possible:
        to_xlnet = model_type == "bert" and name == "permutation_lm"
        also = "; of a trained one, `convert_to: xlnet` makes an XLNet" if to_xlnet else ""
        raise ConfigError(
            f"a `{model_type}` model cannot do `objective.name: {name}`",
            hint=f"it can do {', '.join(f'`{each}`' for each in possible)}{also}",
        )
    kind = possible[name]
    others = {metric for other in OBJECTIVES.values() for metric in other.metrics}
    if metric in others - set(kind.metrics):
        measured = ("loss", "perplexity", *kind.metrics)
        raise ConfigError(
            f"`evaluate.metric` is `{metric}`, which `objective.name: {name}` does not measure",
            hint=f"it measures {', '.join(f'`{each}`' for each in measured)}",
        )
    for key, field in ObjectiveConfig.model_fields.items():
        unused = key not in ("name", "length", *kind.settings)
        if unused and getattr(chosen, key) != field.default:
            raise ConfigError(
                f"`objective.{key}` has no effect with `objective.name: {name}`",
                hint="leave it out",
            )
    return kind


def tokenizer_folder(source: str) -> Path:
    """The folder a tokenizer lies in, of a tokenizer, a model or a run."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path / "model" if (path / "model" / "tokenizer.json").is_file() else path
    if source.startswith("asset:"):
        return resolve_model(source)
    raise ModelError(
        f"`{source}` is no folder of a tokenizer",
        hint="train one by `fulltune tokenizer train`, or give a model's folder",
    )


def prepare(
    config: Config, objective: PretrainingObjective, progress: Callable[[int], None]
) -> Prepared:
    """Encode the documents, split them, and arrange each side into examples.

    Raises:
        DataError: a record cannot be read, or there is nothing to learn from.
    """
    task, seed, num_workers = config.task, config.seed, config.num_workers
    if isinstance(objective, CausalLM):
        return prepare_windows(
            objective, task, seed=seed, num_workers=num_workers, progress=progress
        )
    encoded = encode_task(task, objective, num_workers=num_workers, progress=progress)
    notes = list(encoded.notes)
    documents: EncodedDataset | Sections = encoded.train
    is_split = task.validation is not None and encoded.validation is None
    if is_split and len(documents) < FEW_DOCUMENTS:
        notes.append(
            f"{len(documents):,} documents are too few to set some aside whole: they are split in "
            f"sections of {SECTION_TOKENS:,} tokens"
        )
        documents = Sections(encoded.train, SECTION_TOKENS)
    split = split_task(encoded, documents, task, seed=seed)
    parts = [objective.arrange(documents, split.train, seed)]
    held_out = objective.held_out if isinstance(objective, CausalStream) else objective
    if encoded.validation is not None:
        everything = np.arange(len(encoded.validation))
        parts.append(held_out.arrange(encoded.validation, everything, seed))
    elif is_split:
        parts.append(held_out.arrange(documents, split.validation, seed))
    # Sections have no columns of their own to count: then all is counted as one.
    everything = np.arange(len(encoded.joined))
    counted = {"train": everything} if isinstance(documents, Sections) else sides(split, task)
    facts = examine(encoded.joined, counted, unknown_token_id=unknown_token_id(objective.tokenizer))
    dataset = JoinedExamples(parts)
    train = np.arange(len(parts[0]), dtype=np.int64)
    validation = np.arange(len(parts[0]), len(dataset), dtype=np.int64)
    notes.append(f"{len(train):,} examples of up to {int(dataset.lengths.max()):,} tokens")
    return Prepared(
        objective, dataset, train, validation, facts, check(facts, may_truncate=True),
        tuple(notes), encoded.sources,
    )  # fmt: skip
