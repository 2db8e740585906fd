"""Ctrl-C and SIGTERM end a run after the current step, with its state saved."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from fulltune.runtime import Runtime


@dataclass
class Interruption:
    """Whether, and by which signal, the run was asked to stop."""

    signal_name: str | None = None


@contextmanager
def caught_signals() -> Generator[Interruption]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts at once."""
    interruption = Interruption()
    previous: dict[signal.Signals, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        interruption.signal_name = signal.Signals(number).name
        for name, handler in previous.items():
            signal.signal(name, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, request)
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def agreed(interruption: Interruption, runtime: Runtime) -> bool:
    """Whether any rank was asked to stop: all ranks must leave after the same step."""
    asked = interruption.signal_name is not None
    if runtime.world_size == 1:
        return asked
    flag = torch.tensor(int(asked), device=runtime.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
