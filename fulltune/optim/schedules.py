"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

Schedule: TypeAlias = Literal["linear", "cosine", "wsd", "inverse_sqrt", "constant"]


def _linear(progress: float, decay: float, steps_past_warmup: int, warmup_steps: int) -> float:
    return 1.0 - progress


def _cosine(progress: float, decay: float, steps_past_warmup: int, warmup_steps: int) -> float:
    """Half a cosine (Loshchilov and Hutter, 2017, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _wsd(progress: float, decay: float, steps_past_warmup: int, warmup_steps: int) -> float:
    """Warm up, stay, decay linearly over the last share ``decay`` (MiniCPM, Hu et al., 2024)."""
    return min(1.0, (1.0 - progress) / decay)


def _inverse_sqrt(
    progress: float, decay: float, steps_past_warmup: int, warmup_steps: int
) -> float:
    """Falls with the root of the step (Vaswani et al., 2017), continuous at the end of warmup."""
    start = max(warmup_steps, 1)
    return math.sqrt(start / (start + steps_past_warmup))


def _constant(progress: float, decay: float, steps_past_warmup: int, warmup_steps: int) -> float:
    return 1.0


SCHEDULES: dict[Schedule, Callable[[float, float, int, int], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "constant": _constant,
}


def lr_factor(
    schedule: Schedule,
    step: int,
    *,
    num_steps: int,
    warmup_steps: int,
    decay: float = 0.2,
    floor: float = 0.0,
) -> float:
    """The factor on the peak learning rate for the update that follows ``step`` finished ones.

    Args:
        schedule: its name.
        step: finished updates, 0 before the first.
        num_steps: updates of the whole run.
        warmup_steps: updates over which the rate rises linearly from nearly zero.
        decay: share of all steps in which `wsd` decays.
        floor: the factor is scaled to end here and not at zero; `constant` and `inverse_sqrt`
            never fall below it.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    past = step - warmup_steps
    length = max(num_steps - warmup_steps, 1)
    progress = min(past / length, 1.0)
    share = max(decay * num_steps / length, 1e-12)
    factor = SCHEDULES[schedule](progress, min(share, 1.0), past, warmup_steps)
    if schedule in ("constant", "inverse_sqrt"):
        return max(factor, floor)
    return floor + (1.0 - floor) * factor
