"""AdamW whose updates are a share of each weight's size, as Adafactor's are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SMALLEST_SCALE = 1e-3
"""A weight of zeros is stepped as if it had this size; it could never leave zero otherwise."""


class ScaledAdamW(torch.optim.AdamW):
    """AdamW with the learning rate of each parameter times the root mean square of its entries.

    T5 diverges with AdamW's own updates: its weights are of very different sizes. The scale is that
    of Adafactor (Shazeer and Stern, 2018, section 8), and nanoT5 pre-trains T5 with it. The weight
    decay is already a share of the weight, and is not scaled again. The scale is a function of the
    weights, so the state is AdamW's.
    """

    def __init__(self, params: list[dict[str, Any]], **settings: Any) -> None:
        # A group for each parameter: torch's kernels take one learning rate a group.
        groups = [
            {**group, "params": [parameter]} for group in params for parameter in group["params"]
        ]
        super().__init__(groups, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in proportion to its size."""
        own = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        parameters = [group["params"][0] for group in self.param_groups]
        # One transfer from the device for all.
        norms = torch.stack([parameter.norm() for parameter in parameters]).tolist()
        for group, parameter, norm in zip(self.param_groups, parameters, norms, strict=True):
            scale = max(SMALLEST_SCALE, norm / parameter.numel() ** 0.5)
            group["lr"] *= scale
            group["weight_decay"] /= scale
        try:
            return super().step(closure)
        finally:
            for group, (lr, weight_decay) in zip(self.param_groups, own, strict=True):
                group["lr"], group["weight_decay"] = lr, weight_decay
