"""Which documents of a packed row go through attention together on a CPU.

Shape suffixes: T tokens of the row, H heads, K key/value heads, D size of a head,
B documents of one group, L longest document of that group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


def seen_pattern(length: int, *, causal: bool, window: int | None) -> Tensor:
    """Which keys [L queries, L keys] a document's tokens see; a window counts the token itself."""
    index_L = torch.arange(length)
    distance_LL = index_L[:, None] - index_L[None, :]
    seen_LL = distance_LL >= 0 if causal else torch.ones_like(distance_LL, dtype=torch.bool)
    if window is not None:
        seen_LL = seen_LL & (distance_LL.abs() < window)
    return seen_LL


def expand_heads(states_BKTD: Tensor, num_heads: int) -> Tensor:
    """Repeats each key/value head for the query heads that share it."""
    num_groups = num_heads // states_BKTD.shape[1]
    if num_groups == 1:
        return states_BKTD
    return states_BKTD.repeat_interleave(num_groups, dim=1)


def reduced_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores are formed and summed; never bfloat16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Group:
    """Documents that share one kernel call.

    A single document is a slice of the row. Several are gathered as [B, L], shorter ones filled up
    with their own last token: a causal document never sees its fill, another needs ``bias``.
    """

    start: int
    end: int
    num_documents: int
    length: int
    gathered: Tensor | None
    """int64 [B * L], the row's token at each place; None for a single document."""
    real: Tensor | None
    """int64, places in B * L that are not fill; None if there is no fill."""
    tokens: Tensor | None
    """int64, the row's tokens at ``real``."""
    fill: Tensor | None
    """bool [B, L], true at fill; None if there is none."""
    bias: Tensor | None
    """float32 [1 or B, 1, L, L], minus infinity where a query must not look."""

    def take(self, states_HTD: Tensor) -> Tensor:
        """[H, T, D] to [B, H, L, D]."""
        if self.gathered is None:
            return states_HTD[None, :, self.start : self.end]
        taken: Tensor = states_HTD.index_select(1, self.gathered)
        taken = taken.unflatten(1, (self.num_documents, self.length)).transpose(0, 1)
        return taken

    def put(self, row: Tensor, states: Tensor) -> None:
        """Writes [B, L, ...] to its place in a row [T, ...], without the fill."""
        if self.tokens is None:
            row[self.start : self.end].copy_(states[0])
            return
        flat = states.flatten(0, 1)
        if self.real is not None:
            flat = flat.index_select(0, self.real)
        row.index_copy_(0, self.tokens, flat.to(row.dtype))


# Long documents keep the kernels busy alone; for short ones the calls themselves cost more than the
# arithmetic, and up to this much of a group may be fill.
_GROUPED_UP_TO = 128
_SHORTEST_SHARE = 0.85


@lru_cache(maxsize=4)
def plan_groups(boundaries: tuple[int, ...], causal: bool, window: int | None) -> tuple[Group, ...]:
    """Which documents share a kernel call; the layers of one forward pass share the plan."""
    documents = sorted(pairwise(boundaries), key=lambda ends: ends[0] - ends[1])
    shared: list[list[tuple[int, int]]] = []
    for start, end in documents:
        length = end - start
        if shared:
            longest = shared[-1][0][1] - shared[-1][0][0]
            like = length == longest or longest <= _GROUPED_UP_TO
            if like and length >= _SHORTEST_SHARE * longest and longest <= 2 * _GROUPED_UP_TO:
                shared[-1].append((start, end))
                continue
        shared.append([(start, end)])
    return tuple(_group(documents, causal, window) for documents in shared)


def _group(documents: list[tuple[int, int]], causal: bool, window: int | None) -> Group:
    starts_B = torch.tensor([start for start, _ in documents])
    lengths_B = torch.tensor([end - start for start, end in documents])
    length = int(lengths_B.max())
    banded = window is not None and length > window
    filled = bool((lengths_B < length).any())
    place_L = torch.arange(length)

    seen = seen_pattern(length, causal=causal, window=window)[None, None] if banded else None
    if filled and not causal:
        is_key = (place_L < lengths_B[:, None])[:, None, None, :]
        # A fill query still looks at something: an empty row would be 0 / 0.
        seen = is_key.expand(-1, -1, length, -1) if seen is None else seen & is_key
        seen = seen | (place_L >= lengths_B[:, None])[:, None, :, None]
    bias = None
    if seen is not None:
        bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)

    if len(documents) == 1:
        start, end = documents[0]
        return Group(start, end, 1, length, None, None, None, None, bias)
    gathered = starts_B[:, None] + torch.minimum(place_L, lengths_B[:, None] - 1)
    is_fill = place_L >= lengths_B[:, None]
    is_real = ~is_fill.flatten()
    return Group(
        start=0,
        end=0,
        num_documents=len(documents),
        length=length,
        gathered=gathered.flatten(),
        real=is_real.nonzero()[:, 0] if filled else None,
        tokens=gathered.flatten()[is_real],
        fill=is_fill if filled else None,
        bias=bias,
    )
