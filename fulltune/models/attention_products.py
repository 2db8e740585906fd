"""Attention of like documents on a CPU by plain matrix products, with dropout where there is some.

torch's fused kernels for a CPU cannot drop weights, and its fallback for that keeps three matrices
of L x L numbers for each head and document. Here a few heads at a time are multiplied, and the
backward pass forms weights and masks again (as FlashAttention does: Dao et al. 2022, section 3.1,
with dropout as in its appendix B.4). For short documents this is also faster than the kernels.

Shape suffixes: B documents, H heads, L tokens of the longest document, D size of a head,
R rows of B * H that are computed together.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from fulltune.models.document_groups import Group, reduced_dtype, seen_pattern
from fulltune.models.dropout import KeepMasks, mask_

# Weights computed together: few enough to stay in a processor's cache, and so many that the calls
# cost little.
_ELEMENTS = 2**19
# oneDNN compiles and keeps a kernel for each shape of a bfloat16 product: only lengths that come
# again are worth it. Ragged documents are multiplied in float32, which needs no compiling.
_MULTIPLE_IN_BFLOAT16 = 64
# Without dropout, against the fused kernels at multiples of 64 (Zen 4, one thread, bfloat16): 0.9
# of their time at 64 tokens, 0.6 at 128, 0.75 at 256; ragged documents took 1.1 to 1.5 of it.
_FASTER_UP_TO = 512


def are_chosen(group: Group, dropout: float) -> bool:
    """Whether a group goes by plain products: the fused kernels cannot drop, or take more time."""
    is_faster = group.length % _MULTIPLE_IN_BFLOAT16 == 0 and group.length <= _FASTER_UP_TO
    return dropout > 0.0 or is_faster


def mix(
    group: Group,
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    *,
    causal: bool,
    scale: float,
    masks: KeepMasks,
) -> Tensor:
    """The values [B, H, L, D] mixed by ``dropout(softmax(scale * query @ key.T)) @ value``."""
    wide, narrow = _dtypes(group, query_BHLD.dtype)
    query_RLD, key_RLD = (states.to(wide).flatten(0, 1) for states in (query_BHLD, key_BHLD))
    value_RLD = value_BHLD.to(narrow).flatten(0, 1)
    out_RLD = torch.empty_like(value_RLD)
    query_RLD = query_RLD * scale
    for part, bias in _parts(group, query_BHLD.shape[1], causal, wide):
        weights_RLL = _weights(query_RLD[part], key_RLD[part], bias).to(narrow)
        mask_(weights_RLL, masks.next(weights_RLL.shape, narrow))
        torch.bmm(weights_RLL, value_RLD[part], out=out_RLD[part])
    return out_RLD.mul_(masks.scale).view(value_BHLD.shape)


def mix_backward(
    group: Group,
    grad_BHLD: Tensor,
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    out_BHLD: Tensor,
    *,
    causal: bool,
    scale: float,
    masks: KeepMasks,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; ``masks`` begins where `mix` found it."""
    wide, narrow = _dtypes(group, query_BHLD.dtype)
    # The mean over a query's keys of the weights' gradients; dropout does not change it.
    means_RL1 = (grad_BHLD.to(wide) * out_BHLD).sum(3, keepdim=True).flatten(0, 1)
    grad_RLD = (grad_BHLD * masks.scale).to(narrow).flatten(0, 1)
    query_RLD, key_RLD = (states.to(wide).flatten(0, 1) for states in (query_BHLD, key_BHLD))
    value_RLD = value_BHLD.to(narrow).flatten(0, 1)
    query_RLD = query_RLD * scale
    narrow_query_RLD, narrow_key_RLD = query_RLD.to(narrow), key_RLD.to(narrow)
    grad_query_RLD, grad_key_RLD, grad_value_RLD = (torch.empty_like(value_RLD) for _ in range(3))
    for part, bias in _parts(group, query_BHLD.shape[1], causal, wide):
        weights_RLL = _weights(query_RLD[part], key_RLD[part], bias)
        mask = masks.next(weights_RLL.shape, narrow)
        dropped_RLL = mask_(weights_RLL.to(narrow, copy=True), mask)
        torch.bmm(dropped_RLL.mT, grad_RLD[part], out=grad_value_RLD[part])
        grad_weights_RLL = torch.bmm(grad_RLD[part], value_RLD[part].mT)
        # The gradients of the scores are formed in the memory of the weights.
        weights_RLL.mul_(mask_(grad_weights_RLL, mask) - means_RL1[part])
        grad_scores_RLL = weights_RLL.to(narrow)
        torch.bmm(grad_scores_RLL, narrow_key_RLD[part], out=grad_query_RLD[part])
        torch.bmm(grad_scores_RLL.mT, narrow_query_RLD[part], out=grad_key_RLD[part])
    shape = value_BHLD.shape
    return (
        grad_query_RLD.mul_(scale).view(shape),
        grad_key_RLD.view(shape),
        grad_value_RLD.view(shape),
    )


def _dtypes(group: Group, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """That of the scores, and that of the other products."""
    wide = reduced_dtype(dtype)
    return wide, wide if group.length % _MULTIPLE_IN_BFLOAT16 else dtype


def _parts(
    group: Group, num_heads: int, causal: bool, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor | None]]:
    """Rows that are computed together, and what is added to their scores, [1 or R, L, L]."""
    num_rows = group.num_documents * num_heads
    step = max(1, _ELEMENTS // group.length**2)
    bias = None if group.bias is None else group.bias[:, 0].to(dtype)
    if bias is None and causal:
        bias = _causal_bias(group.length, dtype)
    for start in range(0, num_rows, step):
        part = slice(start, min(num_rows, start + step))
        if bias is None or len(bias) == 1:
            yield part, bias
        else:
            yield part, bias[torch.arange(part.start, part.stop) // num_heads]


@lru_cache(maxsize=64)
def _causal_bias(length: int, dtype: torch.dtype) -> Tensor:
    seen_LL = seen_pattern(length, causal=True, window=None)
    return torch.zeros(1, length, length, dtype=dtype).masked_fill_(~seen_LL, -torch.inf)


def _weights(query_RLD: Tensor, key_RLD: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.bmm(query_RLD, key_RLD.mT).softmax(2)
    return torch.baddbmm(bias, query_RLD, key_RLD.mT).softmax(2)
