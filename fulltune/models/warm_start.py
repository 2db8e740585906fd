"""An XLNet that starts from the weights of a BERT.

The two compute the same in a layer but for where positions and segments enter: BERT adds them to
the embeddings, XLNet to the attention scores. So what a layer does with the *content* of its tokens
can be taken over, and the positional part starts anew.

Shape suffixes: H hidden size, A attention heads, D size of a head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import (
    BertConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetLMHeadModel,
)

from fulltune.assets.building import built_whole
from fulltune.errors import ModelError, first_line
from fulltune.models.loading import load_model_config, load_tokenizer, save_model
from fulltune.runtime import cache_dir

_LAYER = "encoder.layer.{layer}."
_COPIED = {
    "ff.layer_1.weight": "intermediate.dense.weight",
    "ff.layer_1.bias": "intermediate.dense.bias",
    "ff.layer_2.weight": "output.dense.weight",
    "ff.layer_2.bias": "output.dense.bias",
    "ff.layer_norm.weight": "output.LayerNorm.weight",
    "ff.layer_norm.bias": "output.LayerNorm.bias",
    "rel_attn.layer_norm.weight": "attention.output.LayerNorm.weight",
    "rel_attn.layer_norm.bias": "attention.output.LayerNorm.bias",
}
_PROJECTIONS = {
    "rel_attn.q": "attention.self.query.weight",
    "rel_attn.k": "attention.self.key.weight",
    "rel_attn.v": "attention.self.value.weight",
}
_OUTPUT = ("rel_attn.o", "attention.output.dense.weight")
_QUERY_BIAS = ("rel_attn.r_w_bias", "attention.self.query.bias")
_WORDS = "embeddings.word_embeddings.weight"
_HEAD_BIAS = "cls.predictions.bias"
_DECISIVE_FILES = (
    "*.safetensors",
    "config.json",
    "tokenizer*.json",
    "*.txt",
    "special_tokens*.json",
)
_NO_WEIGHT = "position_ids"  # the numbers 0, 1, 2, ..., written by old versions of transformers


@dataclass(frozen=True, eq=False)
class WarmStart:
    """The weights of an `XLNetLMHeadModel`, and where each comes from.

    Attributes:
        state: all of its parameters by name, float32; `load_state_dict` takes them.
        copied: names of the parameters that come from the BERT.
        new: names of those that are drawn by XLNet's own initialisation.
        left_behind: names of the BERT's weights that XLNet has no place for.
    """

    state: dict[str, Tensor]
    copied: tuple[str, ...]
    new: tuple[str, ...]
    left_behind: tuple[str, ...]


def xlnet_config_of(bert: BertConfig) -> XLNetConfig:
    """The config of an XLNet that a BERT's weights fit.

    It keeps the BERT's vocabulary; see `xlnet_layout` for the tokenizer.
    """
    return XLNetConfig(
        vocab_size=bert.vocab_size,
        d_model=bert.hidden_size,
        n_layer=bert.num_hidden_layers,
        n_head=bert.num_attention_heads,
        d_inner=bert.intermediate_size,
        ff_activation=bert.hidden_act,
        layer_norm_eps=bert.layer_norm_eps,
        initializer_range=bert.initializer_range,
        dropout=bert.hidden_dropout_prob,
        pad_token_id=bert.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
        mem_len=None,
    )


def warm_start_xlnet(bert_folder: Path, config: XLNetConfig, *, seed: int = 0) -> WarmStart:
    """Start an XLNet from a BERT.

    Word embeddings, the query, key, value and output matrices (reshaped to heads), the feed-forward
    layers and the norms are copied; the query's bias becomes ``r_w_bias``, which XLNet adds to the
    query where it meets the content. A key's bias adds the same to all scores of a query and drops
    out of the softmax. What XLNet has no place for (positions, segments, the norm of the
    embeddings, the biases of value and output, the pooler, the transform of the masked-word head)
    is left behind and named in the result.

    Args:
        bert_folder: a checked folder of a BERT, with any head or none.
        config: of the XLNet; see `xlnet_config_of`.
        seed: of the new weights; the same seed gives the same weights whatever was drawn before.

    Raises:
        ModelError: the folder is not a BERT's, lacks weights, or does not fit ``config``.
    """
    _check_fit(_bert_config(bert_folder), config, bert_folder)
    bert = _read_weights(bert_folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = XLNetLMHeadModel(config)
    # Tied weights have two names here; both are listed, and both hold the same tensor.
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    used: set[str] = set()
    copied: list[str] = []

    def copy(name: str, source: str, reshape: Callable[[Tensor], Tensor] | None = None) -> None:
        if source not in bert:
            raise ModelError(
                f"`{bert_folder}` lacks the weight `{source}`", hint="the folder is incomplete"
            )
        value = bert[source].to(torch.float32)
        value = reshape(value) if reshape else value
        if value.shape != state[name].shape:
            raise ModelError(
                f"`{source}` of `{bert_folder}` has the shape {tuple(value.shape)}, and "
                f"{tuple(state[name].shape)} is needed",
                hint="do config.json and the weights belong together?",
            )
        state[name] = value.clone()
        used.add(source)
        copied.append(name)

    heads = (config.n_head, config.d_model // config.n_head)
    copy("transformer.word_embedding.weight", _WORDS)
    if config.tie_word_embeddings:
        copy("lm_loss.weight", _WORDS)
    if _HEAD_BIAS in bert:
        copy("lm_loss.bias", _HEAD_BIAS)
    for layer in range(config.n_layer):
        to, source = f"transformer.layer.{layer}.", _LAYER.format(layer=layer)
        for name, each in _COPIED.items():
            copy(to + name, source + each)
        for name, each in _PROJECTIONS.items():
            # BERT's rows are [head, place in the head]; XLNet's come last.
            copy(to + name, source + each, lambda weight_HH: weight_HH.T.reshape(-1, *heads))
        name, each = _OUTPUT
        copy(to + name, source + each, lambda weight_HH: weight_HH.reshape(-1, *heads))
        name, each = _QUERY_BIAS
        copy(to + name, source + each, lambda bias_H: bias_H.reshape(heads))
    return WarmStart(
        state=state,
        copied=tuple(sorted(copied)),
        new=tuple(sorted(state.keys() - set(copied))),
        left_behind=tuple(sorted(bert.keys() - used)),
    )


def converted_xlnet(bert_folder: Path, *, seed: int = 0) -> Path:
    """The folder of `save_warm_start` in the cache: made once, then found again.

    Raises:
        ModelError: as `save_warm_start`.
    """
    digest = hashlib.sha256(f"{seed} {torch.__version__} {transformers.__version__}".encode())
    names = (file.name for glob in _DECISIVE_FILES for file in bert_folder.glob(glob))
    for name in sorted(names):
        with (bert_folder / name).open("rb") as file:
            digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    folder = cache_dir() / "models" / f"xlnet-of-bert-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        with built_whole(folder) as building:
            save_warm_start(bert_folder, building, seed=seed)
    return folder


def save_warm_start(bert_folder: Path, out: Path, *, seed: int = 0) -> WarmStart:
    """Write the XLNet that starts from a BERT as a model folder, with the BERT's vocabulary.

    Raises:
        ModelError: as `warm_start_xlnet`, or the folder has no tokenizer.
    """
    config = xlnet_config_of(_bert_config(bert_folder))
    tokenizer = xlnet_layout(load_tokenizer(bert_folder))
    start = warm_start_xlnet(bert_folder, config, seed=seed)
    model = XLNetLMHeadModel(config)
    model.load_state_dict(start.state)
    info = {"warm_start": {"copied": list(start.copied), "new": list(start.new)}}
    save_model(model, tokenizer, out, info=info)
    return start


def xlnet_layout(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """A BERT's tokenizer that sets its special tokens where XLNet reads them, and pads on the left.

    ``A [SEP] [CLS]`` and ``A [SEP] B [SEP] [CLS]``, with segments 0, 1 and 2 for the class token.

    Raises:
        ModelError: it has no separator or class token.
    """
    sep, cls = tokenizer.sep_token, tokenizer.cls_token
    if sep is None or cls is None:
        raise ModelError(
            "the tokenizer has no separator or no class token, which XLNet's sequences end with",
            hint="name `sep_token` and `cls_token` in tokenizer_config.json",
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A:0 {sep}:0 {cls}:2",
        pair=f"$A:0 {sep}:0 $B:1 {sep}:1 {cls}:2",
        special_tokens=[(sep, tokenizer.sep_token_id), (cls, tokenizer.cls_token_id)],
    )
    # Not the BERT's own class: loading it would put the BERT's layout back.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokenizer.special_tokens_map,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        padding_side="left",
    )


def _bert_config(folder: Path) -> BertConfig:
    config = load_model_config(folder)
    if not isinstance(config, BertConfig):
        raise ModelError(
            f"`{folder}` is a `{config.model_type}`, and an XLNet starts from a BERT",
            hint="give the folder of a model of type `bert`",
        )
    return config


def _check_fit(bert: BertConfig, xlnet: XLNetConfig, folder: Path) -> None:
    fitting = xlnet_config_of(bert)
    names = ("vocab_size", "d_model", "n_layer", "n_head", "d_inner", "ff_activation")
    for name in names:
        wanted, given = getattr(fitting, name), getattr(xlnet, name)
        if wanted != given:
            raise ModelError(
                f"the XLNet's `{name}` is {given}, but the BERT in `{folder}` has {wanted}",
                hint="make the config with `xlnet_config_of`",
            )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a BERT by the names they have in `BertModel` (heads keep their prefix)."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"`{folder}` has no weights in safetensors",
            hint="load and save it once with transformers",
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (a handle, not a mapping)
                    if name.endswith(_NO_WEIGHT):
                        continue
                    # Checkpoints of 2018 name a norm's weight and bias as TensorFlow does.
                    plain = name.removeprefix("bert.")
                    plain = plain.replace(".gamma", ".weight").replace(".beta", ".bias")
                    plain = plain.replace("predictions.decoder.bias", "predictions.bias")
                    weights[plain] = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"`{file}` cannot be read: {first_line(error)}",
                hint="copy or download it again",
            ) from error
    return weights
