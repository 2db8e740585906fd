"""How much of the forward passes is padding, where examples lie side by side and not end to end."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from fulltune.data.loader import Loader


class PaddingFacts(BaseModel):
    """The padding of the first epoch's forward passes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    micro_batch_tokens: int
    """Most tokens of a forward pass, padding included."""
    num_tokens: int
    """Of the examples."""
    num_padding: int
    """Tokens of padding to their right."""

    @property
    def share(self) -> float:
        """Share of the forward passes' tokens that is padding."""
        return self.num_padding / max(self.num_tokens + self.num_padding, 1)


def measure_padding(
    loader: Loader, lengths: npt.NDArray[np.integer]
) -> tuple[PaddingFacts, dict[int, int]]:
    """Count the padding of the first epoch, as it is going to be trained.

    Args:
        loader: of a model that does not pack, at its beginning.
        lengths: tokens of every example of the data set, int [N].

    Returns:
        The facts, and for every example the tokens that its row has in its forward pass.
    """
    num_tokens = num_padding = 0
    widths: dict[int, int] = {}
    for plan in itertools.islice(loader, loader.steps_per_epoch()):
        for members in plan.micro_batches:
            own = lengths[members].astype(np.int64)
            width = int(own.max())
            num_tokens += int(own.sum())
            num_padding += width * len(own) - int(own.sum())
            widths.update(dict.fromkeys(members.tolist(), width))
    facts = PaddingFacts(
        micro_batch_tokens=loader.micro_batch_tokens,
        num_tokens=num_tokens,
        num_padding=num_padding,
    )
    return facts, widths
