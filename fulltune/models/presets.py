"""New models: published sizes and starts of each family, over any tokenizer.

Weights start as transformers starts them, which is as each family was published: GPT-2 with
0.02 and residual projections divided by the root of twice the layers (Radford et al., 2019),
BERT and XLNet with a deviation of `initializer_range`, T5 with a deviation that falls with the
width of each matrix (Raffel et al., 2020), Llama with 0.02.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedTokenizerBase

from fulltune.assets.building import built_whole
from fulltune.assets.quiet import quiet_transformers
from fulltune.errors import ConfigError, ModelError, first_line
from fulltune.models.loading import AUTO_CLASSES, Head, load_model_config, save_model
from fulltune.runtime import cache_dir


@dataclass(frozen=True)
class Preset:
    """A size of a family: the type of transformers' config and its values."""

    model_type: str
    values: Mapping[str, Any]


def _gpt2(width: int, layers: int, heads: int, context: int = 1024, **more: Any) -> Preset:
    values = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": context}
    return Preset("gpt2", {**values, **more})


def _bert(width: int, layers: int) -> Preset:
    return Preset(
        "bert",
        {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "intermediate_size": 4 * width,
        },
    )


def _modernbert(width: int, layers: int, heads: int, **more: Any) -> Preset:
    values = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 3 * width // 2,
    }
    return Preset("modernbert", {**values, **more})


def _xlnet(width: int, layers: int, heads: int) -> Preset:
    values = {"d_model": width, "n_layer": layers, "n_head": heads, "d_inner": 4 * width}
    return Preset("xlnet", values)


def _t5(width: int, layers: int, heads: int, inner: int) -> Preset:
    """T5 1.1: gated GELU and no dropout in pre-training."""
    return Preset(
        "t5",
        {
            "d_model": width,
            "num_layers": layers,
            "num_heads": heads,
            "d_ff": inner,
            "d_kv": 64,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
        },
    )


def _llama(width: int, layers: int, heads: int, kv_heads: int, inner: int) -> Preset:
    return Preset(
        "llama",
        {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": inner,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    )


_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

PRESETS: dict[str, Preset] = {
    # nanoGPT's configuration for a CPU; its GPT-2 has the same shapes.
    "gpt2-nano": _gpt2(128, 4, 4, context=256, **_NO_DROPOUT),
    "gpt2-tiny": _gpt2(128, 2, 2),
    "gpt2-mini": _gpt2(256, 4, 4),
    "gpt2-small": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    # Turc et al., 2019.
    "bert-tiny": _bert(128, 2),
    "bert-mini": _bert(256, 4),
    "bert-small": _bert(512, 4),
    "bert-medium": _bert(512, 8),
    "bert-base": _bert(768, 12),
    "bert-large": _bert(1024, 24),
    # Warner et al., 2024: rotated positions. Its start is for wide models; the tiny one's is not.
    "modernbert-tiny": _modernbert(128, 2, 2, initializer_range=0.1, max_position_embeddings=512),
    "modernbert-base": _modernbert(768, 22, 12),
    "xlnet-tiny": _xlnet(128, 2, 2),
    "xlnet-mini": _xlnet(256, 4, 4),
    "xlnet-base": _xlnet(768, 12, 12),
    "xlnet-large": _xlnet(1024, 24, 16),
    "t5-tiny": _t5(128, 2, 2, 256),
    "t5-mini": _t5(256, 4, 4, 512),
    "t5-small": _t5(512, 8, 6, 1024),
    "t5-base": _t5(768, 12, 12, 2048),
    "t5-large": _t5(1024, 24, 16, 2816),
    "llama-tiny": _llama(128, 2, 4, 2, 384),
    "llama-135m": _llama(576, 30, 9, 3, 1536),
    "llama-360m": _llama(960, 32, 15, 5, 2560),
}


_OF_THE_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")
_OF_SOME_TOKENIZERS = ("cls_token_id", "sep_token_id")  # ModernBERT's, of its own vocabulary


def is_new_model(source: str) -> bool:
    """Whether a source names what is to be made: a preset or a config.json."""
    return source in PRESETS or source.endswith(".json")


def make_config(
    source: str, tokenizer: PreTrainedTokenizerBase, overrides: Mapping[str, Any]
) -> PretrainedConfig:
    """The config of a new model, fitted to a tokenizer.

    Args:
        source: a name of `PRESETS`, or the path of any config.json of transformers.
        tokenizer: gives the vocabulary's size and the ids of its special tokens.
        overrides: fields of the config that differ.

    Raises:
        ConfigError: a field is not one of this config's, or is the tokenizer's to say.
        ModelError: the file cannot be used.
    """
    if source in PRESETS:
        model_type, values = PRESETS[source].model_type, dict(PRESETS[source].values)
    else:
        path = Path(source).expanduser()
        if path.name != "config.json" or not path.is_file():
            raise ModelError(
                f"`{source}` is not the path of a config.json",
                hint=f"give one, or a size: {', '.join(PRESETS)}",
            )
        given = load_model_config(path.parent)
        model_type, values = given.model_type, given.to_dict()
    known = {*CONFIG_MAPPING[model_type]().to_dict(), *CONFIG_MAPPING[model_type].attribute_map}
    own_tokens = [name for name in _OF_SOME_TOKENIZERS if name in known]
    for name in overrides:
        if name not in known:
            raise ConfigError(
                f"`architecture.{name}` is no field of a `{model_type}` config",
                hint=f"fields: {', '.join(sorted(known))}",
            )
        if name in ("vocab_size", "decoder_start_token_id", *_OF_THE_TOKENIZER, *own_tokens):
            raise ConfigError(
                f"`architecture.{name}` has no effect: it is taken from the tokenizer",
                hint="leave it out, or give another `tokenizer`",
            )
    try:
        # Made anew, so that what follows from other fields, as a head's width, is derived again.
        config: PretrainedConfig = CONFIG_MAPPING[model_type](**{**values, **overrides})
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
        raise ConfigError(
            f"`architecture` does not fit together: {reason}", hint="correct or leave out a field"
        ) from error
    config.vocab_size = len(tokenizer)
    for name in (*_OF_THE_TOKENIZER, *own_tokens):
        setattr(config, name, getattr(tokenizer, name))
    if config.is_encoder_decoder:
        config.decoder_start_token_id = tokenizer.pad_token_id
    return config


def make_model(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: Head,
    seed: int,
) -> Path:
    """A folder with a new model, its weights drawn from ``seed``; made once, then found again.

    Raises:
        ConfigError: the fields of the config do not fit together.
        ModelError: models of this type have no such head.
    """
    # All that decides the folder, the parts of the tokenizer beside its backend included.
    words = [
        tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template,
        tokenizer.padding_side, tokenizer.model_input_names,
    ]  # fmt: skip
    versions = [torch.__version__, transformers.__version__]
    described = json.dumps(
        [config.to_dict(), words, head, seed, versions], sort_keys=True, default=str
    )
    address = hashlib.sha256(described.encode()).hexdigest()[:16]
    folder = cache_dir() / "models" / f"new-{config.model_type}-{address}"
    if folder.is_dir():
        return folder
    with built_whole(folder) as building, quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = (
                AUTO_CLASSES[head].from_config(config)
                if hasattr(AUTO_CLASSES[head], "from_config")
                else AUTO_CLASSES[head](config)
            )
        except KeyError as error:  # transformers looks activations up by name
            raise ConfigError(
                f"`architecture` names {error}, which transformers does not know",
                hint="correct or leave out the field",
            ) from error
        # Where the fields of a config do not fit, the code of each architecture fails in its way.
        except (ValueError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
            reason = first_line(error) or type(error).__name__
            if reason.startswith("Unrecognized configuration class"):
                raise ModelError(
                    f"a `{config.model_type}` model has no head for this objective",
                    hint="choose another `objective.name`",
                ) from error
            raise ConfigError(
                f"`architecture` does not fit together: {reason}",
                hint="correct or leave out a field",
            ) from error
        save_model(model, tokenizer, building, info={})
    return folder
