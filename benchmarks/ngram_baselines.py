"""Does a pre-trained model know more than counts? Its held-out loss against n-gram baselines.

    python benchmarks/ngram_baselines.py runs/pretrain-gpt runs/pretrain-bert

Reads the settings of each run, splits its text as it did, and asks a unigram and a bigram for the
very targets on which `fulltune evaluate` measures the model: the same held-out tokens, hidden by
the same draw. Both count all tokens of the run's training split.

- **unigram**: how often a token is, with a little for those never seen.
- **bigram**: interpolated Kneser-Ney with one discount (Chen and Goodman, 1999), which was ahead of
  Jelinek-Mercer and Witten-Bell where they compared them. The discount is the best on a tenth of
  the training split of counts from the rest; then all is counted.

The bigram's context is the *true* left neighbour of a target, even where the model sees a mask
there, or a sentinel. So of masked tokens, permutations and spans it knows something that the model
does not; of next tokens it knows what the model knows of the last one.

Targets that are no tokens of the text (T5's sentinels and its end) are given to the baselines for
nothing where they are certain. Where they end a span, the baselines know the share of noise tokens
after which one ends, counted on the targets themselves, and a noise token costs what the span did
not end there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fulltune.config import build_config, read_yaml
from fulltune.errors import ConfigError, FulltuneError
from fulltune.objectives.base import Objective
from fulltune.objectives.span_corruption import SpanCorruption
from fulltune.recipes import evaluate, pretrain
from fulltune.train.run_folder import CONFIG

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

NOTHING_BEFORE = -1
"""The context of a token that begins its window."""
DISCOUNTS = tuple(round(0.05 * number, 2) for number in range(4, 20))
HELD_OUT_OF_TRAINING = 10
"""One of so many training windows, on which the discount is chosen."""
UNSEEN = 0.01
"""Added to the count of every token of the vocabulary."""


@dataclass(frozen=True)
class Pairs:
    """Tokens with the token to their left.

    previous: int64 [N], `NOTHING_BEFORE` where there is none.
    tokens: int64 [N].
    """

    previous: IntArray
    tokens: IntArray

    @staticmethod
    def joined(parts: Iterable[tuple[IntArray, IntArray]]) -> Pairs:
        """Those of several windows."""
        columns = list(parts)
        return Pairs(*(np.concatenate([part[side] for part in columns]) for side in (0, 1)))


class Unigram:
    """How often each token of the vocabulary is: counts plus `UNSEEN`."""

    def __init__(self, pairs: Pairs, vocab_size: int) -> None:
        counts_V = np.bincount(pairs.tokens, minlength=vocab_size) + UNSEEN
        self.shares_V: FloatArray = counts_V / counts_V.sum()

    def probabilities(self, pairs: Pairs) -> FloatArray:
        """Of each token: [N]."""
        return self.shares_V[pairs.tokens]


class Bigram:
    """Interpolated Kneser-Ney over pairs of neighbours.

    p(w | v) = max(c(vw) - d, 0) / c(v) + d N(v) / c(v) * q(w), where N(v) is the number of tokens
    seen after v, and q(w) in proportion to the number of tokens seen before w (Chen and Goodman,
    1999, equation 16).
    """

    def __init__(self, pairs: Pairs, vocab_size: int, discount: float) -> None:
        self.vocab_size, self.discount = vocab_size, discount
        self.codes, self.counts = np.unique(self._codes(pairs), return_counts=True)
        before, after = self.codes // vocab_size, self.codes % vocab_size
        # One row more, for `NOTHING_BEFORE`.
        self.totals_V = np.bincount(before, weights=self.counts, minlength=vocab_size + 1)
        self.kinds_V = np.bincount(before, minlength=vocab_size + 1)
        continuations_V = np.bincount(after, minlength=vocab_size) + UNSEEN
        self.lower_V: FloatArray = continuations_V / continuations_V.sum()

    def _codes(self, pairs: Pairs) -> IntArray:
        return (pairs.previous + 1) * self.vocab_size + pairs.tokens

    def probabilities(self, pairs: Pairs) -> FloatArray:
        """Of each token after the one to its left: [N]."""
        wanted = self._codes(pairs)
        places = np.minimum(np.searchsorted(self.codes, wanted), len(self.codes) - 1)
        counts = np.where(self.codes[places] == wanted, self.counts[places], 0)
        totals, kinds = (each[pairs.previous + 1] for each in (self.totals_V, self.kinds_V))
        seen = np.maximum(totals, 1)
        rest = np.where(totals > 0, self.discount * kinds / seen, 1.0)
        found: FloatArray = np.maximum(counts - self.discount, 0) / seen
        return found + rest * self.lower_V[pairs.tokens]


def best_discount(windows: list[tuple[IntArray, IntArray]], vocab_size: int) -> float:
    """The discount that gives a tenth of the training windows the least loss, from the others."""
    kept = [pair for number, pair in enumerate(windows) if number % HELD_OUT_OF_TRAINING]
    asked = Pairs.joined(windows[::HELD_OUT_OF_TRAINING])
    counted = Pairs.joined(kept or windows)

    def loss(discount: float) -> float:
        model = Bigram(counted, vocab_size, discount)
        return float(-np.log(model.probabilities(asked)).mean())

    return min(DISCOUNTS, key=loss)


@dataclass(frozen=True)
class Targets:
    """What a run's evaluation asks for.

    pairs: the targets that are tokens of the text, with their true left neighbours.
    may_end: bool [N], whether the span could have ended before the token.
    num_ends: targets that end a span, of the text's own none.
    num_certain: targets that are always the same at their place.
    """

    pairs: Pairs
    may_end: npt.NDArray[np.bool_]
    num_ends: int = 0
    num_certain: int = 0

    def nats(self, probabilities: FloatArray) -> float:
        """Mean loss a target, all targets counted, of probabilities of the text's tokens."""
        total = float(-np.log(probabilities).sum())
        num_going_on = int(self.may_end.sum())
        if self.num_ends:
            share = self.num_ends / (self.num_ends + num_going_on)
            total -= self.num_ends * np.log(share)
            if num_going_on:
                total -= num_going_on * np.log1p(-share)
        return total / self.number

    @property
    def number(self) -> int:
        """Of all targets."""
        return len(self.pairs.tokens) + self.num_ends + self.num_certain


def training_pairs(example: Any) -> tuple[IntArray, IntArray]:
    """The tokens of one training window that can be targets, and what stands left of each."""
    ids = np.asarray(example["input_ids"], dtype=np.int64)
    wanted = np.asarray(example["targets"], dtype=np.bool_)
    return with_neighbours(ids, np.flatnonzero(wanted))


def with_neighbours(ids: IntArray, places: IntArray) -> tuple[IntArray, IntArray]:
    previous = np.concatenate([[NOTHING_BEFORE], ids[:-1]])
    return previous[places], ids[places]


def target_places(objective: Objective, example: Any) -> IntArray:
    """Where in a window the targets of its evaluation stand."""
    batch = objective.collate([example])
    ids = np.asarray(example["input_ids"], dtype=np.int64)
    if "target_mapping" in batch:
        memory = len(ids) - batch["input_ids"].shape[1]
        mapping_PL = batch["target_mapping"][0][batch["target_rows"]]
        places = mapping_PL.argmax(-1).numpy() + memory
    elif "target_positions" in batch:
        places = batch["target_positions"].numpy()
    else:
        places = batch["prediction_positions"].numpy() + 1
    if not np.array_equal(ids[places], batch["target_ids"].numpy()):
        raise AssertionError("the targets are not the tokens at their places")
    found: IntArray = places
    return found


def span_targets(objective: SpanCorruption, examples: Iterable[Any]) -> Targets:
    """The noise of each window, and what else stands among the targets.

    Of ``e0 b1 e1 b2 ... end`` the first sentinel is certain, and each later one, like the end,
    stands where a span may as well have gone on.
    """
    pairs, inside, num_ends, num_certain = [], [], 0, 0
    for example in examples:
        inputs, targets = objective.corrupt(example)
        ids = np.asarray(example["input_ids"], dtype=np.int64)
        kept, noise = (cut_at(side[:-1], objective.sentinels) for side in (inputs, targets))
        spans = noise[1:]  # nothing stands before the first sentinel
        begins = np.cumsum([len(part) for part in kept[: len(spans)]])
        begins += np.cumsum([0, *[len(span) for span in spans[:-1]]])
        places = np.concatenate(
            [begin + np.arange(len(span)) for begin, span in zip(begins, spans, strict=True)]
        )
        if not np.array_equal(ids[places], np.concatenate(spans)):
            raise AssertionError("the noise is not what stands at its places")
        pairs.append(with_neighbours(ids, places))
        inside += [position > 0 for span in spans for position in range(len(span))]
        num_ends += len(spans)
        num_certain += 1
    return Targets(Pairs.joined(pairs), np.asarray(inside), num_ends, num_certain)


def cut_at(tokens: Sequence[int], marks: Sequence[int]) -> list[list[int]]:
    """The parts between some tokens, which fall away."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token in marks:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def held_out_targets(objective: Objective, examples: list[Any]) -> Targets:
    """What the evaluation of a run asks for on its held-out windows."""
    if isinstance(objective, SpanCorruption):
        return span_targets(objective, examples)
    pairs = Pairs.joined(
        with_neighbours(np.asarray(example["input_ids"]), target_places(objective, example))
        for example in examples
    )
    return Targets(pairs, np.zeros(len(pairs.tokens), np.bool_))


@dataclass(frozen=True)
class Comparison:
    """Held-out loss in nats a target, of the same targets."""

    run: str
    objective: str
    vocab_size: int
    num_training_tokens: int
    num_targets: int
    discount: float
    unigram: float
    bigram: float
    model: float

    @property
    def margin(self) -> float:
        """Nats a target by which the model is ahead of the bigram."""
        return self.bigram - self.model


def compare(run: str) -> Comparison:
    """Count, ask, and evaluate the model.

    Raises:
        ConfigError: the folder is no run of pre-training, or its loss is not of tokens alone.
        DataError: the data of the run has changed.
    """
    folder = Path(run)
    config = open_config(folder)
    report = evaluate.run(run)
    update = {"model": run, "tokenizer": None, "architecture": {}, "convert_to": None}
    trained = config.model_copy(update=update)
    base, objective = pretrain.open_start(trained)
    prepared = pretrain.prepare(trained, objective, lambda _: None)
    windows = [training_pairs(prepared.dataset[int(index)]) for index in prepared.train]
    training = Pairs.joined(windows)
    vocab_size = len(base.tokenizer)
    held_out = [prepared.dataset[int(index)] for index in prepared.validation]
    targets = held_out_targets(prepared.objective, held_out)
    if targets.number != report.num_targets:
        raise AssertionError(
            f"{targets.number:,} targets, but the model was measured on {report.num_targets:,}"
        )
    discount = best_discount(windows, vocab_size)
    unigram = Unigram(training, vocab_size)
    bigram = Bigram(training, vocab_size, discount)
    return Comparison(
        run=run,
        objective=type(prepared.objective).__name__,
        vocab_size=vocab_size,
        num_training_tokens=len(training.tokens),
        num_targets=targets.number,
        discount=discount,
        unigram=targets.nats(unigram.probabilities(targets.pairs)),
        bigram=targets.nats(bigram.probabilities(targets.pairs)),
        model=report.metrics["loss"],
    )


def open_config(folder: Path) -> pretrain.Config:
    """The settings of a run whose loss is that of tokens.

    Raises:
        ConfigError: the folder is none.
    """
    values = read_yaml(folder / CONFIG)
    if "objective" not in values:
        raise ConfigError(
            f"`{folder}` is no run of pre-training", hint="name a run of `fulltune pretrain`"
        )
    config = build_config(pretrain.Config, values)
    chosen = config.objective
    one_text = not (chosen.permutation.pairs or chosen.permutation.backward)
    if chosen.name == "sentence_pairs" or chosen.spans.mixture == "ul2" or not one_text:
        raise ConfigError(
            f"the loss of `{folder}` is not of tokens in the order of the text alone, so counts "
            "have nothing to say of it",
            hint="name a run without pairs and reversed text, and of one kind of noise",
        )
    return config


COLUMNS = ("run", "vocabulary", "targets", "unigram", "bigram", "model", "margin")


def table(comparisons: Sequence[Comparison]) -> str:
    """One row a run, in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for found in comparisons:
        cells = (
            found.run, f"{found.vocab_size:,}", f"{found.num_targets:,}", f"{found.unigram:.3f}",
            f"{found.bigram:.3f}", f"{found.model:.3f}", f"{found.margin:+.3f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    try:
        comparisons = [compare(run) for run in arguments.runs]
    except FulltuneError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 2
    print(table(comparisons))
    if arguments.json:
        rows = [{**asdict(found), "margin": found.margin} for found in comparisons]
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0 if all(found.margin > 0 for found in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
