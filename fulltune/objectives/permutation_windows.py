"""Windows of a text in XLNet's layout, each with the tokens before it as its memory.

Shape suffix: W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from fulltune.data.encoding import SENTENCE_START, EncodedExample, content_hash
from fulltune.data.streams import TokenStream, tokens_hash

# Segments as XLNet's own tokenizer numbers them; only whether two are equal matters to the model.
TEXT_SEGMENT, SECOND_SEGMENT, CLASS_SEGMENT, PADDING_SEGMENT = 0, 1, 2, 3

BACKWARD = "backward"
"""`label` of a window that is read from the end of the text to its beginning."""


@dataclass(frozen=True)
class Layout:
    """What a window holds.

    Attributes:
        length: tokens of a window with its separators and class token, without its memory.
        memory_length: most tokens before a window that come with it.
        reuse_length: tokens at its front, after which the next window begins; 0 where windows
            follow each other.
        pairs: whether what follows them is two segments, each with a separator.
        backward: whether all text is also read from its end.
    """

    length: int
    memory_length: int = 0
    reuse_length: int = 0
    pairs: bool = False
    backward: bool = False

    @property
    def text_tokens(self) -> int:
        """Tokens of a full window that are text."""
        return self.length - (3 if self.pairs else 2)

    @property
    def step(self) -> int:
        """Tokens from the beginning of a window to that of the next."""
        return self.reuse_length or self.text_tokens


class PermutationWindows:
    """Windows of a token stream in XLNet's layout, with the tokens before them as memory.

    An example's ``input_ids`` are ``[memory ... text ... <sep> <cls>]``, or with pairs ``[memory
    ... reused ... first ... <sep> second ... <sep> <cls>]``; its ``targets`` are 1 on the text, so
    the memory is what comes before the first 1. Its ``label`` is `BACKWARD` where the text, the
    memory with it, is reversed: first come all windows read forward, then all read backward.

    With pairs, the text behind the reused part is cut at the beginning of a sentence. In half of
    the windows, and always if no sentence begins there, the second segment is as many tokens from
    elsewhere in the split, from the beginning of a sentence on (as in the authors'
    `_split_a_and_b`). Pairs are drawn once, from the seed and the window's number.

    Args:
        stream: windows of ``layout.step`` tokens, with boundaries if there are pairs.
        layout: what a window holds.
        seed: of the pairs.
        sep_id: the separator.
        cls_id: the class token.

    Attributes:
        lengths: int32, tokens of each example with its memory.
        fingerprint: hash of all that decides the examples.
    """

    def __init__(
        self, stream: TokenStream, layout: Layout, *, seed: int, sep_id: int, cls_id: int
    ) -> None:
        self._stream, self._layout, self._seed = stream, layout, seed
        self._sep_id, self._cls_id = sep_id, cls_id
        self._total = int(stream.lengths.sum(dtype=np.int64))
        starts_W = np.arange(len(stream), dtype=np.int64) * layout.step
        texts_W = np.minimum(layout.text_tokens, self._total - starts_W)
        added_W = 2 + (layout.pairs & (texts_W - layout.reuse_length >= 2))
        memories_W = np.minimum(starts_W, layout.memory_length)
        lengths_W = (memories_W + texts_W + added_W).astype(np.int32)
        self.lengths: npt.NDArray[np.int32] = np.tile(lengths_W, 1 + layout.backward)
        parts = (stream.fingerprint, *map(str, (*astuple(layout), seed, sep_id, cls_id)))
        self.fingerprint = f"{content_hash(*parts) % 2**64:016x}"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> EncodedExample:
        index = range(len(self))[index]
        backward, start, stop = self._place(index)
        layout = self._layout
        memory, _ = self._read(max(0, start - layout.memory_length), start, backward)
        text, begins = self._read(start, stop, backward)
        segments = [text]
        if layout.pairs and len(text) - layout.reuse_length >= 2:
            segments = self._pair(text, begins, index, backward)
        input_ids, targets, token_types = list(memory), [0] * len(memory), [0] * len(memory)
        for number, segment in enumerate(segments):
            input_ids += [*segment, self._sep_id]
            targets += [*[1] * len(segment), 0]
            token_types += [(TEXT_SEGMENT, SECOND_SEGMENT)[number]] * (len(segment) + 1)
        digest = tokens_hash([token for segment in segments for token in segment])
        return EncodedExample(
            input_ids=[*input_ids, self._cls_id],
            targets=[*targets, 0],
            token_type_ids=[*token_types, CLASS_SEGMENT],
            labels=[BACKWARD] if backward else [],
            num_removed=0,
            num_removed_targets=0,
            input_hash=digest,
            example_hash=digest,
            num_bytes=0,  # a sixth of the tokens is predicted, so there are no bits per byte
            where=self.where(index),
        )

    def where(self, index: int) -> str:
        """File and line of the document that a window begins in, or ends in if read backward."""
        backward, start, stop = self._place(range(len(self))[index])
        first = self._total - stop if backward else start
        return self._stream.where(first // self._layout.step)

    def _place(self, index: int) -> tuple[bool, int, int]:
        """Direction of a window, and where it starts and ends, counted in that direction."""
        backward, number = divmod(index, len(self._stream))
        start = number * self._layout.step
        return bool(backward), start, min(start + self._layout.text_tokens, self._total)

    def _read(self, start: int, stop: int, backward: bool) -> tuple[list[int], list[bool]]:
        """Tokens between two places of the text, and whether a sentence begins with each."""
        if not backward:
            return self._read_forward(start, stop)
        first, end = self._total - stop, self._total - start
        # Read backward, a token begins a sentence if the one behind it begins the next.
        tokens, begins = self._read_forward(first, min(end + 1, self._total))
        begins = (begins if end < self._total else [*begins, True])[1:]
        return tokens[: end - first][::-1], begins[::-1]

    def _read_forward(self, start: int, stop: int) -> tuple[list[int], list[bool]]:
        step = self._layout.step
        tokens: list[int] = []
        marks: list[int] = []
        for number in range(start // step, -(-stop // step)):
            window = self._stream[number]
            tokens += window["input_ids"]
            marks += window.get("boundaries", [0] * len(window["input_ids"]))
        part = slice(start % step, start % step + stop - start)
        return tokens[part], [bool(mark & SENTENCE_START) for mark in marks[part]]

    def _pair(
        self, text: Sequence[int], begins: Sequence[bool], index: int, backward: bool
    ) -> list[list[int]]:
        """The reused part with the first segment, and the second."""
        generator = np.random.default_rng(np.random.SeedSequence([self._seed, index]))
        first, end = self._layout.reuse_length + 1, len(text)
        cuts = [place for place in range(first, end) if begins[place]]
        cut = int(generator.choice(cuts) if cuts else generator.integers(first, end))
        if cuts and generator.random() < 0.5:
            return [list(text[:cut]), list(text[cut:])]
        place = int(generator.integers(self._total - (end - cut) + 1))
        before = max(0, place - self._layout.length)
        _, sentences = self._read(before, place + 1, backward)
        place = max(
            (before + each for each, is_one in enumerate(sentences) if is_one), default=place
        )
        second, _ = self._read(place, place + end - cut, backward)
        return [list(text[:cut]), second]
