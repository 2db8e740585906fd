"""Folders to models, configs and tokenizers, and back.

The folders are those that `sources.resolve_model` has checked: in plain Hugging Face layout.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    XLNetLMHeadModel,
)

from fulltune.assets.quiet import quiet_transformers
from fulltune.errors import ModelError, first_line
from fulltune.models import attention as _registered  # noqa: F401  (registers "fulltune")
from fulltune.models.families import Family, family_of, layer_of

Head = Literal[
    "causal_lm",
    "classification",
    "multi_label",
    "regression",
    "token_classification",
    "question_answering",
    "masked_lm",
    "sentence_order",
    "permutation_lm",
    "sequence_to_sequence",
]
"""What a model is loaded to predict."""

AUTO_CLASSES: dict[Head, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "multi_label": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "masked_lm": AutoModelForMaskedLM,
    "sentence_order": AutoModelForPreTraining,
    "permutation_lm": XLNetLMHeadModel,
    "sequence_to_sequence": AutoModelForSeq2SeqLM,
}
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
TASK_HEADS: dict[Head, str] = {
    "classification": "SequenceClassification",
    "multi_label": "SequenceClassification",
    "regression": "SequenceClassification",
    "token_classification": "TokenClassification",
    "question_answering": "QuestionAnswering",
}
"""Heads that a body is given anew where it has none, and how their architectures are named."""
LABELLED_HEADS: frozenset[Head] = frozenset(
    {"classification", "multi_label", "token_classification"}
)
PROBLEM_TYPES: dict[Head, ProblemType] = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""What transformers calls the losses of one and the same head."""
INFO_FILE = "fulltune.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt"),
)
UNLIMITED_CONTEXT = 1 << 20
"""Context of models without a longest length, such as XLNet; memory is their limit."""


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; one without a padding token pads with its end token.

    Raises:
        ModelError: the folder has no tokenizer that can be read.
    """
    needed = "the folder needs tokenizer.json and tokenizer_config.json"
    try:
        if not any((path / name).is_file() for name in TOKENIZER_FILES):
            raise ModelError(f"`{path}` has no tokenizer", hint=needed)
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        missing = " is missing" if isinstance(error, KeyError) else ""
        raise ModelError(
            f"`{path}` has no tokenizer that can be read: {first_line(error)}{missing}",
            hint=needed,
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer of `{path}` has neither a padding nor an end token",
                hint="name them in tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    # Where it was saved after a padded or cut batch, it would do the same to every text, unseen.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def load_model_config(path: Path) -> PretrainedConfig:
    """Load the config of a model folder.

    Raises:
        ModelError: it is not JSON, or of a model that this transformers does not know.
    """
    file = path / "config.json"
    try:
        model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"`{file}` cannot be read: {first_line(error)}", hint="copy or download it again"
        ) from error
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"`{file}` is of model type `{model_type}`, which transformers "
            f"{transformers.__version__} does not know",
            hint="is it a model of transformers' own? a newer one may need a newer transformers",
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"`{file}` cannot be used: {first_line(error)}",
            hint="is the installed transformers new enough for this model?",
        ) from error
    return config


def load_model(
    path: Path,
    *,
    head: Head,
    labels: Sequence[str] | None = None,
    dtype: torch.dtype,
    attention: str = "sdpa",
    dropout: float | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Load the model of a checked folder, with the head the task needs.

    Args:
        path: folder in plain Hugging Face layout.
        head: what the model predicts.
        labels: the classes in order. A head trained on just these is kept, else a new one is made;
            None keeps the folder's own.
        dtype: of all weights.
        attention: transformers' attention implementation. Models whose attention does not go
            through that interface use their own.
        dropout: sets every dropout of the model; None keeps the config's.
        seed: of a new head; the same seed gives the same head whatever was drawn before.

    Raises:
        ModelError: weights are missing, or the model cannot do the task or fit its tokenizer.
    """
    tokenizer = load_tokenizer(path)
    config = load_model_config(path)
    family = family_of(config)
    _check_vocabulary(config, tokenizer, path)
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if dropout is not None:
        _set_dropout(config, family, dropout)
    new_head = False
    if head in LABELLED_HEADS:
        new_head = _set_labels(config, family, labels, path, head)
    elif head == "regression":
        new_head = _set_regression(config, family)
    elif head in TASK_HEADS:
        new_head = not _has_head(config, head)
        config.num_labels = 2  # of a question's answer: where it begins, and where it ends
    elif head in ("masked_lm", "sentence_order"):
        new_head = True  # a body alone gets one; a head that is there is kept
    elif head == "causal_lm" and not family.can_generate:
        raise ModelError(
            f"`{path}` is an encoder (`{config.model_type}`) and cannot generate text",
            hint="use it with `task.kind: classification`, or choose a decoder",
        )

    auto = AUTO_CLASSES[head]
    require_head(config, head)
    chosen = attention if family.can_pack or attention == "eager" else None
    model, report = from_pretrained(
        auto,
        path,
        config=config,
        dtype=dtype,
        attn_implementation=chosen,
        ignore_mismatched_sizes=True,
        key_mapping=_body_names(config, head),
    )
    fresh = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    if new_head and head in TASK_HEADS:
        fresh |= _head_parameters(model)
    _check_missing(fresh, model, path, new_head)
    _initialize(model, fresh, seed)
    _check_generation_config(model, path)
    return model


def offers_head(model_type: str, head: Head) -> bool:
    """Whether transformers has a class for models of a type with a head."""
    mapping = getattr(AUTO_CLASSES[head], "_model_mapping", None)
    return mapping is None or model_type in mapping._model_mapping


def require_head(config: PretrainedConfig, head: Head) -> None:
    """See that transformers has a class for a model with a head.

    Raises:
        ModelError: it has none.
    """
    if not offers_head(config.model_type, head):
        raise ModelError(
            f"transformers has no model of type `{config.model_type}` with a head for "
            f"{head.replace('_', ' ')}",
            hint="choose another model; `fulltune models` says what each can do",
        )


def _body_names(config: PretrainedConfig, head: Head) -> dict[str, str] | None:
    """Renames the weights of a decoder's body for a class that calls its body otherwise.

    Llama's body is `model`, but `transformer` in its class for question answering.
    """
    decoders: Any = AutoModelForCausalLM._model_mapping
    if head not in TASK_HEADS or type(config) not in decoders:
        return None
    usual = decoders[type(config)].base_model_prefix
    here = AUTO_CLASSES[head]._model_mapping[type(config)].base_model_prefix
    return None if usual == here else {rf"^{usual}\.": f"{here}."}


def _head_parameters(model: PreTrainedModel) -> set[str]:
    """What a task's class puts behind the body."""
    names = [name for name, _ in model.named_parameters()]
    if model.base_model is model:  # T5's for question answering has no module for the body
        return {name for name in names if name.startswith("qa_outputs.")}
    return {name for name in names if not name.startswith(f"{model.base_model_prefix}.")}


def load_body(path: Path, *, attention: str) -> PreTrainedModel:
    """Load the layers of a checked folder without a head, in float32; of T5, the encoder.

    Args:
        path: folder in plain Hugging Face layout.
        attention: transformers' attention implementation.

    Raises:
        ModelError: weights are missing, or the model does not fit its tokenizer.
    """
    config = load_model_config(path)
    _check_vocabulary(config, load_tokenizer(path), path)
    auto: Any = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
    body, report = from_pretrained(
        auto, path, config=config, dtype=torch.float32, attn_implementation=attention
    )
    # A pooler counts as a head, and folders of language models do not hold one.
    _check_missing(report["missing_keys"], body, path, new_head=True)
    return body


def from_pretrained(
    auto: Any, path: Path, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Make a model of a checked folder's weights; torch's random state is put back afterwards.

    Args:
        auto: a model class of transformers, or one that chooses it by the config.
        path: folder in plain Hugging Face layout.
        options: of transformers' `from_pretrained`.

    Returns:
        The model, and what transformers says of weights that it did not find or could not use.

    Raises:
        ModelError: config and weights do not fit each other.
    """
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            model, report = auto.from_pretrained(
                path,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"`{path}` cannot be loaded: {first_line(error)}",
            hint="do config.json and the weights belong together?",
        ) from error
    return model, report


def context_length(config: PretrainedConfig) -> int:
    """The longest example in tokens that the model can read."""
    text_config = config.get_text_config()
    names = set(text_config.to_dict()) | set(text_config.attribute_map)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(text_config, name) if name in names else None
        if isinstance(length, int) and length > 0:
            reserved = family_of(config).positions_after_padding
            return length - (int(text_config.pad_token_id or 0) + 1 if reserved else 0)
    return UNLIMITED_CONTEXT


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    info: Mapping[str, Any],
) -> None:
    """Write a folder that transformers loads as it is, with `info` beside it as fulltune.json.

    Raises:
        ModelError: transformers did not write it, as on any rank but the first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"the model of `{directory}` is written by the first rank alone, and this is another",
            hint="let all machines share a cache: name its folder as `FULLTUNE_CACHE`",
        )
    for weights in directory.glob("*.safetensors"):
        shutil.copymode(directory / "config.json", weights)  # saved for the owner alone otherwise
    text = json.dumps(info, indent=2, ensure_ascii=False)
    (directory / INFO_FILE).write_text(text + "\n", encoding="utf-8")


def read_info(directory: Path) -> dict[str, Any]:
    """What `save_model` noted beside a model; empty for a model from elsewhere.

    Raises:
        ModelError: the note is not JSON.
    """
    path = directory / INFO_FILE
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"`{path}` is not JSON: {error}", hint="delete or restore it") from error
    if not isinstance(info, dict):
        raise ModelError(f"`{path}` must hold a JSON object", hint="delete or restore it")
    return info


def _check_vocabulary(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, path: Path
) -> None:
    largest = max(tokenizer.get_vocab().values(), default=-1)
    vocab_size = config.get_text_config().vocab_size
    if largest >= vocab_size:
        raise ModelError(
            f"the tokenizer of `{path}` has ids up to {largest}, "
            f"but the model has {vocab_size} embeddings",
            hint="tokenizer and model must come from the same folder",
        )


def _set_dropout(config: PretrainedConfig, family: Family, dropout: float) -> None:
    text_config = config.get_text_config()
    known = set(text_config.to_dict()) | set(text_config.attribute_map)
    # A field that is null follows another one.
    fields = [
        name
        for name in family.dropout_fields
        if name in known and isinstance(getattr(text_config, name), int | float)
    ]
    if not fields:
        raise ModelError(
            f"models of type `{config.model_type}` have no dropout to set", hint="leave it null"
        )
    for name in fields:
        setattr(text_config, name, dropout)


def _has_head(config: PretrainedConfig, head: Head) -> bool:
    """Whether the weights hold the head, trained on the same loss."""
    named = any(TASK_HEADS[head] in name for name in config.architectures or ())
    # A folder from elsewhere often does not say which; then it is the plain one.
    problem = config.problem_type or PROBLEM_TYPES["classification"]
    return named and problem == PROBLEM_TYPES.get(head, problem)


def _set_labels(
    config: PretrainedConfig,
    family: Family,
    labels: Sequence[str] | None,
    path: Path,
    head: Head,
) -> bool:
    """Prepare the config for its classes; true if the head has to be made anew."""
    for name, value in family.config_values.items():
        setattr(config, name, value)
    trained = _has_head(config, head)
    own = list((config.id2label or {}).values())
    if labels is None:
        if not trained:
            named = head.replace("_", " ")
            raise ModelError(f"`{path}` has no {named} head", hint=f"finetune it for {named} first")
        return False
    if len(set(labels)) != len(labels) or not labels:
        raise ModelError(
            f"labels must be distinct and at least one, got {list(labels)}",
            hint="check `task.labels`",
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    if head in PROBLEM_TYPES:
        config.problem_type = PROBLEM_TYPES[head]
    return not (trained and own == list(labels))


def _set_regression(config: PretrainedConfig, family: Family) -> bool:
    """Prepare the config for one number; true if the head has to be made anew."""
    for name, value in family.config_values.items():
        setattr(config, name, value)
    trained = _has_head(config, "regression") and config.num_labels == 1
    config.num_labels = 1
    config.problem_type = PROBLEM_TYPES["regression"]
    return not trained


def _check_missing(
    fresh: Collection[str], model: PreTrainedModel, path: Path, new_head: bool
) -> None:
    missing = sorted(name for name in fresh if not (new_head and layer_of(name, model) == "head"))
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"`{path}` lacks {len(missing)} weights of {type(model).__name__}: {shown}",
            hint="the folder is incomplete, or config.json belongs to another model",
        )


def _check_generation_config(model: PreTrainedModel, path: Path) -> None:
    """See that it can be written again: transformers reads contradictions that it refuses to write.

    A folder that sets a temperature but not that it samples means to sample.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        with quiet_transformers():
            try:
                config.validate(strict=True)
            except ValueError:
                config.do_sample = True
                config.validate(strict=True)
    except ValueError as error:
        raise ModelError(
            f"`{path / 'generation_config.json'}` contradicts itself: {error}",
            hint="correct it, or delete the file",
        ) from error


@torch.no_grad()
def _initialize(model: PreTrainedModel, names: Collection[str], seed: int) -> None:
    """Give new parameters their start, in float32 and in the order of their names."""
    generator = torch.Generator().manual_seed(seed)
    deviation = float(getattr(model.config, "initializer_range", None) or 0.02)
    parameters = dict(model.named_parameters())
    for name in sorted(names):
        parameter = parameters[name]
        if parameter.ndim > 1:
            start = torch.randn(parameter.shape, generator=generator) * deviation
        else:  # a bias, or the weight of a norm
            start = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0)
        parameter.copy_(start)
