"""The one inference path: evaluation, `predict`, `chat` and serving answer through this file.

A prompt is rendered by the tokenizer's own chat template, so its tokens are the context that
training saw. What a row answers does not depend on the rows beside it in the batch: padding is on
the left and masked, positions start at each prompt's first token, and every row draws its samples
from a generator of its own, seeded by `GenerationSettings.seed` and the prompt. Only rounding may
differ, as matrix products of other shapes round differently.

Shape suffixes: B rows, T tokens, V vocabulary, D documents, C classes.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fulltune.config import Settings
from fulltune.data import chat
from fulltune.data.encoding import EncodedExample
from fulltune.data.packing import group_by_length, pack
from fulltune.data.tasks import ClassificationExample, Message, TaskKind
from fulltune.errors import DataError, ModelError
from fulltune.models.attention import IMPLEMENTATION
from fulltune.models.evaluation_mode import evaluation_mode
from fulltune.models.families import family_of
from fulltune.models.loading import (
    context_length,
    load_model,
    load_model_config,
    load_tokenizer,
    read_info,
)
from fulltune.models.sources import resolve_model
from fulltune.objectives.base import Objective, TooLong, to_device
from fulltune.objectives.causal_lm import CausalLM, require_plain_head
from fulltune.objectives.classification import Classification
from fulltune.runtime import preserved_random_state

logger = logging.getLogger(__name__)

T = TypeVar("T")

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


@dataclass(frozen=True)
class Prediction:
    """The label of one example and the probabilities of all labels, in the model's order."""

    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    info: dict[str, Any]
    """`fulltune.json` of the model folder; empty for a folder that fulltune did not write."""
    kind: TaskKind
    labels: tuple[str, ...]
    """Labels of a classifier in order, else empty."""


# -- loading ---------------------------------------------------------------------------------------


def load_for_inference(
    source: str,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Load a trained model with its tokenizer and find out what it answers.

    Args:
        source: a run folder, a model folder, a Hub name, a `.gguf` file or `asset:NAME`.
        device: where the model runs.
        dtype: dtype of the weights; None keeps the stored one.

    Raises:
        ModelError: the folder is incomplete, or holds a model without a trained head.
    """
    path = resolve_model(source)
    info = read_info(path)
    config = load_model_config(path)
    tokenizer = load_tokenizer(path)
    kind = info["kind"] if "kind" in info else _infer_kind(path, config, tokenizer)
    model = load_model(
        path,
        head="classification" if kind == "classification" else "causal_lm",
        dtype=dtype or cast(torch.dtype | None, config.dtype) or torch.float32,
        attention=IMPLEMENTATION,
    )
    cast(Any, model).to(device)
    model.eval()
    labels: tuple[str, ...] = ()
    if kind == "classification":
        names = cast(dict[int, str], model.config.id2label)
        labels = tuple(names[index] for index in range(len(names)))
    return Loaded(model, tokenizer, path, info, kind, labels)


def build_objective(
    loaded: Loaded,
    *,
    too_long: TooLong = "error",
    max_length: int | None = None,
    special_tokens: Literal["error", "text"] = "text",
) -> CausalLM | Classification:
    """The objective that encodes and scores for a loaded model, as it was trained.

    Args:
        loaded: the model.
        too_long: what happens to an example longer than ``max_length``.
        max_length: in tokens; None is what the model was trained with, else its context.
        special_tokens: what happens to a message that holds the text of a special token.
    """
    context = context_length(loaded.model.config)
    longest = min(max_length or loaded.info.get("max_length", context), context)
    family = family_of(loaded.model.config)
    if loaded.kind != "classification":
        require_plain_head(loaded.model)
        return CausalLM(
            loaded.tokenizer,
            longest,
            too_long,
            packing=family.can_pack,
            special_tokens=special_tokens,
        )
    return Classification(
        loaded.tokenizer,
        loaded.labels,
        longest,
        pooling=family.pooling,
        too_long=too_long,
        packing=family.can_pack,
        own_forward=family.pools_real_tokens,
    )


def _infer_kind(
    path: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> TaskKind:
    architectures = config.architectures or []
    kind: TaskKind
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        kind, reason = "classification", f"its architecture is {architectures[0]}"
    elif any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        has_template = tokenizer.chat_template is not None
        kind = "chat" if has_template else "text"
        reason = f"its tokenizer has {'a' if has_template else 'no'} chat template"
    else:
        named = architectures[0] if architectures else "a model without a named architecture"
        raise ModelError(
            f"`{path}` holds {named}, an encoder without a trained head, so it can "
            "neither answer nor label",
            hint="fine-tune it first with `fulltune finetune`, and give the run folder",
        )
    logger.info("%s has no fulltune.json; taken as a %s model, since %s", path, kind, reason)
    return kind


# -- prompts ---------------------------------------------------------------------------------------


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    where: str = "the conversation",
) -> list[int]:
    """Token ids of a conversation up to the place where the assistant's answer begins.

    They are rendered and cut as training does it, so they are the context that training saw.

    Raises:
        DataError: there is nothing to answer, or the template refuses the conversation.
        ModelError: the tokenizer has no chat template.
    """
    if not messages:
        raise DataError(
            f"{where}: is empty, so there is nothing to answer", hint="add a `user` turn"
        )
    segments = chat.render_prompt(tokenizer, messages, where=where)
    input_ids, _ = chat.encode_segments(tokenizer, segments)
    return input_ids


def render_text_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, *, where: str = "the prompt"
) -> list[int]:
    """Token ids of a text to be continued: what the tokenizer puts before a document, and the text.

    Raises:
        DataError: no token comes of it.
    """
    prompt = list(tokenizer(text)["input_ids"])
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    while len(prompt) > 1 and prompt[-1] in ends:  # an end that the tokenizer added, not the text
        prompt.pop()
    if not prompt:
        raise DataError(f"{where}: the prompt is empty", hint="give at least one word")
    return prompt


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, the model's, and the template's end of turn."""
    found = set(chat.end_of_turn_ids(tokenizer))
    config = getattr(model, "generation_config", None)
    configured = config.eos_token_id if config is not None else None
    if isinstance(configured, int):
        found.add(configured)
    elif configured is not None:
        found.update(int(token) for token in configured)
    return sorted(found)


# -- generation ------------------------------------------------------------------------------------


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


# -- classification --------------------------------------------------------------------------------


def classify(
    model: PreTrainedModel,
    objective: Classification,
    examples: Iterable[ClassificationExample],
    *,
    batch_tokens: int = 8192,
    window: int = 512,
) -> Iterator[Prediction]:
    """Label examples, in their order.

    Examples are read ``window`` at a time and batched by length within the window, so memory does
    not grow with their number.

    Args:
        model: a classifier.
        objective: how examples become tokens and tokens become logits.
        examples: what to label; their own labels are not looked at.
        batch_tokens: most tokens in a batch, padding included.
        window: examples held at a time.
    """
    names = objective.labels
    device = next(model.parameters()).device
    for chunk in in_chunks(examples, window):
        encoded = []
        for example in chunk:
            pieces = objective.encode(example)
            if not pieces:
                raise DataError(
                    f"{example.where}: the text is longer than the context, and was dropped",
                    hint="set `task.too_long=truncate`, or shorten the text",
                )
            encoded.append(pieces[0])
        predictions: dict[int, Prediction] = {}
        with answering(model):
            for places in cut_into_batches(encoded, objective, batch_tokens):
                batch = objective.collate([encoded[place] for place in places])
                logits_DC = objective.score(model, to_device(batch, device)).logits_DC
                assert logits_DC is not None  # a classifier always gives them
                for place, row in zip(places, logits_DC.float().softmax(dim=-1), strict=True):
                    best = names[int(row.argmax())]
                    shares = dict(zip(names, row.tolist(), strict=True))
                    predictions[place] = Prediction(best, shares)
        yield from (predictions[place] for place in range(len(chunk)))


# -- shared ----------------------------------------------------------------------------------------


@contextmanager
def answering(model: PreTrainedModel) -> Generator[None]:
    """Evaluation mode without gradients; modes and random states are put back afterwards.

    Training that is interrupted by answers goes on exactly as if nothing had happened.
    """
    own_config = getattr(model, "generation_config", None)
    with preserved_random_state(), torch.no_grad(), evaluation_mode(model):
        if own_config is not None:
            # `generate` fills what we leave open from here, and warns about combinations.
            model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            if own_config is not None:
                model.generation_config = own_config


def cut_into_batches(
    examples: Sequence[EncodedExample], objective: Objective, batch_tokens: int
) -> list[list[int]]:
    """Places of ``examples`` in batches of at most ``batch_tokens``, packed or padded."""
    lengths = np.array([len(example["input_ids"]) for example in examples])
    if objective.packing:
        cut = pack(lengths, batch_tokens)
    else:
        cut = group_by_length(lengths, token_budget=batch_tokens)
    return [places.tolist() for places in cut]


def in_chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
