"""Where the noise of an example comes from: one number, whatever batch or rank it is in."""

from __future__ import annotations

import numpy as np

from fulltune.data.encoding import EncodedExample


def noise_seed(seed: int, epoch: int, index: int) -> int:
    """The number an example's noise is drawn from in one epoch of a run."""
    state = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)
    return int(state[0])


def noise_generator(example: EncodedExample) -> np.random.Generator:
    """The generator of an example's noise; in evaluation, without a seed, that of its content."""
    number = example.get("noise_seed", example["example_hash"]) & (2**64 - 1)
    return np.random.default_rng(np.random.SeedSequence(number))
