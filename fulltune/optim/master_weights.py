"""float32 weights and gradients behind a model that computes in bfloat16.

The optimizer only ever sees float32: it steps on the masters, and the model's weights are their
rounding. Gradients arrive in bfloat16, one parameter at a time, and are added in float32 at once,
so that a cut into more micro-batches loses nothing. A float32 model is its own master.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class MasterWeights:
    """The float32 masters of the trained parameters of a model, by name.

    Args:
        model: a float32 model. Its trained and frozen parameters are turned into ``dtype`` in
            place; the float32 tensors of the trained ones are kept as the masters.
        dtype: of the forward and backward pass.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._weights: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                raise TypeError(f"{name} is {parameter.dtype}; masters are taken from float32")
            master = parameter.data
            if parameter.requires_grad and dtype == torch.float32:
                master = parameter
            elif dtype != torch.float32:
                parameter.data = master.to(dtype)
            if parameter.requires_grad:
                self._weights[name] = (parameter, master)
                if master is not parameter:
                    self._collect_gradients(parameter, master)

    def __len__(self) -> int:
        return len(self._weights)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and float32 masters; a master's ``grad`` is the float32 sum of its gradients."""
        for name, (_, master) in self._weights.items():
            yield name, master

    def tensors(self) -> list[Tensor]:
        """The masters, in the order of the model's parameters."""
        return [master for _, master in self._weights.values()]

    @staticmethod
    def _collect_gradients(parameter: nn.Parameter, master: Tensor) -> None:
        # The buffer outlives the step: memory given back is paged in again, zero by zero.
        buffer: Tensor | None = None

        def add(parameter: Tensor) -> None:
            nonlocal buffer
            gradient = parameter.grad
            parameter.grad = None
            if gradient is None:
                return
            if buffer is None:
                buffer = torch.empty_like(master)
            if master.grad is None:
                master.grad = buffer.copy_(gradient)
            else:
                master.grad.add_(gradient)

        parameter.register_post_accumulate_grad_hook(add)

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model's weights."""
        for parameter, master in self._weights.values():
            if master is not parameter:
                parameter.copy_(master)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for _, master in self._weights.values():
            master.grad = None

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the masters, and with them the model's weights."""
        for name, master in self.items():
            master.copy_(tensors[name])
        self.write_back()


class RoundingProbe:
    """Measures what share of the updates plain bfloat16 weights would have lost.

    A fixed sample of every weight matrix is looked at before and after an update. An update is lost
    where adding it to the bfloat16 weight gives the same bfloat16 weight again.
    """

    sample_size = 512

    def __init__(self, masters: MasterWeights) -> None:
        self._masters = masters
        self._before = [self._sample(master) for master in masters.tensors()]

    def _sample(self, master: Tensor) -> Tensor:
        stride = max(1, master.numel() // self.sample_size)
        return master.detach().flatten()[::stride].clone()

    def share_lost(self) -> float:
        """Lost updates divided by updates that were not zero; nan where nothing was updated."""
        lost = total = 0
        for before, master in zip(self._before, self._masters.tensors(), strict=True):
            update = self._sample(master) - before
            moved = update != 0
            rounded = before.bfloat16()
            same = (rounded.float() + update).bfloat16() == rounded
            lost += int((same & moved).sum())
            total += int(moved.sum())
        return lost / total if total else float("nan")
