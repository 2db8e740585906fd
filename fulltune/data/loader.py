"""The order of examples: shuffled by seed and epoch, cut into steps, shared by ranks, resumable.

Steps come first, packing second. The examples of a step follow from (seed, epoch, examples, batch)
alone; ranks and micro-batches only divide them. So neither a memory plan nor a number of ranks
changes what is learned, and a run may resume on other hardware at the same place.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Generic, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt

from fulltune.config import Quantity
from fulltune.data.packing import IntArray, group_by_length, pack
from fulltune.errors import CheckpointError, ConfigError, DataError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """The next step to be taken."""

    epoch: int
    step_in_epoch: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step as this rank does it.

    micro_batches: positions in the data set, one array per forward pass of this rank. May be empty
                   where a step has fewer examples than there are ranks.
    num_examples:  of the step, over all ranks.
    num_tokens:    of the step, over all ranks, without padding.
    """

    micro_batches: list[IntArray]
    num_examples: int
    num_tokens: int
    epoch: int
    step_in_epoch: int


class Loader:
    """Plans of the steps, without end, from the place where training stands.

    An epoch is cut into whole steps; its last step holds what is left and may be short. No example
    is dropped or repeated within an epoch.

    Iterating does not move the place, because plans may be drawn ahead by a thread. `advance` does,
    once a step has been taken; `state` is therefore always exact.

    Args:
        lengths: tokens of every example of the data set, int [N].
        indices: the examples of this split, positions in the data set.
        batch: what a step consumes over all ranks, ``64 examples`` or ``32768 tokens``. A step of
            tokens holds whole examples until the next one would exceed the amount; an example
            longer than the amount is a step of its own.
        micro_batch_tokens: most tokens of a forward pass, with padding where there is some. An
            example longer than that has a forward pass of its own.
        seed: of the shuffling.
        packing: whether examples are laid one after another in a row, or padded to like length.
        rank: this process.
        world_size: number of processes that share a step.
        shuffle: whether each epoch has its own order; otherwise it is that of `indices`.
        dataset_fingerprint: identifies the content of the data set, so that resuming with changed
            text of the same lengths is refused too.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.integer],
        indices: npt.NDArray[np.integer],
        *,
        batch: Quantity,
        micro_batch_tokens: int,
        seed: int,
        packing: bool,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        dataset_fingerprint: str = "",
    ) -> None:
        if len(indices) == 0:
            raise DataError(
                "there is no example to train on",
                hint="check that the data is not empty and that not all of it is held out",
            )
        if batch.unit not in ("tokens", "examples") or batch.value < 1:
            raise ConfigError(
                f"a batch of `{batch}` is no step",
                hint="write a number of tokens or examples, such as `32768 tokens`",
            )
        if micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens is {micro_batch_tokens}, not positive")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, not one of {world_size}")
        self._indices = np.asarray(indices, dtype=np.int64)
        self._lengths = np.asarray(lengths)[self._indices].astype(np.int64)
        self.batch = batch
        self.micro_batch_tokens = micro_batch_tokens
        self.packing = packing
        self.rank = rank
        self.world_size = world_size
        self.place = Place(epoch=0, step_in_epoch=0)
        self._seed = seed
        self._shuffle = shuffle
        self._identity = {
            "seed": seed,
            "batch": str(batch),
            "shuffle": shuffle,
            "num_examples": len(self._indices),
            "examples": _fingerprint(dataset_fingerprint, self._indices, self._lengths),
        }
        self._num_steps_by_epoch: dict[int, int] = {}
        self._epoch_ends = [0]

    @property
    def num_examples(self) -> int:
        """Examples of an epoch."""
        return len(self._indices)

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch, without padding."""
        return int(self._lengths.sum())

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Steps of an epoch; with a batch in tokens they vary a little with the order."""
        if self.batch.unit == "examples" or not self._shuffle:
            epoch = 0  # the same number in all epochs
        if epoch not in self._num_steps_by_epoch:
            self._num_steps_by_epoch[epoch] = len(self._cut(self._order(epoch))) - 1
        return self._num_steps_by_epoch[epoch]

    def epochs_after(self, step: int) -> float:
        """Epochs that are done after a number of steps from the beginning."""
        if self.batch.unit == "examples" or not self._shuffle:
            return step / self.steps_per_epoch()
        while self._epoch_ends[-1] <= step:
            next_epoch = len(self._epoch_ends) - 1
            self._epoch_ends.append(self._epoch_ends[-1] + self.steps_per_epoch(next_epoch))
        epoch = bisect.bisect_right(self._epoch_ends, step) - 1
        return epoch + (step - self._epoch_ends[epoch]) / self.steps_per_epoch(epoch)

    def steps_until(self, tokens: int, epoch: int) -> int:
        """Steps of an epoch until that many of its tokens have been seen."""
        order = self._order(epoch)
        seen = np.cumsum(self._lengths[order])[np.array(self._cut(order)[1:]) - 1]
        return int(np.searchsorted(np.append(0, seen), tokens, side="left"))

    def __iter__(self) -> Iterator[StepPlan]:
        """The plans from `place` on, epoch after epoch, without end."""
        epoch, first = self.place.epoch, self.place.step_in_epoch
        while True:
            order = self._order(epoch)
            starts = self._cut(order)
            for step in range(first, len(starts) - 1):
                yield self._plan(order[starts[step] : starts[step + 1]], Place(epoch, step))
            epoch, first = epoch + 1, 0

    def advance(self, plan: StepPlan) -> None:
        """Move the place past a step that has been taken."""
        if Place(plan.epoch, plan.step_in_epoch) != self.place:
            raise ValueError(
                f"step {plan.step_in_epoch} of epoch {plan.epoch} is not the next one, {self.place}"
            )
        step = plan.step_in_epoch + 1
        last = step == self.steps_per_epoch(plan.epoch)
        self.place = Place(plan.epoch + 1, 0) if last else Place(plan.epoch, step)

    def state(self) -> dict[str, Any]:
        """The place and what it is a place in; small, and plain JSON."""
        return {**self._identity, **asdict(self.place)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a saved place. Micro-batches, packing and ranks may differ from those of the save.

        Raises:
            CheckpointError: the place is one in other data, or in another order of it.
        """
        differing = [
            f"{_NAMES[key]} was `{state.get(key)}` and is now `{value}`"
            for key, value in self._identity.items()
            if state.get(key) != value
        ]
        if differing:
            raise CheckpointError(
                f"the checkpoint's place in the data does not fit: {'; '.join(differing)}",
                hint="resume with the data, seed and batch of the run, or start a new run",
            )
        epoch, step = state.get("epoch"), state.get("step_in_epoch")
        if not (_is_count(epoch) and _is_count(step) and step < self.steps_per_epoch(epoch)):
            raise CheckpointError(
                f"the checkpoint's place in the data, step `{step}` of epoch `{epoch}`, is none",
                hint="the checkpoint is damaged; resume from an earlier one",
            )
        self.place = Place(epoch, step)

    def _order(self, epoch: int) -> IntArray:
        """Positions in `_indices`, in the order of the epoch."""
        if not self._shuffle:
            return np.arange(len(self._indices), dtype=np.int64)
        # Sorting raw bits: numpy keeps those the same over its versions, unlike permutation().
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
        return np.argsort(bits.random_raw(len(self._indices)), kind="stable").astype(np.int64)

    def _cut(self, order: IntArray) -> list[int]:
        """Where each step starts in the order, and the end."""
        if self.batch.unit == "examples":
            return [*range(0, len(order), int(self.batch.value)), len(order)]
        ends = np.cumsum(self._lengths[order])
        starts = [0]
        while starts[-1] < len(order):
            start = starts[-1]
            limit = (ends[start - 1] if start else 0) + int(self.batch.value)
            stop = int(np.searchsorted(ends, limit, side="right"))
            starts.append(max(stop, start + 1))
        return starts

    def _plan(self, members: IntArray, place: Place) -> StepPlan:
        shares = _share(self._lengths[members], self.world_size)
        own = self._micro_batches(members[shares[self.rank]])
        return StepPlan(
            micro_batches=[self._indices[positions] for positions in own],
            num_examples=len(members),
            num_tokens=int(self._lengths[members].sum()),
            epoch=place.epoch,
            step_in_epoch=place.step_in_epoch,
        )

    def _micro_batches(self, members: IntArray) -> list[IntArray]:
        lengths = self._lengths[members]
        if self.packing:
            cut = pack(lengths, self.micro_batch_tokens)
        else:
            cut = group_by_length(lengths, token_budget=self.micro_batch_tokens)
        return [members[positions] for positions in cut]


def num_steps(duration: Quantity, loader: Loader) -> int:
    """Optimizer steps of a duration, from the beginning; at least one.

    A fraction of an epoch is rounded up to a whole step, and tokens to the step that reaches them.
    """
    if not (math.isfinite(duration.value) and duration.value > 0):
        raise ConfigError(
            f"a duration of `{duration}` has no step",
            hint="write how long to train, such as `3 epochs`",
        )
    if duration.unit == "steps":
        return int(duration.value)
    if duration.unit == "epochs":
        whole = math.floor(duration.value)
        # 0.3 epochs of 10 steps are 3 of them, although 0.3 in binary is a little more.
        part = (duration.value - whole) * loader.steps_per_epoch(whole)
        rest = math.ceil(round(part, 6))
    else:
        whole, tokens = divmod(math.ceil(duration.value), loader.num_tokens)
        rest = loader.steps_until(tokens, whole)
    return max(sum(loader.steps_per_epoch(epoch) for epoch in range(whole)) + rest, 1)


def _share(lengths: IntArray, world_size: int) -> list[IntArray]:
    """Each example to one rank: the longest first, always to the rank with the fewest tokens."""
    if world_size == 1:
        return [np.arange(len(lengths), dtype=np.int64)]
    members: list[list[int]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for position in np.argsort(-lengths, kind="stable").tolist():
        rank = tokens.index(min(tokens))
        members[rank].append(position)
        tokens[rank] += int(lengths[position])
    return [np.array(sorted(positions), dtype=np.int64) for positions in members]


_NAMES = {
    "seed": "the seed",
    "batch": "the batch",
    "shuffle": "shuffling",
    "num_examples": "the number of examples",
    "examples": "the fingerprint of the examples",
}


def _fingerprint(dataset_fingerprint: str, indices: IntArray, lengths: IntArray) -> str:
    digest = hashlib.sha256(dataset_fingerprint.encode())
    digest.update(indices.astype("<i8").tobytes())
    digest.update(lengths.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and value >= 0


class Prefetcher(Iterator[T], Generic[T]):
    """Items of an iterator, made ahead by a thread. Close it, or use it in a ``with`` block.

    An error of the iterator is raised where its item would have come, after the items before it.
    """

    def __init__(self, iterator: Iterator[T], depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}, not a positive number of items")
        self._iterator = iterator
        self._depth = depth
        self._items: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = False  # by the iterator's end, its error, or close()
        self._changed = threading.Condition()
        # A daemon: a second Ctrl-C, which skips close(), must still end the process.
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        """Itself; a prefetcher is gone through once."""
        return self

    def __next__(self) -> T:
        """The next item, as soon as it is ready."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended)
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            raise StopIteration

    def close(self) -> None:
        """Stop the thread once its item at hand is made, and forget what was made ahead."""
        with self._changed:
            self._ended = True
            self._error = None
            self._items.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _fill(self) -> None:
        error: BaseException | None = None
        try:
            while not self._ended:
                item = next(self._iterator)
                with self._changed:
                    self._changed.wait_for(lambda: self._ended or len(self._items) < self._depth)
                    if not self._ended:
                        self._items.append(item)
                        self._changed.notify_all()
                del item
        except StopIteration:
            pass
        except BaseException as caught:  # whatever it is, it belongs to the consumer
            error = caught
        with self._changed:
            if not self._ended:
                self._error = error
            self._ended = True
            self._changed.notify_all()


def prefetch(iterator: Iterator[T], depth: int) -> Prefetcher[T]:
    """Make up to `depth` items ahead while the consumer works on the last one.

    For a loader, whose place is that of the steps taken and not of the plans drawn::

        with prefetch((prepare(plan) for plan in loader), depth=2) as prepared:
            for step in prepared:
                train(step)
                loader.advance(step.plan)
    """
    return Prefetcher(iterator, depth)
