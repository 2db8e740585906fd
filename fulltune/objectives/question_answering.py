"""The answer to a question as a span of its context, on a model of any family.

Two scores for each token, for the span's first and last one, as in BERT's head for SQuAD (Devlin et
al., 2019). Both are softmaxed over the tokens of the window's context and one more, the marker,
that stands for "the answer is not here"; the question and other special tokens are no candidates.

Shape suffixes: B rows, T tokens, D windows, L longest window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.data.tasks import AnswerUnits, Example, QuestionExample
from fulltune.errors import DataError
from fulltune.models.families import family_of
from fulltune.objectives.answer_spans import (
    best_spans,
    make_reference,
    read_reference,
    window_output,
)
from fulltune.objectives.base import (
    Batch,
    Scores,
    TooLong,
    collate_tokens,
    model_inputs,
    tokenizer_fingerprint,
)
from fulltune.objectives.causal_lm import MODEL_INPUTS
from fulltune.objectives.question_windows import CutQuestion, Window, cut_question, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNANSWERED = -1


class AnswerBatch(TypedDict):
    """A micro-batch of windows.

    input_ids:      int64 [1, T] packed windows, or [B, T] right-padded where packing is off.
    token_places:   int64 [D, L], each window's tokens in the flattened ones; 0 behind its end.
    is_context:     bool [D, L], whether the token is one of the context.
    markers:        int64 [D], the place in the window of the token that stands for no answer.
    starts, ends:   int64 [D], the place in the window of the answer's first and last token, the
                    marker where it is not here; ``UNANSWERED`` when only predicting.
    references:     the `Reference` of each window, as JSON.
    token_type_ids: int64, shaped like ``input_ids``; absent where the model has no segments.
    attention_mask: int64 [B, T], 1 on tokens and 0 on padding; absent when packed.
    position_ids, cu_seq_lens_q, ...: document boundaries, present when packed.
    """

    input_ids: Tensor
    token_places: Tensor
    is_context: Tensor
    markers: Tensor
    starts: Tensor
    ends: Tensor
    references: list[str]
    token_type_ids: NotRequired[Tensor]
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    cu_seq_lens_q: NotRequired[Tensor]
    cu_seq_lens_k: NotRequired[Tensor]
    max_length_q: NotRequired[int]
    max_length_k: NotRequired[int]


@dataclass(frozen=True)
class QuestionAnswering:
    """The mean of two cross-entropies for each window: of the answer's first and last token.

    Args:
        tokenizer: a fast tokenizer.
        max_length: longest window in tokens.
        marker: which token of a window stands for no answer in it.
        stride: tokens of the context that neighbouring windows share; None is a quarter of
            ``max_length``.
        too_long: what happens to a question that leaves too little room for its context.
        longest_answer: in tokens, when predicting.
        no_answer: whether a question may have none; then the model may say so.
        repeated_answer: what happens to an answer without a place that occurs several times.
        answer_units: what metrics count.
        packing: whether the model isolates windows packed into one row.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    marker: Literal["first", "last"]
    stride: int | None = None
    too_long: TooLong = "error"
    longest_answer: int = 30
    no_answer: bool = False
    repeated_answer: Literal["error", "first"] = "error"
    answer_units: AnswerUnits = "words"
    packing: bool = True

    @property
    def head(self) -> Literal["question_answering"]:
        """Two scores for each token."""
        return "question_answering"

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens."""
        return tokenizer_fingerprint(
            self.tokenizer,
            objective="question_answering",
            max_length=self.max_length,
            marker=self.marker,
            stride=self.stride,
            too_long=self.too_long,
            no_answer=self.no_answer,
            repeated_answer=self.repeated_answer,
        )

    def encode(self, example: Example) -> list[EncodedExample]:
        """The windows of a question; none if it was too long and is dropped.

        The targets are the tokens of the first answer, where all of it is in the window, else the
        marker; none when only predicting.

        Raises:
            DataError: the question is too long, its answer is missing or its place is not known.
            ModelError: the tokenizer does not say which characters its tokens are.
        """
        if not isinstance(example, QuestionExample):
            raise TypeError(f"{type(example).__name__} has no question")
        cut = cut_question(
            self.tokenizer,
            example.question,
            example.context,
            max_length=self.max_length,
            stride=self.max_length // 4 if self.stride is None else self.stride,
            marker=self.marker,
            too_long=self.too_long,
            where=example.where,
        )
        tokens = None if example.answers is None else self._answer_tokens(example, cut)
        return [
            self._encoded(example, cut, number, tokens, len(cut.windows))
            for number in range(len(cut.windows))
        ]

    def _answer_tokens(self, example: QuestionExample, cut: CutQuestion) -> tuple[int, int] | None:
        """The first and the last context token of the answer that is trained; None without one."""
        if not example.answers:
            if not self.no_answer:
                raise DataError(
                    f"{example.where}: the question has no answer",
                    hint="set `task.no_answer=true` where some have none in their context, or "
                    "drop the row",
                )
            return None
        text, start = example.answers[0].text, example.answers[0].start
        if start is None:
            start = example.context.index(text)
            again = example.context.find(text, start + 1)
            if again >= 0 and self.repeated_answer == "error":
                raise DataError(
                    f"{example.where}: the answer `{text}` stands in its context at {start} and "
                    f"at {again}, and nothing says which is meant",
                    hint="give its `answer_start`, or set `task.repeated_answer=first`",
                )
        found = tokens_of(cut.begins, cut.ends, start, start + len(text))
        if found is None:
            raise DataError(
                f"{example.where}: the tokenizer finds no token in the answer `{text}`",
                hint="drop the row",
            )
        return found

    def _encoded(
        self,
        example: QuestionExample,
        cut: CutQuestion,
        number: int,
        answer: tuple[int, int] | None,
        num_windows: int,
    ) -> EncodedExample:
        window = cut.windows[number]
        targets = [0] * len(window.input_ids)
        if example.answers is not None:
            first, last = self._place_here(window, answer)
            targets[first : last + 1] = [1] * (last + 1 - first)
        texts = None if example.answers is None else [each.text for each in example.answers]
        question_hash = content_hash(example.where, example.id or "", *_content(example))
        return EncodedExample(
            input_ids=window.input_ids,
            targets=targets,
            token_type_ids=window.token_type_ids,
            labels=[],
            num_removed=cut.num_removed,
            num_removed_targets=0,
            # Questions on one context stay on one side of a split: each tells of the others.
            input_hash=content_hash(example.context),
            example_hash=content_hash(*_content(example), *(texts or ()), str(number)),
            num_bytes=0,
            where=example.where,
            reference=make_reference(example, window, f"{question_hash:x}", texts),
        )

    def _place_here(self, window: Window, answer: tuple[int, int] | None) -> tuple[int, int]:
        """The targets in a window, given the answer's tokens in the whole context."""
        if answer is not None:
            first, last = (place - window.num_before for place in answer)
            if first >= 0 and last < len(window.begins):
                return window.first + first, window.first + last
        marker = 0 if self.marker == "first" else len(window.input_ids) - 1
        return marker, marker

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `AnswerBatch`."""
        batch, starts_D = collate_tokens(
            examples, packing=self.packing, padding=self.tokenizer.pad_token_id or 0
        )
        lengths = [len(example["input_ids"]) for example in examples]
        shape = (len(examples), max(lengths))
        places_DL = starts_D[:, None] + torch.arange(shape[1])
        is_real_DL = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
        is_context_DL = torch.zeros(shape, dtype=torch.bool)
        spans = []
        for row, example in enumerate(examples):
            reference = read_reference(example["reference"])
            first = reference["first"]
            is_context_DL[row, first : first + len(reference["begins"])] = True
            targets = [place for place, target in enumerate(example["targets"]) if target]
            spans.append((targets[0], targets[-1]) if targets else (UNANSWERED, UNANSWERED))
        spans_D2 = torch.tensor(spans)
        batch["token_places"] = places_DL.masked_fill(~is_real_DL, 0)
        batch["is_context"] = is_context_DL
        batch["markers"] = torch.tensor(
            [0 if self.marker == "first" else length - 1 for length in lengths]
        )
        batch["starts"], batch["ends"] = spans_D2[:, 0], spans_D2[:, 1]
        batch["references"] = [example["reference"] for example in examples]
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Windows of the batch; each has one answer, or the marker."""
        return int(batch["starts"].numel())

    def log_probabilities(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Of each token to be the answer's first and its last: float32 [D, L, 2].

        Minus infinity where a token is neither of the context nor the marker.
        """
        family = family_of(model.config)
        inputs = model_inputs(batch, (*MODEL_INPUTS, "token_type_ids"))
        if family.can_generate or family.decoder_input:
            inputs["use_cache"] = False  # of keys and values: nothing is generated
        output = model(**inputs)
        logits_BT2 = torch.stack([output.start_logits, output.end_logits], dim=-1)
        logits_DL2 = logits_BT2.float().flatten(0, 1)[batch["token_places"]]
        is_candidate_DL = batch["is_context"].scatter(1, batch["markers"][:, None], True)
        return logits_DL2.masked_fill(~is_candidate_DL[:, :, None], -torch.inf).log_softmax(1)

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Mean cross-entropy of first and last token, summed over windows: a float32 scalar."""
        return _losses(self.log_probabilities(model, batch), batch).sum()

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """The same; ``outputs`` are a `WindowOutput` for each window."""
        with torch.no_grad():
            scores_DL2 = self.log_probabilities(model, batch)
        losses_D = torch.full((len(scores_DL2),), torch.nan)
        if bool((batch["starts"] != UNANSWERED).all()):
            losses_D = _losses(scores_DL2, batch).cpu()
        markers_D = batch["markers"]
        no_answer_D = scores_DL2[torch.arange(len(markers_D)), markers_D].sum(-1)
        best = best_spans(
            scores_DL2.masked_fill(~batch["is_context"][:, :, None], -torch.inf),
            longest=self.longest_answer,
        )
        return Scores(
            loss_sum=float(losses_D.sum()),
            num_targets=self.num_targets(batch),
            outputs=[
                window_output(read_reference(text), spans, no_answer, loss)
                for text, spans, no_answer, loss in zip(
                    batch["references"], best, no_answer_D.tolist(), losses_D.tolist(), strict=True
                )
            ],
        )


def _content(example: QuestionExample) -> tuple[str, str]:
    return example.question, example.context


def _losses(scores_DL2: Tensor, batch: Batch) -> Tensor:
    """The loss of each window [D]."""
    starts = F.nll_loss(scores_DL2[:, :, 0], batch["starts"], reduction="none")
    ends = F.nll_loss(scores_DL2[:, :, 1], batch["ends"], reduction="none")
    return (starts + ends) / 2
