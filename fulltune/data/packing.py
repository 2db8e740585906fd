"""Which examples share a micro-batch: best-fit packing, or groups of like length for padding.

Both take lengths in tokens and return positions into that array; they are deterministic, so that
every rank computes the same cut without talking.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def pack(lengths: npt.NDArray[np.integer], capacity: int) -> list[IntArray]:
    """Best-fit decreasing: the longest example first, each into the fullest bin that holds it.

    No two bins could be one, and the number of bins is at most 11/9 of the optimum plus a
    constant. Time is O(n log n).

    Args:
        lengths: tokens of each example, int [N].
        capacity: most tokens of a bin. An example longer than this has a bin of its own, which is
            then the only kind of bin above the capacity.

    Returns:
        The positions in each bin, ascending; the bin of the longest example comes first.
    """
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}, not a positive number of tokens")
    bins: list[list[int]] = []
    bins_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of bins_by_room, ascending; never more than `capacity` of them
    for position in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[position])
        fit = bisect_left(rooms, length)
        if fit == len(rooms):
            room = capacity
            bin_number = len(bins)
            bins.append([])
        else:
            room = rooms[fit]
            bin_number = bins_by_room[room].pop()
            if not bins_by_room[room]:
                del bins_by_room[room]
                del rooms[fit]
        bins[bin_number].append(position)
        left = room - length
        if left > 0:
            if left not in bins_by_room:
                bins_by_room[left] = []
                insort(rooms, left)
            bins_by_room[left].append(bin_number)
    return [np.array(sorted(members), dtype=np.int64) for members in bins]


def group_by_length(lengths: npt.NDArray[np.integer], *, token_budget: int) -> list[IntArray]:
    """Batches of like length for models that cannot pack, so that padding is little.

    Args:
        lengths: tokens of each example, int [N].
        token_budget: most tokens of a batch with its padding, longest length times count. An
            example longer than this has a batch of its own.

    Returns:
        The positions in each batch, the longest example first.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}, not a positive number of tokens")
    order = np.argsort(-lengths.astype(np.int64), kind="stable").astype(np.int64)
    batches: list[IntArray] = []
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        stop = start + max(token_budget // longest, 1)
        batches.append(order[start:stop])
        start = stop
    return batches
