"""A learning-rate range test: a short run whose rate rises by the same ratio at every step.

Smith, 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3: the loss begins to
fall at a rate worth trying, and rises again from one that is too large. Here the lower end is the
rate at which a tenth of the whole fall is reached, and the upper end the rate of the lowest loss,
both of the smoothed course. A rate that falls over a whole run may begin higher than one that a
single sweep survives, and the sweep sees each rate for one step: so the upper end is never less
than ten times the lower one, as far as the given range reaches.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.config import Quantity, build_config
from fulltune.recipes import finetune
from fulltune.recipes.reference import add_reference
from fulltune.recipes.search_space import Choices, Range, Space, with_values
from fulltune.report.search_record import RangeTest
from fulltune.runtime import start_runtime
from fulltune.tracking import restore_numbers, to_json_text
from fulltune.train.health import NonFiniteError
from fulltune.train.interruption import caught_signals
from fulltune.train.run_folder import write_atomically
from fulltune.train.step import train_step

FILE = "range-test.json"
LR = "optimizer.lr"
NUM_STEPS = 100
HALF_WINDOW = NUM_STEPS // 20
"""Steps to both sides over which the loss is averaged."""
BROKEN_OFF = 3.0
"""Times the lowest smoothed loss, beyond which the run has diverged and ends."""
ONSET = 0.1
"""Share of the fall at which the lower end lies."""
LEAST_RATIO = 10.0


def run(base: Mapping[str, Any], space: Space) -> RangeTest:
    """Sweep the given range of `optimizer.lr`, all other settings at the middle of theirs.

    Args:
        base: the settings of all trials, with a `run_dir`, which is not made.
        space: what the trials vary, with a range of `optimizer.lr`.

    Raises:
        FulltuneError: what would stop a run before its first step.
    """
    given = space[LR]
    assert isinstance(given, Range)
    start = time.monotonic()
    config = _config(base, space, given)
    rates = [
        given.low * (given.high / given.low) ** (step / (NUM_STEPS - 1))
        for step in range(NUM_STEPS)
    ]
    metric = finetune.check_settings(config)
    runtime = start_runtime(config.device)
    losses: list[float] = []
    num_tokens = 0
    with finetune.display_of(runtime, title="range test", metric=metric) as display:
        trainer = finetune.assemble(config, None, metric, runtime, display)
        add_reference(trainer)
        display.num_steps = trainer.num_steps
        trainer.optimizer.factor = lambda step: rates[step] / given.high
        trainer.model.train()
        with caught_signals() as interruption, closing(trainer.batches()) as batches:
            for step in range(NUM_STEPS):
                _, micro_batches = next(batches)
                try:
                    result = train_step(
                        trainer.model,
                        trainer.objective,
                        micro_batches,
                        trainer.optimizer,
                        step,
                        runtime=runtime,
                        clip_norm=config.optimizer.clip_norm,
                        measure_rounding=False,
                    )
                except NonFiniteError:
                    break
                losses.append(result.loss)
                num_tokens += result.num_tokens
                display.progress("steps of the range test", step + 1, NUM_STEPS)
                recent = sum(losses[-2 * HALF_WINDOW :]) / len(losses[-2 * HALF_WINDOW :])
                if interruption.signal_name is not None:
                    raise KeyboardInterrupt
                if recent > BROKEN_OFF * min(smooth(losses)):
                    break
    low, high, verdict = judge(rates, losses, given)
    return RangeTest(
        rates=tuple(rates[: len(losses)]),
        losses=tuple(losses),
        smoothed=tuple(smooth(losses)),
        low=low,
        high=high,
        given=str(given),
        verdict=verdict,
        seconds=time.monotonic() - start,
        tokens=num_tokens,
    )


def _config(base: Mapping[str, Any], space: Space, given: Range) -> finetune.Config:
    values = {key: dimension.middle for key, dimension in space.items()}
    config = build_config(finetune.Config, with_values(base, {**values, LR: given.high}))
    optimizer = config.optimizer.model_copy(update={"warmup": Quantity(0, "%")})
    return config.model_copy(
        update={"duration": Quantity(NUM_STEPS, "steps"), "optimizer": optimizer}
    )


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of up to `HALF_WINDOW` steps to each side."""
    return [
        float(np.mean(losses[max(0, index - HALF_WINDOW) : index + HALF_WINDOW + 1]))
        for index in range(len(losses))
    ]


def judge(
    rates: Sequence[float], losses: Sequence[float], given: Range
) -> tuple[float, float, str]:
    """The range that a sweep shows to be worth searching, and why, in words."""
    if len(losses) < 2 * HALF_WINDOW:
        return (
            given.low,
            given.high,
            (f"the loss was not finite after {len(losses)} steps: the whole range is searched"),
        )
    course = smooth(losses)
    lowest = int(np.argmin(course))
    fall = course[0] - course[lowest]
    if fall <= 0.01 * abs(course[0]):
        return given.low, given.high, "the loss did not fall: the whole range is searched"
    onset = next(index for index, loss in enumerate(course) if loss <= course[0] - ONSET * fall)
    low, high = rates[onset], rates[lowest]
    verdict = f"the loss begins to fall at {low:.2g} and is lowest at {high:.2g}" + (
        ", the end of the sweep" if lowest == len(course) - 1 else ""
    )
    if high < LEAST_RATIO * low:
        middle = math.sqrt(low * high)
        low = max(given.low, middle / math.sqrt(LEAST_RATIO))
        high = min(given.high, middle * math.sqrt(LEAST_RATIO))
    low, high = float(f"{low:.3g}"), float(f"{high:.3g}")
    return max(low, given.low), min(high, given.high), verdict


def narrowed(space: Space, test: RangeTest) -> Space:
    """The space with the range of the learning rate that the test found."""
    given = space[LR]
    assert not isinstance(given, Choices)
    return {**space, LR: Range(test.low, test.high, given.log)}


def save(test: RangeTest, folder: Path) -> None:
    """Keep the result for a search that goes on, and for its page."""
    write_atomically(folder / FILE, to_json_text(asdict(test), indent=1))


def load(folder: Path) -> RangeTest | None:
    """What `save` wrote; None where the test was not made yet."""
    path = folder / FILE
    if not path.exists():
        return None
    values: dict[str, Any] = restore_numbers(json.loads(path.read_text(encoding="utf-8")))
    for name in ("rates", "losses", "smoothed"):
        values[name] = tuple(values[name])
    return RangeTest(**values)
