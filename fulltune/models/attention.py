"""Attention that keeps packed documents apart, behind transformers' attention interface.

A packed micro-batch is one row ``[1, T]`` of whole documents, one after another, without padding.
`make_document_kwargs` says where they begin; transformers hands that through the model to every
attention layer, where `attend` reads it. Importing this module registers the implementation, and
``attn_implementation=IMPLEMENTATION`` selects it. Without document boundaries (generation, padded
batches) it is exactly transformers' ``sdpa``, so one model serves training and inference.

    cpu                    `DocumentAttention`: like lengths together
    cuda, bf16 or fp16     ``torch.nn.attention.varlen.varlen_attn``, one kernel for all
    everything else        ``scaled_dot_product_attention`` per document

Shape suffixes: T tokens of the row, H heads, K key/value heads, G heads per key/value head,
D size of a head, B documents of one group, L longest document of that group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from fulltune.errors import ModelError
from fulltune.models.document_attention import DocumentAttention
from fulltune.models.document_groups import expand_heads, plan_groups, seen_pattern

IMPLEMENTATION = "fulltune"

# Arguments that transformers passes on to attention and that do not change its result. A packed row
# refuses any other argument that is not None: a new kind of attention must fail, not be ignored.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "deterministic",
        "is_causal",
        "layer_idx",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "token_type_ids",
        "use_cache",
    }
)
# Of those that change the result, the ones that transformers' own sdpa leaves out or refuses.
_NOT_IN_SDPA = ("softcap", "s_aux")


def make_document_kwargs(lengths: Sequence[int], device: torch.device | str) -> dict[str, Any]:
    """Arguments of a model's forward that say where the documents of a packed row begin.

    Args:
        lengths: tokens of each document, in the order of the row.
        device: where the model is.

    Returns:
        ``position_ids`` int64 [1, T], 0 at each document's start; ``cu_seq_lens_q`` and
        ``cu_seq_lens_k`` int32 [documents + 1]; ``max_length_q`` and ``max_length_k``.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"every document needs at least one token, got lengths {list(lengths)}")
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    boundaries = boundaries.to(device)
    return {
        "position_ids": positions_T[None].to(device),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


# ---------------------------------------------------------------- masks


class DeferredMask:
    """A mask over a whole row that is only built where attention has no boundaries to go by.

    transformers sees in ``position_ids`` that a row is packed and would build a [T, T] mask.
    """

    def __init__(self, mask_function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self._mask_function = mask_function
        self._arguments = arguments
        self._verdicts: dict[tuple[Any, ...], bool] = {}
        self._dense: list[Tensor | None] = []

    def dense(self) -> Tensor | None:
        """The mask as ``sdpa`` would have got it."""
        if not self._dense:
            self._dense.append(sdpa_mask(mask_function=self._mask_function, **self._arguments))
        return self._dense[0]

    def is_pattern(self, boundaries: tuple[int, ...], *, causal: bool, window: int | None) -> bool:
        """Whether inside every document this is the plain causal, banded or full pattern.

        Asked once per forward pass and pattern; chunked or blockwise masks answer no.
        """
        key = (boundaries, causal, window)
        if key not in self._verdicts:
            device = self._arguments["device"]
            zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
            verdict = True
            for start, end in pairwise(boundaries):
                index_L = torch.arange(start, end, device=device)
                found = self._mask_function(
                    zero, zero, index_L[None, None, :, None], index_L[None, None, None, :]
                )
                expected = seen_pattern(end - start, causal=causal, window=window).to(device)
                verdict = verdict and bool((found == expected).all())
            self._verdicts[key] = verdict
        return self._verdicts[key]


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **arguments: Any,
) -> Tensor | DeferredMask | None:
    """What ``sdpa`` would get, but not built yet for an unpadded row (`DeferredMask`)."""
    arguments |= {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "attention_mask": attention_mask,
    }
    skipped = arguments.get("allow_is_causal_skip", True) or arguments.get(
        "allow_is_bidirectional_skip", False
    )
    never_dense = skipped and arguments.get("local_size") is None
    whole_row = (
        batch_size == 1
        and q_length == kv_length > 1
        and attention_mask is None
        and isinstance(q_offset, int)
        and q_offset == kv_offset == 0
        and not arguments.get("use_vmap", False)
    )
    if whole_row and not never_dense:
        return DeferredMask(mask_function, arguments)
    return sdpa_mask(mask_function=mask_function, **arguments)


# ---------------------------------------------------------------- the attention function


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | DeferredMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention layer; the signature is transformers'.

    Args:
        module: the attention module; its ``is_causal`` decides where ``is_causal`` is not given.
        query: [B, H, T, D].
        key: [B, K, T, D], with H a multiple of K.
        value: like ``key``.
        attention_mask: what `make_mask` returned.
        dropout: probability of dropping an attention weight.
        scaling: factor on the scores; one over the root of D if not given.
        is_causal: whether a token sees only itself and those before it.
        cu_seq_lens_q: int32 [documents + 1], where each document begins; B must then be 1.
        cu_seq_lens_k: the same tensor.
        max_length_q: the longest document.
        max_length_k: the same number.
        kwargs: ``sliding_window``, and arguments without effect; others are refused.

    Returns:
        The mixed values [B, T, H, D], and None for the weights, which are never formed.
    """
    for name in _NOT_IN_SDPA:
        if kwargs.get(name) is not None:
            raise ModelError(
                f"this model's attention needs `{name}`, which `{IMPLEMENTATION}` cannot compute",
                hint="load the model with `attn_implementation='eager'` and padded batches",
            )
    if cu_seq_lens_q is None:
        mask = (
            attention_mask.dense() if isinstance(attention_mask, DeferredMask) else attention_mask
        )
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal, **kwargs
        )

    window: int | None = kwargs.get("sliding_window")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    on_cuda = query.device.type == "cuda"
    fused_cuda = (
        on_cuda
        and not dropout
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1]
    )
    # Reading the boundaries back waits for the device, so the fused path only does it for a mask.
    if not fused_cuda or isinstance(attention_mask, DeferredMask):
        boundaries = tuple(cu_seq_lens_q.tolist())
    else:
        boundaries = ()
    _refuse_what_packing_cannot_honour(
        query, key, attention_mask, boundaries, causal=causal, window=window, kwargs=kwargs
    )

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if fused_cuda:
        longest = max_length_q if max_length_q is not None else query.shape[2]
        return _varlen(query, key, value, cu_seq_lens_q, longest, scale, causal, window), None
    if query.device.type == "cpu" and dropout < 1 and query.shape[-1] == value.shape[-1]:
        groups = plan_groups(boundaries, causal, window)
        return DocumentAttention.apply(query, key, value, groups, causal, scale, dropout), None
    return _per_document(query, key, value, boundaries, scale, dropout, causal, window), None


def _refuse_what_packing_cannot_honour(
    query: Tensor,
    key: Tensor,
    mask: Tensor | DeferredMask | None,
    boundaries: tuple[int, ...],
    *,
    causal: bool,
    window: int | None,
    kwargs: dict[str, Any],
) -> None:
    hint = "models of this type cannot be packed: `can_pack` in `models/families.py` should say so"
    for name, value in kwargs.items():
        # Output switches arrive as False where they are off.
        if name not in _WITHOUT_EFFECT and value is not None and value is not False:
            raise ModelError(f"attention over packed documents cannot honour `{name}`", hint=hint)
    num_tokens = query.shape[2]
    if query.shape[0] != 1 or key.shape[2] != num_tokens:
        raise ModelError(
            f"packed documents need one row and as many keys as queries, but the queries are "
            f"{list(query.shape)} and the keys {list(key.shape)}",
            hint=hint,
        )
    if boundaries and (boundaries[0] != 0 or boundaries[-1] != num_tokens):
        raise ModelError(
            f"`cu_seq_lens_q` runs from {boundaries[0]} to {boundaries[-1]}, but the row has "
            f"{num_tokens} tokens",
            hint="make it with `make_document_kwargs` from the lengths of all documents",
        )
    if isinstance(mask, DeferredMask):
        if not mask.is_pattern(boundaries, causal=causal, window=window):
            raise ModelError(
                "this model's attention pattern inside a document is neither causal, banded nor "
                "full, so its documents cannot be packed",
                hint=hint,
            )
    elif mask is not None:
        raise ModelError(
            "an attention mask was given together with packed documents, which need none",
            hint="leave out `attention_mask`; the document boundaries say what is seen",
        )


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    longest: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # CUDA only, and absent from some builds

    # The kernel counts the tokens on each side without the token itself; -1 is no limit.
    side = -1 if window is None else window - 1
    num_heads = query.shape[1]
    out_THD = varlen_attn(
        query[0].transpose(0, 1),
        # Heads are repeated here because the argument for grouped heads is newer than torch 2.11.
        expand_heads(key, num_heads)[0].transpose(0, 1),
        expand_heads(value, num_heads)[0].transpose(0, 1),
        cu_seq_lens,
        cu_seq_lens,
        longest,
        longest,
        scale=scale,
        window_size=(side, 0 if causal else side),
    )
    return cast("Tensor", out_THD)[None]


def _per_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: tuple[int, ...],
    scale: float,
    dropout: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    lengths = [end - start for start, end in pairwise(boundaries)]
    num_heads = query.shape[1]
    # The gradient of one split is one concatenation; slices would each fill a row with zeros.
    parts = zip(
        lengths,
        query.split(lengths, dim=2),
        expand_heads(key, num_heads).split(lengths, dim=2),
        expand_heads(value, num_heads).split(lengths, dim=2),
        strict=True,
    )
    outs = []
    for length, query_part, key_part, value_part in parts:
        banded = window is not None and length > window
        mask_LL = seen_pattern(length, causal=causal, window=window) if banded else None
        outs.append(
            F.scaled_dot_product_attention(
                query_part,
                key_part,
                value_part,
                attn_mask=None if mask_LL is None else mask_LL.to(query.device),
                dropout_p=dropout,
                is_causal=causal and mask_LL is None,
                scale=scale,
            )
        )
    return torch.cat(outs, dim=2).transpose(1, 2)


def _is_not_about_padding(record: logging.LogRecord) -> bool:
    return "since your input_ids may be padded" not in str(record.msg)


# Packed rows need no attention mask, and end in padding that their boundaries keep apart.
logging.getLogger("transformers.modeling_utils").addFilter(_is_not_about_padding)
AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, make_mask)
