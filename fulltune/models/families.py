"""The values in which GPT, BERT, XLNet, T5 and their kin differ.

A model belongs to a family by its `config.model_type`. Nothing else in the package asks which
family a model is of; it reads one of the values here.

Shape suffixes: D documents, H hidden size, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fulltune.errors import ModelError

Part = int | Literal["embeddings", "head"]


@dataclass(frozen=True)
class Family:
    """What training, packing and classification need to know of an architecture."""

    name: Literal["gpt", "bert", "xlnet", "t5"]
    pooling: Literal["first", "last"]
    """Which token of a document a classification head reads."""
    can_pack: bool
    """Attention goes through transformers' interface and is given the documents' boundaries, and
    positions counted from 0 per document are the model's own."""
    dropout_fields: tuple[str, ...]
    """Fields of the config that a dropout override sets, where the config has them."""
    can_generate: bool
    """Whether it is a causal language model."""
    classify: Callable[[Any, Tensor], Any]
    """Applies the classification head to one vector per document, [D, H] -> [D, C]."""
    positions_after_padding: bool = False
    """Whether positions start at the padding id + 1, which shortens the context by as much."""
    config_values: Mapping[str, object] = field(default_factory=dict)
    """Values of the config that make transformers' own forward pool as `pooling` says."""


# Where the classes of each architecture keep their head; transformers gives these no types.


def _score(model: Any, hidden_DH: Tensor) -> Any:
    return model.score(hidden_DH)


def _pooler_then_linear(model: Any, hidden_DH: Tensor) -> Any:
    return model.classifier(model.dropout(model.base_model.pooler(hidden_DH[:, None])))


def _albert(model: Any, hidden_DH: Tensor) -> Any:
    body = model.base_model
    return model.classifier(model.dropout(body.pooler_activation(body.pooler(hidden_DH))))


def _head_module(model: Any, hidden_DH: Tensor) -> Any:
    return model.classifier(hidden_DH[:, None])


def _distilbert(model: Any, hidden_DH: Tensor) -> Any:
    return model.classifier(model.dropout(torch.relu(model.pre_classifier(hidden_DH))))


def _deberta(model: Any, hidden_DH: Tensor) -> Any:
    return model.classifier(model.dropout(model.pooler(hidden_DH[:, None])))


def _modernbert(model: Any, hidden_DH: Tensor) -> Any:
    return model.classifier(model.drop(model.head(hidden_DH)))


def _xlnet(model: Any, hidden_DH: Tensor) -> Any:
    return model.logits_proj(model.sequence_summary(hidden_DH[:, None]))


def _t5(model: Any, hidden_DH: Tensor) -> Any:
    return model.classification_head(hidden_DH)


GPT = Family(
    name="gpt",
    pooling="last",
    can_pack=False,
    dropout_fields=(
        *("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"),
        *("residual_dropout", "embedding_dropout", "dropout"),
    ),
    can_generate=True,
    classify=_score,
)
GPT_PACKED = replace(GPT, can_pack=True)

BERT = Family(
    name="bert",
    pooling="first",
    can_pack=False,
    dropout_fields=(
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
        *("classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout"),
        *("embedding_dropout", "mlp_dropout"),
    ),
    can_generate=False,
    classify=_pooler_then_linear,
)
BERT_PACKED = replace(BERT, can_pack=True)
# RoBERTa counts positions from the padding id + 1 and only where the ids are not padding; it is
# left to count them itself.
ROBERTA = replace(BERT, classify=_head_module, positions_after_padding=True)
DEBERTA = replace(BERT, classify=_deberta)

XLNET = Family(
    name="xlnet",
    pooling="last",
    can_pack=False,
    dropout_fields=("dropout", "summary_last_dropout"),
    can_generate=False,
    classify=_xlnet,
)
T5 = Family(
    name="t5",
    pooling="last",
    can_pack=False,
    dropout_fields=("dropout_rate", "classifier_dropout"),
    can_generate=False,
    classify=_t5,
)

# Measured, not read off: a packed row gave each of these the same hidden states as its documents
# gave alone. Absent on purpose: attention sinks (gpt_oss) and soft caps (gemma2), which the packed
# attention does not compute; stablelm and nemotron, which drop the boundaries on the way; and state
# space and convolution layers, which read across documents.
PACKING_DECODERS = (
    *("apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "diffllama", "ernie4_5"),
    *("exaone4", "gemma", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox"),
    *("granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama", "ministral", "mistral"),
    *("mixtral", "nanochat", "olmo", "olmo2", "olmo3", "opt", "persimmon"),
    *("phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "seed_oss", "smollm3", "starcoder2"),
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(PACKING_DECODERS, GPT_PACKED),
    "bert": BERT_PACKED,
    "ernie": BERT_PACKED,
    "albert": replace(BERT_PACKED, classify=_albert),
    "distilbert": replace(BERT_PACKED, classify=_distilbert),
    "electra": replace(BERT_PACKED, classify=_head_module),
    "modernbert": replace(
        BERT_PACKED, classify=_modernbert, config_values={"classifier_pooling": "cls"}
    ),
    "megatron-bert": BERT,
    "roberta": ROBERTA,
    "roberta-prelayernorm": ROBERTA,
    "xlm-roberta": ROBERTA,
    "xlm-roberta-xl": ROBERTA,
    "camembert": ROBERTA,
    "data2vec-text": ROBERTA,
    "mpnet": ROBERTA,
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA,
    "xlnet": replace(XLNET, config_values={"summary_type": "last"}),
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
}

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|albert_layer_groups)\.(\d+)\.")
_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embeddings|embed_\w+|wte|wpe|word_embeddings?\w*|tok_embeddings|shared|mask_emb"
    r"|project_in|embeddings_project|embedding_hidden_mapping_in)(?:\.|$)"
)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model, by its config's `model_type`.

    Decoders that are not in the table count as GPT, without packing.

    Raises:
        ModelError: the type is unknown, or an encoder-decoder other than T5.
    """
    model_type = config.model_type
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.is_encoder_decoder:
        return GPT
    raise ModelError(
        f"models of type `{model_type}` are not supported",
        hint=f"decoders of transformers' causal language models, and {', '.join(sorted(FAMILIES))}",
    )


def num_layers(config: PretrainedConfig) -> int:
    """Layers of the model's body; for an encoder-decoder, of its encoder."""
    return int(config.get_text_config().num_hidden_layers)


def layer_of(parameter_name: str, model: PreTrainedModel) -> Part:
    """The layer a parameter lies in, counted from the input, or `embeddings` or `head`.

    The head is all that comes after the last layer: final norm, pooler, output or class weights.
    """
    prefix = model.base_model_prefix
    body = getattr(model, prefix, None)
    inside = not isinstance(body, nn.Module) or parameter_name.startswith(f"{prefix}.")
    if inside and (match := _LAYER.search(parameter_name)):
        return int(match[1])
    return "embeddings" if inside and _EMBEDDINGS.search(parameter_name) else "head"


def classification_logits(model: PreTrainedModel, hidden_DH: Tensor) -> Tensor:
    """The classification head of a model, applied to the pooled vector of each document.

    Args:
        model: an `AutoModelForSequenceClassification`.
        hidden_DH: the body's last hidden state at the family's `pooling` token of each document.

    Returns:
        Logits [D, C], as the model's own forward gives on the documents one by one.
    """
    logits_DC: Tensor = family_of(model.config).classify(model, hidden_DH)
    return logits_DC
