"""Sources to model folders, folders to models, and back.

A source is a folder, a run folder, a `.gguf` file, `asset:NAME`, or a name on the model hub.
`resolve_model` makes a checked folder in plain Hugging Face layout of any of them; everything else
here takes such a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    XLNetLMHeadModel,
)

from fulltune import assets
from fulltune.assets.building import built_whole
from fulltune.assets.dequantize import dequantize_gguf
from fulltune.assets.quiet import quiet_transformers
from fulltune.errors import AssetError, ConfigError, ModelError, near_paths
from fulltune.models import attention as _registered  # noqa: F401  (registers "fulltune")
from fulltune.models.families import Family, family_of, layer_of
from fulltune.runtime import cache_dir

logger = logging.getLogger("fulltune")

Head = Literal[
    "causal_lm",
    "classification",
    "masked_lm",
    "sentence_order",
    "permutation_lm",
    "sequence_to_sequence",
]

AUTO_CLASSES: dict[Head, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "masked_lm": AutoModelForMaskedLM,
    "sentence_order": AutoModelForPreTraining,
    "permutation_lm": XLNetLMHeadModel,
    "sequence_to_sequence": AutoModelForSeq2SeqLM,
}
POSSIBLE_SOURCES = (
    "give a run folder, a model folder, a .gguf file, a Hub name OWNER/NAME, or asset:NAME "
    "(`fulltune models` lists them)"
)
INFO_FILE = "fulltune.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt"),
)
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
UNLIMITED_CONTEXT = 1 << 20
"""Context of models without a longest length, such as XLNet; memory is their limit."""

CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
}


def resolve_model(source: str) -> Path:
    """Give the local folder of a model, fetching or converting it the first time.

    Raises:
        AssetError: an asset or hub model cannot be had.
        ModelError: the folder or file is incomplete or corrupt.
    """
    check_model_source(source)
    if source.startswith(assets.PREFIX):
        folder = assets.fetch(source)
    elif source.lower().endswith(".gguf"):
        folder = _converted_gguf(Path(source).expanduser())
    elif (path := Path(source).expanduser()).exists():
        folder = path / "model" if (path / "model" / "config.json").is_file() else path
    else:
        folder = _from_hub(source)
    _check_folder(folder)
    return folder


def check_model_source(source: str) -> None:
    """Refuse a source that cannot be there, before anything slow is begun or fetched.

    Raises:
        AssetError: no such asset, or it is no model.
        ModelError: no such file or folder, and no name of the hub.
    """
    if not source.strip():
        raise ModelError("`model` is empty", hint=POSSIBLE_SOURCES)
    if source.startswith(assets.PREFIX):
        if assets.find_asset(source).kind != "model":
            names = (
                f"`{assets.PREFIX}{other.name}`"
                for other in assets.list_assets()
                if other.kind == "model"
            )
            raise AssetError(
                f"`{source}` is data, not a model", hint=f"models are {', '.join(names)}"
            )
    elif not Path(source).expanduser().exists() and not (
        source.lower().endswith(".gguf") or is_hub_name(source)
    ):
        raise ModelError(
            f"`{source}` does not exist", hint=_near_folders(source) or POSSIBLE_SOURCES
        )


def is_hub_name(source: str) -> bool:
    """Whether a source that is not there could be a model of the hub: `OWNER/NAME` or `NAME`."""
    return re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", source) is not None


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
        reason = f"{_first_line(error)} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(
            f"`{path}` has no tokenizer that can be read: {reason.strip().splitlines()[0]}",
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
    if head == "classification":
        new_head = _set_labels(config, family, labels, path)
    elif head in ("masked_lm", "sentence_order"):
        new_head = True  # a body alone gets one; a head that is there is kept
    elif head == "causal_lm" and not family.can_generate:
        raise ModelError(
            f"`{path}` is an encoder (`{config.model_type}`) and cannot generate text",
            hint="use it with `task.kind: classification`, or choose a decoder",
        )

    auto = AUTO_CLASSES[head]
    chosen = attention if family.can_pack or attention == "eager" else None
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            loaded, report = auto.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                attn_implementation=chosen,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"`{path}` cannot be loaded: {_first_line(error)}",
            hint="do config.json and the weights belong together?",
        ) from error

    model: PreTrainedModel = loaded
    fresh = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    if new_head and head == "classification":
        prefix = f"{model.base_model_prefix}."
        fresh |= {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
    _check_missing(fresh, model, path, new_head)
    _initialize(model, fresh, seed)
    _check_generation_config(model, path)
    return model


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
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            loaded, report = auto.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"`{path}` cannot be loaded: {_first_line(error)}",
            hint="do config.json and the weights belong together?",
        ) from error
    body: PreTrainedModel = loaded
    # A pooler counts as a head, and folders of language models do not hold one.
    _check_missing(report["missing_keys"], body, path, new_head=True)
    return body


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
    """Write a folder that transformers loads as it is, with `info` beside it as fulltune.json."""
    directory.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
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


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give a tokenizer a chat template: a built-in name (`chatml`) or the path of a Jinja file.

    Tokens are never added. Where a marker of the template is not one token, the log says so: the
    model then learns it as the several tokens it is.

    Raises:
        ConfigError: no such template, or it cannot be rendered.
    """
    if template in CHAT_TEMPLATES:
        text = CHAT_TEMPLATES[template]
    elif (path := Path(template).expanduser()).is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"chat template `{template}` cannot be read: {error}", hint="save it as UTF-8"
            ) from None
    else:
        raise ConfigError(
            f"chat template `{template}` is neither built in nor a file",
            hint="give the path of a Jinja file, or "
            + " or ".join(f"`{name}`" for name in CHAT_TEMPLATES),
        )
    previous, tokenizer.chat_template = tokenizer.chat_template, text
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except jinja2.TemplateError as error:
        tokenizer.chat_template = previous
        line = getattr(error, "lineno", None)
        raise ConfigError(
            f"chat template {f'{template}:{line}' if line else f'`{template}`'} "
            f"cannot be rendered: {error}",
            hint="correct the template; it is Jinja, given `messages` and `add_generation_prompt`",
        ) from error
    for marker in sorted(set(re.findall(r"<\|\w+\|>", text))):
        num_tokens = len(tokenizer.encode(marker, add_special_tokens=False))
        if num_tokens != 1:
            logger.info("chat template: `%s` is %d tokens in this vocabulary", marker, num_tokens)


def _converted_gguf(gguf_file: Path) -> Path:
    if not gguf_file.is_file():
        raise ModelError(f"`{gguf_file}` does not exist", hint="give the path of a .gguf file")
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_dir() / "models" / f"{gguf_file.stem}-{digest[:12]}"
    if folder.is_dir():
        return folder
    with built_whole(folder) as building:
        dequantize_gguf(gguf_file, building)
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with quiet_transformers():
            return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        reason = "it is offline or not reached" if offline else _first_line(error)
        if Path(name).parent.is_dir() and "/" in name:  # a path here, if there ever was one
            raise ModelError(
                f"there is no folder `{name}`; a model of this name on the hub was not had either: "
                f"{reason}",
                hint=_near_folders(name) or POSSIBLE_SOURCES,
            ) from error
        raise AssetError(
            f"`{name}` does not exist here, and the model hub did not give it: {reason}",
            hint="check the path or name, and the network; without a hub, use a folder or "
            "asset:NAME (`fulltune models` lists them)",
        ) from error


def _near_folders(source: str) -> str | None:
    near = near_paths(Path(source).expanduser(), count=3)
    return f"did you mean {' or '.join(f'`{path}`' for path in near)}?" if near else None


def _check_folder(folder: Path) -> None:
    """Fail with the name of what is missing or corrupt."""
    if not folder.is_dir():
        raise ModelError(f"`{folder}` is not a folder", hint="give the folder of the model")
    if not (folder / "config.json").is_file():
        unfinished = (folder / "checkpoints").is_dir()
        raise ModelError(
            f"`{folder}` has no config.json",
            hint="it is a run that has not finished: go on with it by `--resume`"
            if unfinished
            else "is it a model folder?",
        )
    for path in _weight_files(folder):
        if not path.is_file():
            raise ModelError(f"`{path}` is missing", hint="copy or download it again")
        try:
            with safe_open(path, framework="pt"):
                pass  # opening checks the header against the file's length
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"`{path}` is corrupt or cut short: {error}", hint="copy or download it again"
            ) from error


def _weight_files(folder: Path) -> Iterable[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"`{index}` is not a weight index", hint="download it again"
            ) from error
        return [folder / name for name in sorted(set(weight_map.values()))]
    if not (folder / "model.safetensors").is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        raise ModelError(
            f"`{folder}` has no model.safetensors",
            hint=f"convert {pickled[0]} to safetensors: pickled weights can run code"
            if pickled
            else "is the download complete?",
        )
    return [folder / "model.safetensors"]


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
            f"`{file}` cannot be read: {_first_line(error)}", hint="copy or download it again"
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
            f"`{file}` cannot be used: {_first_line(error)}",
            hint="is the installed transformers new enough for this model?",
        ) from error
    return config


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


def _set_labels(
    config: PretrainedConfig, family: Family, labels: Sequence[str] | None, path: Path
) -> bool:
    """Prepare the config for its classes; true if the head has to be made anew."""
    for name, value in family.config_values.items():
        setattr(config, name, value)
    trained = any("SequenceClassification" in name for name in config.architectures or ())
    own = list((config.id2label or {}).values())
    if labels is None:
        if not trained:
            raise ModelError(
                f"`{path}` has no classification head", hint="finetune it for classification first"
            )
        return False
    if len(set(labels)) != len(labels) or not labels:
        raise ModelError(
            f"labels must be distinct and at least one, got {list(labels)}",
            hint="check `task.labels`",
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    # Regression and multi-label are other losses; a saved model must not be taken for one.
    config.problem_type = "single_label_classification"
    return not (trained and own == list(labels))


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
