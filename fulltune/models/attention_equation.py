"""The attention weights of a model, and a check that they are what the equation says.

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V        (Vaswani et al. 2017, equation 1)

The families differ in what they add to or leave out of the scores. Here each one's equation is
written out once more, from the weights of the model's own projections and in float64, and what it
gives is compared with the weights that the model returns and with the output of its attention
module. What differs is then the rounding of the model's float32.

Shape suffixes: B batch (one text), Q queries, K keys, N heads, A size of a head, H hidden size,
P relative positions, S same or other segment.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fulltune.errors import ModelError

TOLERANCE = 1e-5
"""Largest difference of a weight, and of an output relative to the layer's largest output.

Softmax and products in float32 keep about 1e-7 of their largest number; the scores, up to 50 or
so, and the sums over keys and channels leave two digits less."""


@dataclass(frozen=True)
class Call:
    """One call of an attention module, as a hook saw it."""

    module: Any
    arguments: Mapping[str, Any]
    """By the names of the module's `forward`."""
    output: Tensor
    config: PretrainedConfig
    index: int
    first: Any
    """The attention module of the first layer, where T5 keeps the bias of all layers."""


@dataclass(frozen=True)
class Equation:
    """What one kind of attention computes, in words and in code."""

    name: str
    formula: str
    """The checked equation, as it is printed."""
    layers: Callable[[Any], Sequence[nn.Module]]
    """The attention modules of a body, from the input on."""
    recompute: Callable[[Call], tuple[Tensor, Tensor]]
    """The weights [N, Q, K] and the module's output, by the equation."""


@dataclass(frozen=True)
class LayerAttention:
    """The weights of one layer, and how far the equation is from them."""

    layer: int
    weights_NQK: Tensor
    """As the model returned them; each row sums to 1."""
    weights_difference: float
    """Largest absolute difference between them and the equation's."""
    weights_tolerance: float
    output_difference: float
    """Largest absolute difference between the module's output and the equation's."""
    output_tolerance: float
    """`TOLERANCE` times the largest output of the module, or times 1 where all are smaller."""

    @property
    def passed(self) -> bool:
        """Whether both differences are within their tolerance; a NaN is not."""
        return (
            self.weights_difference <= self.weights_tolerance
            and self.output_difference <= self.output_tolerance
        )

    def entropies(self) -> list[float]:
        """Mean over the queries of -sum_j alpha_ij ln alpha_ij, in nats, for each head."""
        terms_NQK = torch.special.entr(self.weights_NQK.double())
        return [float(value) for value in terms_NQK.sum(-1).mean(-1)]


def equation_of(config: PretrainedConfig) -> Equation:
    """The equation that the attention of a model computes.

    Raises:
        ModelError: the type of model has no attention, or one that is not written out here.
    """
    if config.model_type not in EQUATIONS:
        raise ModelError(
            f"models of type `{config.model_type}` have no attention, or one whose equation is "
            "not known here",
            hint=f"choose a model of one of the types {', '.join(sorted(EQUATIONS))}",
        )
    return EQUATIONS[config.model_type]


@torch.no_grad()
def trace_attention(
    body: PreTrainedModel, inputs: Mapping[str, Tensor], layers: Sequence[int]
) -> list[LayerAttention]:
    """Run a text through a model and check the attention of some layers.

    Args:
        body: a model without a head, in float32 and with eager attention.
        inputs: what the tokenizer gave for one text, each [1, Q].
        layers: numbers of the layers, from 0 at the input.

    Raises:
        ModelError: the model's attention has no equation here.
    """
    equation = equation_of(body.config)
    modules = equation.layers(body)
    calls: dict[int, Call] = {}

    def watch(index: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
            first = modules[0]
            calls[index] = Call(module, named, output[0], body.config, index, first)

        return hook

    handles = [
        modules[index].register_forward_hook(watch(index), with_kwargs=True) for index in layers
    ]
    try:
        body.eval()
        returned = body(**inputs, output_attentions=True).attentions
    finally:
        for handle in handles:
            handle.remove()
    return [_compare(calls[index], returned[index][0], equation) for index in layers]


def _compare(call: Call, weights_NQK: Tensor, equation: Equation) -> LayerAttention:
    exact = replace(
        call,
        module=copy.deepcopy(call.module).double(),
        first=copy.deepcopy(call.first).double(),
        arguments={name: _doubled(value) for name, value in call.arguments.items()},
    )
    ours_NQK, output = equation.recompute(exact)
    return LayerAttention(
        layer=call.index,
        weights_NQK=weights_NQK.cpu(),
        weights_difference=float((ours_NQK - weights_NQK).abs().max()),
        weights_tolerance=TOLERANCE,
        output_difference=float((output - call.output).abs().max()),
        output_tolerance=TOLERANCE * max(1.0, float(call.output.abs().max())),
    )


def _doubled(value: Any) -> Any:
    if isinstance(value, tuple):  # cosines and sines
        return tuple(_doubled(part) for part in value)
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


# ------------------------------------------------------------------------------- the equations


def _softmax_of(scores_NQK: Tensor, mask: Tensor | None) -> Tensor:
    """Weights from scores; the mask is 0 where a query may look and hugely negative elsewhere."""
    if mask is not None:
        scores_NQK = scores_NQK + mask[0]
    return torch.softmax(scores_NQK, dim=-1)


def _heads(hidden_BQH: Tensor, head_size: int) -> Tensor:
    """[1, Q, N * A] -> [N, Q, A]."""
    heads_NQA: Tensor = hidden_BQH[0].unflatten(-1, (-1, head_size)).transpose(0, 1)
    return heads_NQA


def _joined(values_NQA: Tensor) -> Tensor:
    """[N, Q, A] -> [1, Q, N * A]."""
    return values_NQA.transpose(0, 1).flatten(1)[None]


def _gpt2(call: Call) -> tuple[Tensor, Tensor]:
    module, config = call.module, call.config
    head_size = config.hidden_size // config.num_attention_heads
    projected_BQH = call.arguments["hidden_states"] @ module.c_attn.weight + module.c_attn.bias
    query, key, value = (_heads(part, head_size) for part in projected_BQH.chunk(3, dim=-1))
    scale = 1 / math.sqrt(head_size) if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= call.index + 1
    scores_NQK = query @ key.transpose(-1, -2) * scale
    weights_NQK = _softmax_of(scores_NQK, call.arguments["attention_mask"])
    output: Tensor = _joined(weights_NQK @ value) @ module.c_proj.weight + module.c_proj.bias
    return weights_NQK, output


def _rotate(vectors_NQA: Tensor, cos_QA: Tensor, sin_QA: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, equation 34), with halves instead of neighbours paired."""
    first, second = vectors_NQA.chunk(2, dim=-1)
    return vectors_NQA * cos_QA + torch.cat((-second, first), dim=-1) * sin_QA


def _llama(call: Call) -> tuple[Tensor, Tensor]:
    module, config = call.module, call.config
    head_size = module.head_dim
    hidden_BQH = call.arguments["hidden_states"]
    query = _heads(_linear(module.q_proj, hidden_BQH), head_size)
    key = _heads(_linear(module.k_proj, hidden_BQH), head_size)
    value = _heads(_linear(module.v_proj, hidden_BQH), head_size)
    if hasattr(module, "q_norm"):  # Qwen3 norms each head's queries and keys
        query, key = module.q_norm(query), module.k_norm(key)
    cos_BQA, sin_BQA = call.arguments["position_embeddings"]
    query, key = (_rotate(vectors, cos_BQA[0], sin_BQA[0]) for vectors in (query, key))
    repeats = config.num_attention_heads // config.num_key_value_heads
    key, value = (part.repeat_interleave(repeats, dim=0) for part in (key, value))
    scores_NQK = query @ key.transpose(-1, -2) / math.sqrt(head_size)
    weights_NQK = _softmax_of(scores_NQK, call.arguments["attention_mask"])
    return weights_NQK, _linear(module.o_proj, _joined(weights_NQK @ value))


def _bert(call: Call) -> tuple[Tensor, Tensor]:
    module, config = call.module, call.config
    head_size = config.hidden_size // config.num_attention_heads
    hidden_BQH = call.arguments["hidden_states"]
    inner = module.self
    query, key, value = (
        _heads(_linear(projection, hidden_BQH), head_size)
        for projection in (inner.query, inner.key, inner.value)
    )
    scores_NQK = query @ key.transpose(-1, -2) / math.sqrt(head_size)
    weights_NQK = _softmax_of(scores_NQK, call.arguments["attention_mask"])
    projected_BQH = _linear(module.output.dense, _joined(weights_NQK @ value))
    return weights_NQK, _layer_norm(module.output.LayerNorm, projected_BQH + hidden_BQH)


def _xlnet(call: Call) -> tuple[Tensor, Tensor]:
    """Content, position and segment scores (Yang et al. 2019, sections 2.4 and 2.5).

    XLNet keeps the batch after the positions: [Q, 1, H].
    """
    module = call.module
    hidden_QH = call.arguments["h"][:, 0]
    query, key, value = (
        torch.einsum("qh,hna->nqa", hidden_QH, weight) for weight in (module.q, module.k, module.v)
    )
    content_NQK = (query + module.r_w_bias[:, None]) @ key.transpose(-1, -2)

    # Row p of `r` is for the distance length - p, so query i finds key j in row length - i + j.
    length = len(hidden_QH)
    relative_NPA = torch.einsum("ph,hna->npa", call.arguments["r"][:, 0], module.r)
    by_row_NQP = (query + module.r_r_bias[:, None]) @ relative_NPA.transpose(-1, -2)
    places = torch.arange(length, device=hidden_QH.device)
    rows_QK = length - places[:, None] + places[None, :]
    position_NQK = by_row_NQP.gather(-1, rows_QK.expand(len(query), -1, -1))

    scores_NQK = content_NQK + position_NQK
    if (segments := call.arguments["seg_mat"]) is not None:
        by_segment_NQS = torch.einsum(
            "nqa,sna->nqs", query + module.r_s_bias[:, None], module.seg_embed
        )
        scores_NQK = scores_NQK + torch.einsum("qks,nqs->nqk", segments[:, :, 0], by_segment_NQS)
    scores_NQK = scores_NQK / math.sqrt(query.shape[-1])
    if (masked := call.arguments["attn_mask_h"]) is not None:  # [Q, K, 1, 1], 1 where hidden
        scores_NQK = scores_NQK - 1e30 * masked[:, :, 0, 0]
    weights_NQK = torch.softmax(scores_NQK, dim=-1)
    projected_QH = torch.einsum("nqa,hna->qh", weights_NQK @ value, module.o)
    return weights_NQK, _layer_norm(module.layer_norm, projected_QH + hidden_QH)[:, None]


def _t5(call: Call) -> tuple[Tensor, Tensor]:
    module, config = call.module, call.config
    hidden_BQH = call.arguments["hidden_states"]
    query, key, value = (
        _heads(_linear(projection, hidden_BQH), config.d_kv)
        for projection in (module.q, module.k, module.v)
    )
    places = torch.arange(hidden_BQH.shape[1], device=hidden_BQH.device)
    buckets_QK = _distance_buckets(
        places[None, :] - places[:, None],
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
    )
    bias_NQK = call.first.relative_attention_bias.weight[buckets_QK].permute(2, 0, 1)
    scores_NQK = query @ key.transpose(-1, -2) + bias_NQK
    weights_NQK = _softmax_of(scores_NQK, call.arguments["mask"])
    return weights_NQK, _linear(module.o, _joined(weights_NQK @ value))


def _distance_buckets(distances_QK: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance from query to key (Raffel et al. 2020, section 2.1).

    Half of the buckets are for keys after the query. Of each half, the first half is a bucket per
    distance, and the rest widen with the logarithm up to the largest distance.
    """
    half = num_buckets // 2
    exact = half // 2
    away_QK = distances_QK.abs()
    ratio_QK = torch.log(away_QK.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide_QK = (exact + (ratio_QK * (half - exact)).long()).clamp(max=half - 1)
    return (distances_QK > 0).long() * half + torch.where(away_QK < exact, away_QK, wide_QK)


def _linear(module: Any, values: Tensor) -> Tensor:
    return F.linear(values, module.weight, module.bias)


def _layer_norm(module: Any, values: Tensor) -> Tensor:
    return F.layer_norm(values, values.shape[-1:], module.weight, module.bias, module.eps)


_GPT2 = Equation(
    "gpt (GPT-2)",
    "softmax(Q K^T / sqrt(d_k) + causal mask) V W_o + b_o",
    lambda body: [block.attn for block in body.h],
    _gpt2,
)
_LLAMA = Equation(
    "gpt (Llama)",
    "softmax(rotate(Q) rotate(K)^T / sqrt(d_k) + causal mask) V W_o, grouped K and V repeated",
    lambda body: [block.self_attn for block in body.layers],
    _llama,
)
_BERT = Equation(
    "bert",
    "LayerNorm(X + softmax(Q K^T / sqrt(d_k)) V W_o + b_o)",
    lambda body: [block.attention for block in body.encoder.layer],
    _bert,
)
_XLNET = Equation(
    "xlnet",
    "LayerNorm(X + softmax(((Q + u) K^T + (Q + v) R^T + (Q + w) S^T) / sqrt(d_k)) V W_o), "
    "content, position R and segment S; content stream",
    lambda body: [block.rel_attn for block in body.layer],
    _xlnet,
)
_T5 = Equation(
    "t5",
    "softmax(Q K^T + B) V W_o, not scaled, position bias B from buckets of distances; encoder",
    lambda body: [block.layer[0].SelfAttention for block in body.encoder.block],
    _t5,
)

EQUATIONS: dict[str, Equation] = {
    "gpt2": _GPT2,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("bert", "electra", "roberta", "xlm-roberta", "camembert"), _BERT),
    "xlnet": _XLNET,
    **dict.fromkeys(("t5", "mt5"), _T5),
}
"""By `config.model_type`."""
