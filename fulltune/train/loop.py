"""The training loop: it owns the order of things and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar

from fulltune.config import Quantity

T = TypeVar("T")
Ending: TypeAlias = Literal["finished", "interrupted", "stopped early", "given up"]
"""`stopped early` is an end with a result; `given up` has none, as whoever watched the run said."""


class Due(Protocol):
    """When something is done."""

    def due(self, step: int, *, last: bool) -> bool:
        """Whether it is time after ``step`` finished updates."""


@dataclass(frozen=True)
class Every:
    """A period in optimizer steps."""

    steps: int

    def due(self, step: int, *, last: bool) -> bool:
        """Whether it is time after ``step`` finished updates."""
        return last or step % self.steps == 0


@dataclass(frozen=True)
class EveryEpochs:
    """A period in epochs, whose steps may differ in number where a batch is counted in tokens."""

    epochs: float
    epochs_after: Callable[[int], float]
    """Epochs that are done after a number of steps."""

    def due(self, step: int, *, last: bool) -> bool:
        """Whether ``step`` is the one that reached another multiple of the period."""
        return last or self._periods(step) > self._periods(step - 1)

    def _periods(self, step: int) -> int:
        # A third of three steps is reached by the first, although 1/3 in binary is a little less.
        return math.floor(round(self.epochs_after(step) / self.epochs, 6))


def every(period: Quantity, epochs_after: Callable[[int], float]) -> Due:
    """The period of a setting, `100 steps` or `1 epoch`."""
    if period.unit == "steps":
        return Every(int(period.value))
    return EveryEpochs(period.value, epochs_after)


@dataclass
class Progress:
    """Finished updates; enters with more than 0 when a run is resumed."""

    step: int = 0


def fit(
    progress: Progress,
    step_fn: Callable[[T], None],
    batches: Iterator[T],
    *,
    num_steps: int,
    evaluate: Callable[[int], bool],
    evaluate_every: Due,
    save: Callable[[int], None],
    save_every: Due,
    interrupted: Callable[[], bool],
) -> Ending:
    """Take optimizer steps until ``progress.step`` is ``num_steps``.

    Args:
        progress: where to go on from; counts up.
        step_fn: one update from what ``batches`` yields; logs what it measured, raises where the
            loss is not finite.
        batches: the micro-batches of one step at a time.
        num_steps: updates of the whole run.
        evaluate: measures after a step; True asks to stop early.
        evaluate_every: when to evaluate.
        save: writes a checkpoint of the state after a step.
        save_every: when to save.
        interrupted: whether a signal asked to stop; the state is saved first.
    """
    while progress.step < num_steps:
        step_fn(next(batches))
        progress.step += 1
        last = progress.step == num_steps

        stop = evaluate(progress.step) if evaluate_every.due(progress.step, last=last) else False
        leave = interrupted() and not last
        if save_every.due(progress.step, last=last or stop or leave):
            save(progress.step)
        if stop and not last:
            return "stopped early"
        if leave:
            return "interrupted"
    return "finished"
