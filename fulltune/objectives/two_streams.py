"""XLNet's two streams on a batch: the query stream's states, with memories and reading directions.

Shape suffixes: B rows, L tokens of a window, P places for targets in a row, M tokens of memory,
H hidden size, G rows of one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulltune.errors import ModelError
from fulltune.objectives.base import Batch
from fulltune.objectives.permutation_windows import TEXT_SEGMENT

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def query_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states of the query stream: [B, P, H]; places without a target mean nothing.

    Args:
        model: an XLNet, with any head.
        batch: see `PermutationBatch`.
    """
    masks = {name: batch[name].to(model.dtype) for name in ("perm_mask", "target_mapping")}
    backward_B = batch.get("backward")
    if "groups" not in batch:
        inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        with _positions(model, backward_B):
            output = model.base_model(**inputs, **masks, use_mems=False)
        states_BPH: Tensor = output.last_hidden_state
        return states_BPH
    # transformers lets every token see every place of the memory, padding too, and counts
    # distances over padding between memory and window: so only rows of like lengths run together.
    parts: list[Tensor] = []
    for group in batch["groups"]:
        rows, start = group["rows"], batch["input_ids"].shape[1] - group["length"]
        with _positions(model, None if backward_B is None else backward_B[rows]):
            output = model.base_model(
                input_ids=batch["input_ids"][rows, start:],
                token_type_ids=batch["token_type_ids"][rows, start:],
                perm_mask=masks["perm_mask"][rows, start:, start:],
                target_mapping=masks["target_mapping"][rows, :, start:],
                mems=_memory(model, batch["memory_ids"][rows], group["memory_length"]),
                use_mems=False,
            )
        parts.append(output.last_hidden_state)
    order = [row for group in batch["groups"] for row in group["rows"]]
    return torch.cat(parts)[torch.tensor(order, device=parts[0].device).argsort()]


@torch.no_grad()
def _memory(model: PreTrainedModel, ids_GM: Tensor, length: int) -> list[Tensor] | None:
    """What each layer would read of the tokens before the windows: per layer [M, G, H]."""
    if not length:
        return None
    ids_GM = ids_GM[:, ids_GM.shape[1] - length :]
    segments_GM = torch.full_like(ids_GM, TEXT_SEGMENT)
    output = model.base_model(input_ids=ids_GM, token_type_ids=segments_GM, use_mems=True)
    return list(output.mems)


@contextmanager
def _positions(model: PreTrainedModel, backward_B: Tensor | None) -> Iterator[None]:
    """Hand each layer its positions in the dtype of its weights, and turned round where asked.

    With one stream transformers casts them itself; with two it multiplies float32 positions by
    weights of any dtype, which torch refuses.

    The position of a distance d is ``[sin(d / c) ..., cos(d / c) ...]``, so that of -d has the
    opposite sines. With this a text that is read from its end keeps the distances that it has when
    it is read from its beginning, as in the authors' `bi_data`; transformers' own flag of that name
    takes one half of each batch for it, whichever rows they are.
    """

    def own(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positions_PBH = kwargs["r"]
        if backward_B is not None:
            signs_BH = torch.ones(positions_PBH.shape[1:], device=positions_PBH.device)
            signs_BH[backward_B, : signs_BH.shape[1] // 2] = -1
            positions_PBH = positions_PBH * signs_BH
        return args, {**kwargs, "r": positions_PBH.to(layer.rel_attn.r.dtype)}

    layers: Any = model.base_model.layer
    hooks = [layer.register_forward_pre_hook(own, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def require_xlnet(model: PreTrainedModel, batch: Batch) -> None:
    """See that a model can run a batch.

    Raises:
        ModelError: it is no XLNet, or its config would change what it sees or remembers.
    """
    config = model.config
    if config.model_type != "xlnet":
        raise ModelError(
            f"models of type `{config.model_type}` have no query stream to predict from",
            hint="use an XLNet; `convert_to: xlnet` of `fulltune pretrain` makes one of a BERT",
        )
    if config.attn_type != "bi" or config.bi_data:
        raise ModelError(
            f"this XLNet has `attn_type: {config.attn_type}` and `bi_data: {config.bi_data}` in "
            "config.json, with which tokens do not see what the order of prediction lets them see",
            hint="set `attn_type` to `bi` and `bi_data` to false",
        )
    longest = max((group["memory_length"] for group in batch.get("groups", ())), default=0)
    for name in ("mem_len", "reuse_len"):
        limit = getattr(config, name)
        if limit and limit < longest:
            raise ModelError(
                f"a memory of {longest:,} tokens is asked for, but `{name}` in config.json lets "
                f"the model keep {limit:,}",
                hint=f"set `{name}` to null, or lower `memory_length`",
            )
