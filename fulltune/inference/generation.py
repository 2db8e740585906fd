"""Answers to prompts, as text.

What a row answers does not depend on the rows beside it in the batch: padding is on the left and
masked, positions start at each prompt's first token, and every row draws its samples from a
generator of its own, seeded by `GenerationSettings.seed` and the prompt. Only rounding may differ,
as matrix products of other shapes round differently.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fulltune.config import Settings
from fulltune.data.packing import group_by_length
from fulltune.data.tasks import Message
from fulltune.errors import DataError
from fulltune.inference.batches import answering
from fulltune.inference.prompts import render_prompt, render_text_prompt, stop_ids
from fulltune.models.loading import context_length

Stream = Callable[[int, str], None]
"""Called with the place of a prompt and the next piece of its answer, as it is generated."""


class GenerationSettings(Settings):
    """How answers are generated; of a model's `generation_config.json` only end tokens count."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer in tokens; an answer also ends where the model's context does."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time; 1 samples from the model's own distribution."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from this many likeliest tokens; 0 is no limit."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the samples; a prompt gets the same answer for the same seed."""

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self) -> GenerationSettings:
        for name in ("top_p", "top_k"):
            default = type(self).model_fields[name].default
            if not self.temperature and getattr(self, name) != default:
                raise ValueError(
                    f"`{name}` has no effect with `temperature: 0`, which takes the likeliest "
                    "token; raise the temperature, or leave it out"
                )
        return self


@dataclass(frozen=True)
class Answer:
    """What a model generated for one prompt."""

    text: str
    num_tokens: int
    """Tokens of the answer, its end token not counted."""
    stopped: bool
    """Whether the model ended the answer itself, and not `max_new_tokens` or the context."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    settings: GenerationSettings | None = None,
    stream: Stream | None = None,
    where: Sequence[str] | None = None,
    batch_tokens: int = 8192,
) -> list[Answer]:
    """Answer conversations, each ending before an assistant's turn.

    Args:
        model: a causal language model; its mode and torch's random states are left as found.
        tokenizer: its tokenizer with a chat template.
        conversations: what to answer.
        settings: how; None is the defaults.
        stream: called with each piece of text as it comes.
        where: file and line of each conversation, for errors.
        batch_tokens: most tokens, padding and answers included, generated for at once.

    Returns:
        One answer for each conversation, in their order.

    Raises:
        DataError: a conversation leaves no room in the model's context, or cannot be rendered.
    """
    places = where or _places("conversation", len(conversations))
    prompts = [
        render_prompt(tokenizer, messages, where=place)
        for messages, place in zip(conversations, places, strict=True)
    ]
    settings = settings or GenerationSettings()
    return _continue_prompts(model, tokenizer, prompts, places, settings, stream, batch_tokens)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    settings: GenerationSettings | None = None,
    stream: Stream | None = None,
    where: Sequence[str] | None = None,
    batch_tokens: int = 8192,
) -> list[Answer]:
    """Continue texts with a model of a `text` task; otherwise as `generate`."""
    places = where or _places("prompt", len(prompts))
    rendered = [
        render_text_prompt(tokenizer, text, where=place)
        for text, place in zip(prompts, places, strict=True)
    ]
    settings = settings or GenerationSettings()
    return _continue_prompts(model, tokenizer, rendered, places, settings, stream, batch_tokens)


def _places(name: str, count: int) -> list[str]:
    return [f"{name} {number}" for number in range(1, count + 1)]


def _continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    places: Sequence[str],
    settings: GenerationSettings,
    stream: Stream | None,
    batch_tokens: int,
) -> list[Answer]:
    context = context_length(model.config)
    rooms = []
    for prompt, place in zip(prompts, places, strict=True):
        room = context - len(prompt)
        if room < 1:
            raise DataError(
                f"{place}: the prompt has {len(prompt)} tokens, but the model's context is "
                f"{context}, so no answer fits",
                hint="shorten the prompt, or leave its oldest turns out",
            )
        rooms.append(min(room, settings.max_new_tokens))
    stops = stop_ids(model, tokenizer)
    answers: dict[int, Answer] = {}
    with answering(model):
        # Rows of one batch have the same room: a row that went on beside a shorter one would
        # otherwise run past its context, whose positions may not exist.
        order = sorted(range(len(prompts)), key=lambda i: (rooms[i], len(prompts[i]), i))
        for room, group in itertools.groupby(order, key=lambda i: rooms[i]):
            members = list(group)
            lengths = [len(prompts[i]) + room for i in members]
            for chosen in group_by_length(np.array(lengths), token_budget=batch_tokens):
                rows = [members[place] for place in chosen]
                batch = [prompts[i] for i in rows]
                generated = _generate_batch(
                    model, tokenizer, batch, rows, room, stops, settings, stream
                )
                answers.update(zip(rows, generated, strict=True))
    return [answers[i] for i in range(len(prompts))]


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    rows: list[int],
    room: int,
    stops: list[int],
    settings: GenerationSettings,
    stream: Stream | None,
) -> list[Answer]:
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0  # masked, and cut off behind the end: any token will do
    input_ids_BT = torch.full((len(prompts), width), int(pad), dtype=torch.int64)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    for row, prompt in enumerate(prompts):
        input_ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask_BT[row, width - len(prompt) :] = 1
    sampler = _RowSampler(prompts, settings)
    watcher = _Streamer(tokenizer, rows, width, set(stops), stream)
    output_BT = cast(Any, model).generate(
        input_ids=input_ids_BT.to(device),
        attention_mask=attention_mask_BT.to(device),
        logits_processor=LogitsProcessorList([sampler] if settings.temperature > 0 else []),
        stopping_criteria=StoppingCriteriaList([watcher] if stream else []),
        generation_config=GenerationConfig(
            max_new_tokens=room,
            do_sample=False,  # samples are drawn by the sampler, row by row
            use_cache=True,
            eos_token_id=stops or None,
            pad_token_id=int(pad),
        ),
    )
    answers = []
    for row, tokens in enumerate(output_BT[:, width:].tolist()):
        end = next((place for place, token in enumerate(tokens) if token in stops), None)
        kept = tokens if end is None else tokens[:end]
        text = _decode(tokenizer, kept)
        if end is None:
            text = text.rstrip("\ufffd")  # a character whose last bytes were cut off
        answer = Answer(text, len(kept), end is not None)
        watcher.finish(row, answer.text)
        answers.append(answer)
    return answers


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


class _RowSampler(LogitsProcessor):
    """Makes the greedy choice a sample: the largest of logit plus Gumbel noise is one.

    `torch.multinomial` over a batch would make a row's sample depend on the rows before it.
    """

    def __init__(self, prompts: list[list[int]], settings: GenerationSettings) -> None:
        self.settings = settings
        self.generators = [
            torch.Generator().manual_seed(_row_seed(prompt, settings.seed)) for prompt in prompts
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_BV = scores.float() / self.settings.temperature
        vocabulary = logits_BV.shape[-1]
        if 0 < self.settings.top_k < vocabulary:
            least_B1 = logits_BV.topk(self.settings.top_k, dim=-1).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
        if self.settings.top_p < 1:
            sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
            before_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1) - sorted_BV.softmax(dim=-1)
            beyond_BV = before_BV >= self.settings.top_p  # never the first
            beyond_BV[:, 0] = False
            removed_BV = torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV)
            logits_BV = logits_BV.masked_fill(removed_BV, -torch.inf)
        tiny = torch.finfo(torch.float32).tiny
        uniform_BV = torch.stack(
            [torch.rand(vocabulary, generator=generator) for generator in self.generators]
        ).clamp_(min=tiny)
        noise_BV = -torch.log(-torch.log(uniform_BV))
        return logits_BV + noise_BV.to(logits_BV.device)


def _row_seed(prompt: list[int], seed: int) -> int:
    content = f"{seed}:{','.join(map(str, prompt))}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little")


class _Streamer(StoppingCriteria):
    """Hands on each row's text as it grows; never stops a row itself."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[int],
        width: int,
        stops: set[int],
        stream: Stream | None,
    ) -> None:
        self.tokenizer, self.rows, self.width, self.stops = tokenizer, rows, width, stops
        self.stream = stream
        self.ended = [False] * len(rows)
        self.sent = [""] * len(rows)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, tokens in enumerate(input_ids[:, self.width :].tolist()):
            if self.ended[row] or tokens[-1] in self.stops:
                self.ended[row] = True
                continue
            # An unfinished character of several bytes decodes to U+FFFD until its last byte.
            text = _decode(self.tokenizer, tokens)
            if not text.endswith("\ufffd"):
                self.finish(row, text)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self, row: int, text: str) -> None:
        """Send what of ``text`` was not sent yet."""
        if self.stream is None:
            return
        piece = text[len(self.sent[row]) :]
        if piece:
            self.sent[row] = text
            self.stream(self.rows[row], piece)
