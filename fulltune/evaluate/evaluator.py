"""Evaluation during and after a run: scores, sampled answers, retention, and the best model so far.

Evaluating never changes the training it interrupts: modes and random states are put back, and no
gradient is touched. Every rank evaluates all of the held-out data, so that all take the same
decision to stop without talking.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Protocol

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fulltune.config import Period, Quantity, Settings
from fulltune.data.encoding import EncodedExample
from fulltune.data.tasks import ChatExample, Message, TaskKind, TextExample
from fulltune.errors import CheckpointError, ConfigError, DataError
from fulltune.evaluate.measures import MEASURES
from fulltune.evaluate.metrics import METRICS, guess_metric, language_metrics
from fulltune.evaluate.text_metrics import Tokenization
from fulltune.inference import (
    GenerationSettings,
    answering,
    cut_into_batches,
    generate,
    in_chunks,
    render_prompt,
)
from fulltune.models.loading import context_length
from fulltune.objectives.base import Objective, to_device
from fulltune.objectives.causal_lm import CausalLM
from fulltune.objectives.causal_stream import CausalStream

RETENTION_SOURCE = "asset:shakespeare"
"""The general text of `retention: true`: public domain, in every model's pre-training."""


class EvaluateConfig(Settings):
    """When the held-out data is evaluated, and what follows from it."""

    every: Period = Quantity(100, "steps")
    """How often: `100 steps` or `1 epoch`, and always after the last step."""
    metric: str | None = None
    """What the best model and early stopping go by; null is the task's first metric."""
    stop_after: Annotated[int, Field(ge=1)] | None = None
    """Evaluations without improvement after which training stops; null never stops early."""
    retention: bool | str = False
    """Decoders: also measure the loss on a general text, to notice what is forgotten; `true`
    takes Shakespeare, a source takes its text."""
    num_samples: Annotated[int, Field(ge=0)] = 3
    """Chat, sequence to sequence: held-out prompts answered before and after training, shown side
    by side."""
    generate: Annotated[int, Field(ge=0)] = 0
    """Sequence to sequence: held-out sources answered at each evaluation, greedily, and scored by
    BLEU, chrF, ROUGE and exact match; 0 scores no answers, which take far longer than the loss."""
    tokenize: Tokenization = "auto"
    """Words of BLEU: a tokenizer of sacreBLEU. `auto` is `zh` for Chinese references, `char` for
    other writing without spaces, else `13a`; the signature says which."""


class Examples(Protocol):
    """Encoded examples by position: an `EncodedDataset`, or a list."""

    def __getitem__(self, index: int, /) -> EncodedExample: ...


@dataclass(frozen=True)
class EvaluationResult:
    """What one evaluation measured."""

    metrics: dict[str, float]
    """Numbers under the names of `METRICS`; these go into `metrics.jsonl`."""
    num_examples: int
    num_targets: int
    details: dict[str, Any] = field(default_factory=dict)
    """What belongs to the metrics and is no number; see `measures`."""
    outputs: list[Any] = field(default_factory=list)
    """The objective's `Scores.outputs` of each example, in their order; empty where it gives
    none."""


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, what the model answers, and what the data answers."""

    prompt: tuple[Message, ...]
    answer: str
    reference: str
    stopped: bool = True
    """Whether the model ended the answer, and the longest length did not."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, as in `samples.jsonl`."""
        turns = [{"role": turn.role, "content": turn.content} for turn in self.prompt]
        return {
            "prompt": turns, "answer": self.answer, "reference": self.reference,
            "stopped": self.stopped,
        }  # fmt: skip


def evaluate_model(
    model: PreTrainedModel,
    objective: Objective,
    dataset: Examples,
    indices: Iterable[int],
    *,
    kind: TaskKind,
    micro_batch_tokens: int = 8192,
    window: int = 1024,
) -> EvaluationResult:
    """Score a model on encoded examples.

    Args:
        model: trained or in training; left exactly as found.
        objective: the objective that encoded the examples.
        dataset: the examples.
        indices: positions in ``dataset`` to evaluate.
        kind: the task's kind, which decides the metrics.
        micro_batch_tokens: most tokens of a forward pass.
        window: examples held at a time; memory does not grow with their number.

    Raises:
        DataError: there is nothing to evaluate, or a label that the model does not know.
    """
    device = next(model.parameters()).device
    loss_sum, num_targets, num_correct, num_bytes, num_examples = 0.0, 0, 0, 0, 0
    num_sentences, num_sentences_correct, sentence_loss_sum = 0, 0, 0.0
    all_bytes_known = kind == "text" and objective.head == "causal_lm"
    outputs: list[Any] = []
    with answering(model):
        for places in in_chunks(indices, window):
            examples = [dataset[int(place)] for place in places]
            num_examples += len(examples)
            num_bytes += sum(example["num_bytes"] for example in examples)
            all_bytes_known &= not any(example["num_removed_targets"] for example in examples)
            found: dict[int, Any] = {}
            for chosen in cut_into_batches(examples, objective, micro_batch_tokens):
                batch = objective.collate([examples[place] for place in chosen])
                scores = objective.score(model, to_device(batch, device))
                loss_sum += scores.loss_sum
                num_targets += scores.num_targets
                num_correct += scores.num_correct
                num_sentences += scores.num_sentences
                num_sentences_correct += scores.num_sentences_correct
                sentence_loss_sum += scores.sentence_loss_sum
                found.update(zip(chosen, scores.outputs, strict=False))  # none: sums are enough
            outputs += [found[place] for place in sorted(found)]
    if not num_examples:
        raise DataError(
            "there is no example to evaluate",
            hint="give a validation split that is not empty, or set `task.validation: null`",
        )
    if measure := MEASURES.get(kind):
        measured = measure(objective, outputs)
        return EvaluationResult(
            metrics={name: value for name, value in measured.items() if name in METRICS},
            num_examples=num_examples,
            num_targets=num_targets,
            details={name: value for name, value in measured.items() if name not in METRICS},
            outputs=outputs,
        )
    metrics = language_metrics(
        loss_sum - sentence_loss_sum, num_targets, num_bytes if all_bytes_known else 0
    )
    metrics["loss"] = loss_sum / num_targets
    if accuracy := guess_metric(objective):
        metrics[accuracy] = num_correct / num_targets
    if num_sentences:
        metrics["sentence_accuracy"] = num_sentences_correct / num_sentences
    # How often the likeliest token is the right one; of interest, but no metric to stop by.
    details = {"token_accuracy": num_correct / num_targets}
    return EvaluationResult(metrics, num_examples, num_targets, details, outputs)


# -- answers before and after ----------------------------------------------------------------------


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[ChatExample],
    *,
    num_samples: int,
    settings: GenerationSettings | None = None,
) -> list[Sample]:
    """Answer the last turn of the first ``num_samples`` conversations that leave room for it."""
    settings = settings or GenerationSettings(max_new_tokens=64)
    longest = context_length(model.config) - settings.max_new_tokens
    chosen: list[tuple[tuple[Message, ...], str, str]] = []
    for conversation in conversations:
        if len(chosen) >= num_samples:
            break
        turns = conversation.messages
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=0)
        if last == 0:
            continue
        prompt = turns[:last]
        if prompt[-1].role == "assistant":
            continue
        if len(render_prompt(tokenizer, prompt, where=conversation.where)) <= longest:
            chosen.append((prompt, turns[last].content, conversation.where))
    answers = generate(
        model,
        tokenizer,
        [prompt for prompt, _, _ in chosen],
        settings=settings,
        where=[where for _, _, where in chosen],
    )
    return [
        Sample(prompt, answer.text, reference, answer.stopped)
        for (prompt, reference, _), answer in zip(chosen, answers, strict=True)
    ]


# -- retention -------------------------------------------------------------------------------------


def encode_retention(
    documents: Iterable[TextExample],
    objective: CausalLM,
    *,
    num_tokens: int = 16384,
    window_tokens: int = 512,
) -> list[EncodedExample]:
    """The first ``num_tokens`` of a general text in windows, whatever objective is trained.

    Raises:
        DataError: the text is empty.
    """
    reader = replace(
        objective,
        max_length=min(window_tokens, objective.max_length),
        label_smoothing=0.0,
        z_loss=0.0,
    )
    windows: list[EncodedExample] = []
    total = 0
    for window in itertools.chain.from_iterable(map(reader.encode, documents)):
        if total >= num_tokens:
            break
        if any(window["targets"]):
            windows.append(window)
            total += len(window["input_ids"])
    if not windows:
        raise DataError("the retention text is empty", hint="set `evaluate.retention` to a text")
    return windows


@dataclass(frozen=True)
class Retention:
    """A general text, and how it is read: loss on it rises when a model forgets."""

    reader: CausalLM
    windows: Sequence[EncodedExample]


def evaluate_retention(
    model: PreTrainedModel,
    objective: CausalLM,
    windows: Sequence[EncodedExample],
    *,
    micro_batch_tokens: int = 8192,
) -> float:
    """`retention_loss`: mean cross-entropy on the general text, in nats per token."""
    result = evaluate_model(
        model,
        objective,
        windows,
        range(len(windows)),
        kind="text",
        micro_batch_tokens=micro_batch_tokens,
    )
    return result.metrics["loss"]


def retention_source(config: EvaluateConfig) -> str | None:
    """Where the general text comes from; None where retention is not measured.

    Raises:
        ConfigError: the source is empty.
    """
    if isinstance(config.retention, bool):
        return RETENTION_SOURCE if config.retention else None
    if not config.retention.strip():
        raise ConfigError(
            "`evaluate.retention` is empty", hint="give `true`, `false` or the source of a text"
        )
    return config.retention


def retention_reader(objective: Objective) -> CausalLM:
    """What reads the general text with the head that an objective trains.

    Raises:
        ConfigError: that head does not predict the next token.
    """
    if isinstance(objective, CausalLM):
        return objective
    if isinstance(objective, CausalStream):
        return objective.language_model
    raise ConfigError(
        "`evaluate.retention` is set, but what is trained here has no head that predicts the next "
        "token of a text",
        hint="set `evaluate.retention=false`",
    )


# -- the best model so far -------------------------------------------------------------------------


@dataclass
class BestTracker:
    """Which evaluation was the best, and whether it is time to stop.

    Of equal evaluations the earlier is the best; one that is not finite never is.

    Args:
        metric: a name of `METRICS`.
        stop_after: evaluations without improvement after which to stop; None never stops.
    """

    metric: str
    stop_after: int | None = None
    best_value: float | None = None
    best_step: int | None = None
    num_since_best: int = 0

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take note of an evaluation; True where it is the best so far."""
        if self.metric not in metrics:
            listed = ", ".join(f"`{name}`" for name in metrics)
            raise ConfigError(
                f"`evaluate.metric` is `{self.metric}`, which the evaluation did not measure",
                hint=f"choose from {listed}",
            )
        value = metrics[self.metric]
        higher = METRICS[self.metric].better == "higher"
        improved = math.isfinite(value) and (
            self.best_value is None
            or (value > self.best_value if higher else value < self.best_value)
        )
        if improved:
            self.best_value, self.best_step, self.num_since_best = value, step, 0
        else:
            self.num_since_best += 1
        return improved

    @property
    def should_stop(self) -> bool:
        """Whether the metric has not improved for ``stop_after`` evaluations."""
        return self.stop_after is not None and self.num_since_best >= self.stop_after

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold; plain JSON."""
        state = asdict(self)
        del state["stop_after"]  # a setting, which a resumed run may change
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: it tracked another metric.
        """
        if state.get("metric") != self.metric:
            raise CheckpointError(
                f"the checkpoint tracked the best `{state.get('metric')}`, but `evaluate.metric` "
                f"is now `{self.metric}`",
                hint="resume with the metric of the run, or start a new run",
            )
        self.best_value = state["best_value"]
        self.best_step = state["best_step"]
        self.num_since_best = state["num_since_best"]
