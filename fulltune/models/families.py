"""The values in which GPT, BERT, XLNet, T5 and their kin differ.

A model belongs to a family by its `config.model_type`. Nothing else in the package asks which
family a model is of; it reads one of the values here.

Shape suffixes: B rows, T tokens, D documents, N masked positions, H hidden size, E size of the
output embedding, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
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
    predict_masked: Callable[[Any, Tensor], Any] | None = None
    """What the masked-LM head does before the output embedding, [N, H] -> [N, E]; None without."""
    relate_sentences: Callable[[Any, Tensor], Any] | None = None
    """Applies the sentence-pair head to the first token of each pair, [D, H] -> [D, 2]; or None."""
    pools_real_tokens: bool = True
    """Whether transformers' own forward of a classifier reads the `pooling` token of each row
    whatever the rows beside it are; otherwise the hidden states are pooled here."""
    decoder_input: Callable[[Any, Tensor], Any] | None = None
    """What the decoder of a classifier reads, [B, T] -> [B, T]; None without a decoder."""
    has_decoder: bool = False
    """Whether a decoder beside the encoder writes a text."""
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


def _bert_masked(model: Any, hidden_NH: Tensor) -> Any:
    return model.cls.predictions.transform(hidden_NH)


def _albert_masked(model: Any, hidden_NH: Tensor) -> Any:
    head = model.predictions
    return head.LayerNorm(head.activation(head.dense(hidden_NH)))


def _distilbert_masked(model: Any, hidden_NH: Tensor) -> Any:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden_NH)))


def _electra_masked(model: Any, hidden_NH: Tensor) -> Any:
    return model.generator_predictions(hidden_NH)


def _modernbert_masked(model: Any, hidden_NH: Tensor) -> Any:
    return model.head(hidden_NH)


def _roberta_masked(model: Any, hidden_NH: Tensor) -> Any:
    head = model.lm_head
    return head.layer_norm(F.gelu(head.dense(hidden_NH)))


def _bert_sentences(model: Any, hidden_DH: Tensor) -> Any:
    return model.cls.seq_relationship(model.base_model.pooler(hidden_DH[:, None]))


def _albert_sentences(model: Any, hidden_DH: Tensor) -> Any:
    body = model.base_model
    return model.sop_classifier(body.pooler_activation(body.pooler(hidden_DH)))


def _xlnet(model: Any, hidden_DH: Tensor) -> Any:
    return model.logits_proj(model.sequence_summary(hidden_DH[:, None]))


def _t5(model: Any, hidden_DH: Tensor) -> Any:
    return model.classification_head(hidden_DH)


def _t5_decoder_input(model: Any, ids_BT: Tensor) -> Any:
    return model._shift_right(ids_BT)


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
    predict_masked=_bert_masked,
    relate_sentences=_bert_sentences,
)
BERT_PACKED = replace(BERT, can_pack=True)
# RoBERTa counts positions from the padding id + 1 and only where the ids are not padding; it is
# left to count them itself.
ROBERTA = replace(
    BERT,
    classify=_head_module,
    predict_masked=_roberta_masked,
    relate_sentences=None,
    positions_after_padding=True,
)
DEBERTA = replace(BERT, classify=_deberta, relate_sentences=None)

XLNET = Family(
    name="xlnet",
    pooling="last",
    can_pack=False,
    dropout_fields=("dropout", "summary_last_dropout"),
    can_generate=False,
    classify=_xlnet,
    pools_real_tokens=False,  # but the last place of a row, padding or not
)
T5 = Family(
    name="t5",
    pooling="last",
    can_pack=False,
    dropout_fields=("dropout_rate", "classifier_dropout"),
    can_generate=False,
    classify=_t5,
    # But the last end token, and it refuses rows that have unlike numbers of them.
    pools_real_tokens=False,
    decoder_input=_t5_decoder_input,
    has_decoder=True,
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
    "albert": replace(
        BERT_PACKED,
        classify=_albert,
        predict_masked=_albert_masked,
        relate_sentences=_albert_sentences,
    ),
    "distilbert": replace(
        BERT_PACKED,
        classify=_distilbert,
        predict_masked=_distilbert_masked,
        relate_sentences=None,
    ),
    "electra": replace(
        BERT_PACKED,
        classify=_head_module,
        predict_masked=_electra_masked,
        relate_sentences=None,
    ),
    "modernbert": replace(
        BERT_PACKED,
        classify=_modernbert,
        predict_masked=_modernbert_masked,
        relate_sentences=None,
        config_values={"classifier_pooling": "cls"},
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


def layers_of(model: PreTrainedModel) -> dict[str, Part]:
    """The layer of every parameter by name; see `layer_of`."""
    return {name: layer_of(name, model) for name, _ in model.named_parameters()}


def classification_states(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """The last hidden states that the classification head of a model reads one of.

    Args:
        model: an `AutoModelForSequenceClassification`.
        inputs: of its body; ``input_ids`` int64 [B, T] among them.

    Returns:
        [B, T, H]; of an encoder-decoder, the decoder's, which reads the text once more.
    """
    more = {}
    if decoder_input := family_of(model.config).decoder_input:
        more["decoder_input_ids"] = decoder_input(model, inputs["input_ids"])
    states_BTH: Tensor = model.base_model(**inputs, **more).last_hidden_state
    return states_BTH


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


def masked_hidden_states(model: PreTrainedModel, hidden_NH: Tensor) -> Tensor:
    """What a masked-LM head makes of last hidden states, before the output embedding.

    Args:
        model: an `AutoModelForMaskedLM` or `AutoModelForPreTraining`.
        hidden_NH: the body's last hidden states at the positions to predict.

    Returns:
        [N, E], of which ``model.get_output_embeddings()`` makes the logits of the model's own
        forward.

    Raises:
        ModelError: it has no masked-LM head, or one that is computed in another way.
    """
    predict_masked = family_of(model.config).predict_masked
    # DeBERTa's other head has no output embedding of its own: it multiplies by the input's.
    if predict_masked is None or not getattr(model.config, "legacy", True):
        raise ModelError(
            f"the masked-LM head of `{model.config.model_type}` is not supported",
            hint=_types_with("predict_masked"),
        )
    hidden_NE: Tensor = predict_masked(model, hidden_NH)
    return hidden_NE


def sentence_logits(model: PreTrainedModel, hidden_DH: Tensor) -> Tensor:
    """The sentence-pair head of a model (next sentence or sentence order).

    Args:
        model: an `AutoModelForPreTraining`.
        hidden_DH: the body's last hidden state at the first token of each pair.

    Returns:
        Logits [D, 2]; class 1 is a random or swapped second sentence.

    Raises:
        ModelError: the model has no such head.
    """
    relate_sentences = family_of(model.config).relate_sentences
    if relate_sentences is None:
        raise ModelError(
            f"`{model.config.model_type}` has no head for pairs of sentences",
            hint=_types_with("relate_sentences"),
        )
    logits_D2: Tensor = relate_sentences(model, hidden_DH)
    return logits_D2


def _types_with(name: str) -> str:
    types = sorted(kind for kind, family in FAMILIES.items() if getattr(family, name))
    return f"choose a model of type {', '.join(types)}"
