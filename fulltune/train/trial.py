"""One batch of a model that nothing is known of, tried before the first step.

What the architectures of `models/families.py` can do was measured. Every other decoder of
transformers is let in too, and some cannot be trained as they are: layers of a state-space model
mix precisions, fields of a config do not fit together, or a token sees what it has to predict.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fulltune.data.encoding import EncodedExample
from fulltune.errors import FulltuneError, ModelError, first_line
from fulltune.models.evaluation_mode import evaluation_mode
from fulltune.models.families import FAMILIES
from fulltune.objectives.base import Objective, to_device
from fulltune.optim.master_weights import MasterWeights
from fulltune.runtime import preserved_random_state

_LENGTHS = (12, 7)
_SAME = 1e-4
"""Largest difference that rounding in float32 makes, as a share of the largest hidden state."""
_GROWTH = 20
"""How much larger the rounding of a whole model is than that of one product, at most."""

_HINT = (
    "correct the fields of its config.json, or choose a decoder that is known to train, such as "
    "llama, mistral, qwen3, gemma or gpt2"
)


def is_known(model: PreTrainedModel) -> bool:
    """Whether the architecture is one that was measured."""
    return model.config.model_type in FAMILIES


@contextmanager
def tried(model: PreTrainedModel, how: str = "", *, hint: str = _HINT) -> Generator[None]:
    """What fails within is said of the architecture, if it is not a known one.

    Args:
        model: what is tried.
        how: in what way.
        hint: what to do then.

    Raises:
        ModelError: in place of whatever the model's own code raised.
    """
    try:
        yield
    except (FulltuneError, torch.OutOfMemoryError):
        raise
    # The code of any architecture may fail in any of these ways.
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError) as error:
        if is_known(model):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise _cannot(model, reason, how=how, hint=hint) from error


def require_trainable(model: PreTrainedModel, objective: Objective) -> None:
    """Try two short rows on a float32 model: forward, backward, and what a token sees.

    It must see neither the row beside it nor what comes after it: the encoders among transformers'
    causal language models see all of their row unless their config says `is_decoder`. Nothing is
    tried of a known architecture, and no weight, gradient or random state is changed.

    Args:
        model: a decoder.
        objective: predicts next tokens.

    Raises:
        ModelError: it cannot be trained, and why.
    """
    if is_known(model) or objective.head != "causal_lm":
        return
    first, second = rows = _rows(model)
    with tried(model), evaluation_mode(model):
        first_TH, second_TH = _hidden_states(model, rows)
        alone_TH = _hidden_states(model, [second])[0]
        # In another shape sums have another order, and where products are rounded to TF32 or bf16,
        # that order decides where they are rounded.
        if _differ(second_TH[: len(second)], alone_TH, max(_SAME, _GROWTH * _rounding(model))):
            raise _cannot(model, "a row of a batch changes with the rows beside it")
        # In the same shape equal numbers are rounded alike in any arithmetic.
        changed_TH = _hidden_states(model, [[*first[:-1], first[0]], second])[0]
        if _differ(first_TH[:-1], changed_TH[:-1], _SAME):
            config = model.config.to_dict()
            missing = "is_decoder" in config and not config["is_decoder"]
            raise _cannot(
                model,
                "a token sees those that come after it, which it has to predict"
                + ("; its config says `is_decoder: false`" if missing else ""),
            )
        _try_step(model, objective)
        model.zero_grad()


def require_trainable_in(
    dtype: torch.dtype, model: PreTrainedModel, objective: Objective, masters: MasterWeights
) -> None:
    """Try the same step in another precision than float32, as the model will be trained.

    Raises:
        ModelError: it can be trained in float32 alone.
    """
    if dtype == torch.float32 or is_known(model) or objective.head != "causal_lm":
        return
    name = str(dtype).removeprefix("torch.")
    with tried(model, f" in {name}", hint="set `precision: fp32`, in which it can"):
        try:
            _try_step(model, objective)
        finally:
            masters.zero_grad()


def _try_step(model: PreTrainedModel, objective: Objective) -> None:
    device = next(model.parameters()).device
    with evaluation_mode(model), preserved_random_state():
        model.train()
        batch = objective.collate([_example(ids) for ids in _rows(model)])
        objective.loss_sum(model, to_device(batch, device)).backward()


def _rows(model: PreTrainedModel) -> list[list[int]]:
    vocab_size = model.config.get_text_config().vocab_size
    return [[token % vocab_size for token in range(3, 3 + length)] for length in _LENGTHS]


def _differ(one: Tensor, other: Tensor, share: float) -> bool:
    return bool((one - other).abs().max() > share * other.abs().max())


def _rounding(model: PreTrainedModel) -> float:
    """What a float32 product is off by on the model's device, as a share of its largest number.

    About 2e-7, and where TF32 or bf16 stands for float32 3e-4 or 3e-3. It is measured, as that
    depends on the device, on what it is allowed, and on the sizes.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(64, 256, generator=generator)
    right = torch.randn(256, 64, generator=generator)
    exact = left.double() @ right.double()
    products = (
        left.to(device) @ right.to(device),
        torch.nn.functional.conv1d(left.T[None].to(device), right.T[..., None].to(device))[0].T,
    )
    errors = [(product.double().cpu() - exact).abs().max() for product in products]
    return float(max(errors) / exact.abs().max())


@torch.no_grad()
def _hidden_states(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    device = next(model.parameters()).device
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in rows], device=device)
    lengths_B = torch.tensor([len(ids) for ids in rows], device=device)
    mask_BT = torch.arange(longest, device=device)[None] < lengths_B[:, None]
    output = model.base_model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
    hidden_BTH: Tensor = output.last_hidden_state
    return hidden_BTH


def _example(ids: list[int]) -> EncodedExample:
    return EncodedExample(
        input_ids=ids,
        targets=[0, *[1] * (len(ids) - 1)],
        token_type_ids=[],
        labels=[],
        num_removed=0,
        num_removed_targets=0,
        input_hash=0,
        example_hash=0,
        num_bytes=0,
        where="",
    )


def _cannot(model: PreTrainedModel, reason: str, *, how: str = "", hint: str = _HINT) -> ModelError:
    return ModelError(
        f"this model of type `{model.config.model_type}` cannot be trained{how}; tried on two "
        f"short rows: {reason}",
        hint=hint,
    )
