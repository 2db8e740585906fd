"""Ctrl-C and SIGTERM end a run after the current step, with its state saved.

Once the last step is taken there is nothing left to save: the first signal is then answered by what
is still being done, and a second one stops that.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from fulltune.runtime import Runtime, is_main_process


@dataclass
class Interruption:
    """Whether, and by which signal, the run was asked to stop."""

    signal_name: str | None = None
    _answer: Callable[[str], None] | None = field(default=None, repr=False)

    def answer_from_now_on(self, answer: Callable[[str], None]) -> None:
        """Have a signal answered at once, by its name; one that has come already, now."""
        self._answer = answer
        if self.signal_name is not None:
            answer(self.signal_name)

    def request(self, signal_name: str) -> None:
        """Take note of the first signal."""
        self.signal_name = signal_name
        if self._answer is not None:
            # Not in the handler: what it interrupts may be in the middle of writing a line.
            threading.Thread(target=self._answer, args=(signal_name,), daemon=True).start()


@contextmanager
def caught_signals() -> Generator[Interruption]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts at once."""
    interruption = Interruption()
    previous: dict[signal.Signals, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        if interruption.signal_name is not None:
            # No exception: unwound through native code that has threads, it aborts the process.
            # What is half written now is what a killed process leaves, and is not read.
            if is_main_process():
                os.write(2, b"error: interrupted\n")
            os._exit(130)
        interruption.request(signal.Signals(number).name)

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
