"""Attention of packed documents on a CPU: like lengths go together, results fill one row.

Shape suffixes: T tokens of the row, H heads, K key/value heads, G heads per key/value head,
D size of a head, B documents of one group, L longest document of that group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulltune.models import attention_products
from fulltune.models.document_groups import Group, expand_heads, reduced_dtype
from fulltune.models.dropout import KeepMasks, draw_seed

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# The bf16 backward kernel took 4.9 times as long as the float32 one at 30 tokens, 3.3 at 100,
# 1.5 at 200, 1.07 at 400 and 0.6 at 1024 (Zen 4, one thread); float32 is also closer to the truth.
_FLOAT32_BACKWARD_UP_TO = 400


class DocumentAttention(torch.autograd.Function):
    """Attention of each document of a row with itself, written into one row.

    Saves the unexpanded inputs, the output (which the next projection saves too) and, for documents
    that go through the fused kernels, one number per token and head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        groups: tuple[Group, ...],
        causal: bool,
        scale: float,
        dropout: float = 0.0,
    ) -> Tensor:
        """The mixed values [1, T, H, D]; arguments as those of `attend`."""
        num_heads, num_tokens, size = query.shape[1:]
        inputs = (query[0], expand_heads(key, num_heads)[0], expand_heads(value, num_heads)[0])
        out_THD = query.new_empty(num_tokens, num_heads, size)
        log_sums: list[Tensor] = []
        seed = draw_seed() if dropout else 0
        masks = KeepMasks(dropout, seed)
        for group in groups:
            taken = [group.take(states) for states in inputs]
            if attention_products.are_chosen(group, dropout):
                out_BHLD = attention_products.mix(
                    group, *taken, causal=causal, scale=scale, masks=masks
                )
            else:
                bias = None if group.bias is None else group.bias.to(query.dtype)
                out_BHLD, log_sums_BHL = _forward_kernel(
                    *taken, 0.0, causal and group.bias is None, attn_mask=bias, scale=scale
                )
                log_sums.append(log_sums_BHL)
            group.put(out_THD, out_BHLD.transpose(1, 2))
        out = out_THD[None]
        ctx.save_for_backward(query, key, value, out, *log_sums)
        ctx.settings = groups, causal, scale, dropout, seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of query, key and value."""
        query, key, value, out, *log_sums = ctx.saved_tensors
        groups, causal, scale, dropout, seed = ctx.settings
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        inputs = (
            grad_out[0].transpose(0, 1),
            query[0],
            expand_heads(key, num_heads)[0],
            expand_heads(value, num_heads)[0],
            out[0].transpose(0, 1),
        )
        num_tokens, size = query.shape[2:]
        grad_query_THD = query.new_empty(num_tokens, num_heads, size)
        grad_key_TKD = query.new_empty(num_tokens, num_kv_heads, size)
        grad_value_TKD = query.new_empty(num_tokens, num_kv_heads, size)
        masks = KeepMasks(dropout, seed)
        next_log_sums = iter(log_sums)
        for group in groups:
            taken = [group.take(states) for states in inputs]
            if group.fill is not None:
                # Fill has no gradient; what was gathered there belongs to the last token.
                taken[0] = taken[0].masked_fill(group.fill[:, None, :, None], 0.0)
            if attention_products.are_chosen(group, dropout):
                grads = attention_products.mix_backward(
                    group, *taken, causal=causal, scale=scale, masks=masks
                )
            else:
                short = group.length <= _FLOAT32_BACKWARD_UP_TO
                dtype = reduced_dtype(query.dtype) if short else query.dtype
                grads = _backward_kernel(
                    *(states.to(dtype) for states in taken),
                    next(next_log_sums),
                    0.0,
                    causal and group.bias is None,
                    attn_mask=None if group.bias is None else group.bias.to(dtype),
                    scale=scale,
                )
            group.put(grad_query_THD, grads[0].transpose(1, 2))
            for row, grad_BHLD in ((grad_key_TKD, grads[1]), (grad_value_TKD, grads[2])):
                grad_BLKGD = grad_BHLD.transpose(1, 2).unflatten(2, (num_kv_heads, -1))
                group.put(
                    row, grad_BLKGD.sum(3) if num_kv_heads < num_heads else grad_BLKGD[:, :, :, 0]
                )
        return (
            grad_query_THD[None].transpose(1, 2),
            grad_key_TKD[None].transpose(1, 2),
            grad_value_TKD[None].transpose(1, 2),
            *(None,) * 4,
        )
