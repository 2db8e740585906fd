"""What one rank does or finds wrong, all ranks hear of: none waits for one that has left."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from fulltune.errors import FulltuneError
from fulltune.runtime import Runtime

T = TypeVar("T")


class OtherRankError(FulltuneError):
    """The error of another rank, with its message, hint and exit code."""

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def patient_group(runtime: Runtime) -> dist.ProcessGroup | None:
    """A group of all ranks that wait for each other for days and not for half an hour.

    Every rank must ask for it at the same place.
    """
    if runtime.world_size == 1:
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    return group


def on_all_ranks(
    runtime: Runtime, action: Callable[[], T], *, group: dist.ProcessGroup | None = None
) -> T:
    """Do something on every rank that may fail on one; where it does, every rank fails.

    No rank goes on before all have done it. ``action`` must not itself wait for other ranks.

    Args:
        runtime: the ranks.
        action: what to do.
        group: through which the ranks wait; None is the one they train through.

    Raises:
        OtherRankError: ``action`` failed on another rank; that one raises its own error.
    """
    if runtime.world_size == 1:
        return action()
    failure: tuple[str, str | None, int] | None = (
        f"rank {runtime.rank} failed", "what it printed says how", 1,
    )  # fmt: skip
    try:
        result = action()
        failure = None
    except FulltuneError as error:
        failure = (str(error), error.hint, error.exit_code)
        raise
    finally:
        failures: list[tuple[str, str | None, int] | None] = [None] * runtime.world_size
        dist.all_gather_object(failures, failure, group=group)
        first = next((found for found in failures if found is not None), None)
        if failure is None and first is not None:
            message, hint, exit_code = first
            raise OtherRankError(message, hint=hint, exit_code=exit_code)
    return result


def on_main_rank(
    runtime: Runtime, action: Callable[[], T], *, group: dist.ProcessGroup | None = None
) -> T | None:
    """Do something on the first rank only, while the others wait; they get None."""
    return on_all_ranks(runtime, lambda: action() if runtime.is_main else None, group=group)


def main_rank_first(runtime: Runtime, action: Callable[[], T]) -> T:
    """Do something on the first rank, and then on the others, which find in the cache what it made.

    Transformers writes models on the first rank alone.
    """
    done = on_main_rank(runtime, action)
    return on_all_ranks(runtime, lambda: action() if done is None else done)


def from_main_rank(runtime: Runtime, value: T) -> T:
    """What the first rank has under the same name: a measurement must not divide the ranks."""
    if runtime.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all_ranks(runtime: Runtime, value: T) -> list[T]:
    """What every rank has under the same name, in the order of the ranks."""
    if runtime.world_size == 1:
        return [value]
    values: list[T] = [value] * runtime.world_size
    dist.all_gather_object(values, value)
    return values
