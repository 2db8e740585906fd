"""Noise in spans, as T5 and UL2 draw it: how many tokens, which ones, and what stands for them.

Pure functions of lists of tokens and a generator; `span_corruption` makes batches of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Mode = Literal["[NLU]", "[NLG]", "[S2S]"]
"""The token by which UL2 tells the model what kind of noise it sees."""


@dataclass(frozen=True)
class Denoiser:
    """One kind of noise: a share of the tokens, in spans of a mean length.

    Args:
        noise_density: share of the tokens that is noise, in (0, 1).
        mean_span_length: of the spans of noise; None for one span at the end (a prefix language
            model), which has no sentinel.
        mode: UL2's name for this kind of noise.
    """

    noise_density: float = 0.15
    mean_span_length: float | None = 3.0
    mode: Mode = "[NLU]"

    def counts(self, length: int) -> tuple[int, int]:
        """Noise tokens and noise spans of ``length`` >= 2 tokens.

        Both as in T5's `random_spans_noise_mask` (Raffel et al., 2020): neither noise nor the rest
        is ever empty, and no span has more neighbours than there are tokens for.
        """
        num_noise = min(max(round(length * self.noise_density), 1), length - 1)
        if self.mean_span_length is None:
            return num_noise, 1
        num_spans = max(1, round(num_noise / self.mean_span_length))
        return num_noise, min(num_spans, num_noise, length - num_noise)

    def lengths(self, length: int) -> tuple[int, int]:
        """Tokens of the inputs and of the targets, sentinels and end tokens included."""
        num_noise, num_spans = self.counts(length)
        num_sentinels = 0 if self.mean_span_length is None else num_spans
        return length - num_noise + num_sentinels + 1, num_noise + num_sentinels + 1

    def draw(self, length: int, generator: np.random.Generator) -> tuple[list[int], list[int]]:
        """Lengths of the kept spans and of the noise spans that follow each; all at least 1."""
        num_noise, num_spans = self.counts(length)
        noise = random_segmentation(num_noise, num_spans, generator)
        kept = random_segmentation(length - num_noise, num_spans, generator)
        return kept, noise


T5_DENOISER = Denoiser()
UL2_DENOISERS = (
    # Tay et al., 2022, table 1: three regular, one sequential, extreme by length or by density.
    Denoiser(0.15, 3.0, "[NLU]"),
    Denoiser(0.15, 8.0, "[NLU]"),
    Denoiser(0.25, None, "[S2S]"),
    Denoiser(0.5, 3.0, "[NLG]"),
    Denoiser(0.5, 8.0, "[NLG]"),
    Denoiser(0.15, 64.0, "[NLG]"),
    Denoiser(0.5, 64.0, "[NLG]"),
)


def raw_length(inputs_length: int, denoiser: Denoiser = T5_DENOISER) -> tuple[int, int]:
    """The most tokens whose corrupted inputs have at most ``inputs_length``, and their targets.

    Returns:
        Tokens before corruption, and tokens of the targets: (568, 114) for 512 with T5's noise.

    Raises:
        ValueError: not even two tokens fit.
    """
    if denoiser.lengths(2)[0] > inputs_length:
        raise ValueError(f"{inputs_length} tokens are too few for corrupted inputs")
    # Inputs never get shorter with more text, so that the search may begin near its end.
    share_left = 1 - denoiser.noise_density * (1 - 1 / (denoiser.mean_span_length or math.inf))
    length = max(2, int((inputs_length - 4) / share_left))
    if denoiser.lengths(length)[0] > inputs_length:
        length = 2
    while denoiser.lengths(length + 1)[0] <= inputs_length:
        length += 1
    return length, denoiser.lengths(length)[1]


def random_segmentation(
    num_items: int, num_segments: int, generator: np.random.Generator
) -> list[int]:
    """Lengths of ``num_segments`` non-empty parts; every way to cut is equally likely."""
    cuts = np.sort(generator.choice(num_items - 1, num_segments - 1, replace=False)) + 1
    return [int(part) for part in np.diff(cuts, prepend=0, append=num_items)]


def corrupt(
    ids: Sequence[int],
    kept: Sequence[int],
    noise: Sequence[int],
    sentinels: Sequence[int],
    end_id: int,
) -> tuple[list[int], list[int]]:
    """Inputs with a sentinel for each noise span, and targets with one before each.

    Args:
        ids: the tokens; they begin with a kept span and end with a noise span.
        kept: lengths of the kept spans.
        noise: lengths of the noise spans.
        sentinels: one for each noise span; empty to let the only span follow unannounced.
        end_id: ends both.
    """
    inputs: list[int] = []
    targets: list[int] = []
    place = 0
    for index, (num_kept, num_noise) in enumerate(zip(kept, noise, strict=True)):
        inputs += ids[place : place + num_kept]
        place += num_kept
        if sentinels:
            inputs.append(sentinels[index])
            targets.append(sentinels[index])
        targets += ids[place : place + num_noise]
        place += num_noise
    return [*inputs, end_id], [*targets, end_id]
