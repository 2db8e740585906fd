"""Answers to prompts, as text.

What a row answers does not depend on the rows beside it in the batch: padding is masked, on the
left of a decoder's prompts and on the right of an encoder's, positions start at each prompt's first
token, and every row draws its samples from a generator of its own, seeded by
`GenerationSettings.seed` and the prompt. Only rounding may differ, as matrix products of other
shapes round differently.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

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
from fulltune.data.special_text import encode_between
from fulltune.data.tasks import Message
from fulltune.errors import ConfigError, DataError
from fulltune.inference.batches import answering
from fulltune.inference.next_token import NoRepeatedNgrams, RowSampler
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
    num_beams: Annotated[int, Field(ge=1)] = 1
    """Beam search: the likeliest whole answer among this many that are followed at once."""
    length_penalty: float = 1.0
    """Beam search: an answer's log-probability is divided by its length to this power; above 1
    favours longer answers, below 1 shorter ones."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """No sequence of this many tokens comes twice in an answer; 0 lets all repeat."""
    prefix_text: str = ""
    """How every answer begins; the model goes on from there."""

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self) -> GenerationSettings:
        if self.num_beams > 1 and self.temperature:
            raise ValueError(
                f"`num_beams: {self.num_beams}` and `temperature: {self.temperature}` contradict "
                "each other: beam search looks for the likeliest answer, and sampling draws one; "
                "leave one of them out"
            )
        if self.num_beams == 1 and self.length_penalty != 1:
            raise ValueError(
                "`length_penalty` has no effect with `num_beams: 1`, which follows a single "
                "answer; raise the beams, or leave it out"
            )
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


def generate_from_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    settings: GenerationSettings | None = None,
    where: Sequence[str] | None = None,
    batch_tokens: int = 8192,
) -> list[Answer]:
    """Answer prompts that are tokens already: of an encoder-decoder, what its encoder reads."""
    places = where or _places("prompt", len(prompts))
    settings = settings or GenerationSettings()
    return _continue_prompts(model, tokenizer, list(prompts), places, settings, None, batch_tokens)


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
    if stream is not None and settings.num_beams > 1:
        raise ConfigError(
            f"`num_beams: {settings.num_beams}` cannot be shown word by word: which answer is the "
            "best is known at its end",
            hint="leave it out",
        )
    beginning, _ = encode_between(tokenizer, settings.prefix_text)
    context = context_length(model.config)
    rooms = []
    for prompt, place in zip(prompts, places, strict=True):
        room = context - len(prompt) - len(beginning)
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
            lengths = [(len(prompts[i]) + room) * settings.num_beams for i in members]
            for chosen in group_by_length(np.array(lengths), token_budget=batch_tokens):
                rows = [members[place] for place in chosen]
                batch = [prompts[i] for i in rows]
                generated = _generate_batch(
                    model, tokenizer, batch, beginning, rows, room, stops, settings, stream
                )
                answers.update(zip(rows, generated, strict=True))
    return [answers[i] for i in range(len(prompts))]


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    beginning: list[int],
    rows: list[int],
    room: int,
    stops: list[int],
    settings: GenerationSettings,
    stream: Stream | None,
) -> list[Answer]:
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0  # masked, and cut off behind the end: any token will do
    inputs, width = _model_inputs(model, prompts, beginning, int(pad))
    processors: list[LogitsProcessor] = []
    if settings.no_repeat_ngram_size:
        processors.append(NoRepeatedNgrams(settings.no_repeat_ngram_size, width))
    if settings.temperature > 0:
        processors.append(
            RowSampler(
                prompts,
                seed=settings.seed,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
            )
        )
    watcher = _Streamer(tokenizer, rows, width, set(stops), stream)
    # Settings of beam search are given with beams only: `generate` warns of them otherwise.
    beams = (
        {"num_beams": settings.num_beams, "length_penalty": settings.length_penalty}
        if settings.num_beams > 1
        else {}
    )
    output_BT = cast(Any, model).generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([watcher] if stream else []),
        generation_config=GenerationConfig(
            max_new_tokens=room,
            do_sample=False,  # samples are drawn by the sampler, row by row
            use_cache=True,
            eos_token_id=stops or None,
            pad_token_id=int(pad),
            decoder_start_token_id=_start_id(model, int(pad)),
            **beams,
        ),
    )
    answers = []
    for row, tokens in enumerate(output_BT[:, width:].tolist()):
        ends = (place for place, token in enumerate(tokens) if token in stops)
        end = next((place for place in ends if place >= len(beginning)), None)
        kept = tokens if end is None else tokens[:end]
        text = _decode(tokenizer, kept)
        if end is None:
            text = text.rstrip("\ufffd")  # a character whose last bytes were cut off
        answer = Answer(text, len(kept), end is not None)
        watcher.finish(row, answer.text)
        answers.append(answer)
    return answers


def _model_inputs(
    model: PreTrainedModel, prompts: list[list[int]], beginning: list[int], pad: int
) -> tuple[dict[str, Tensor], int]:
    """What `generate` takes for prompts and the beginning of their answers.

    Returns:
        The tensors, and how many tokens of its output stand before the answers.
    """
    two_sided = bool(model.config.is_encoder_decoder)
    given = prompts if two_sided else [[*prompt, *beginning] for prompt in prompts]
    width = max(len(prompt) for prompt in given)
    input_ids_BT = torch.full((len(given), width), pad, dtype=torch.int64)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    for row, prompt in enumerate(given):
        place = slice(0, len(prompt)) if two_sided else slice(width - len(prompt), width)
        input_ids_BT[row, place] = torch.tensor(prompt)
        attention_mask_BT[row, place] = 1
    inputs = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT}
    if not two_sided:
        return inputs, width - len(beginning)
    start = torch.tensor([[_start_id(model, pad), *beginning]])
    return {**inputs, "decoder_input_ids": start.expand(len(given), -1)}, 1


def _start_id(model: PreTrainedModel, pad: int) -> int | None:
    """The token that a decoder beside an encoder begins with; None without an encoder."""
    if not model.config.is_encoder_decoder:
        return None
    start = model.config.decoder_start_token_id
    return pad if start is None else int(start)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


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
