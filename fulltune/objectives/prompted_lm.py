"""Text to text on a decoder: the source is its prompt, and the target the answer that is trained.

A tokenizer with a chat template gets the prompt as the user's turn and the target as the
assistant's. Without one the prompt is a plain text, and the target ends with the end token. Prompt
and target are then tokenized apart, as generation meets them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fulltune.data import chat
from fulltune.data.encoding import EncodedExample, content_hash
from fulltune.data.special_text import encode_between, refuse_special_text_in
from fulltune.data.tasks import SOURCE_FIELD, Example, Message, SourceTargetExample
from fulltune.errors import DataError, ModelError
from fulltune.objectives.base import tokenizer_fingerprint
from fulltune.objectives.causal_lm import CausalLM, too_long_error
from fulltune.objectives.sequence_to_sequence import encode_text, pair_too_long_error


@dataclass(frozen=True)
class PromptedLM(CausalLM):
    """Next-token prediction of the target of each source.

    Args:
        max_length: longest prompt in tokens; a longer source is cut at its end, never the prompt
            around it.
        prompt: what the model is asked, with `{source}` once.
        max_target_length: longest target in tokens, its end token included.
        context: most tokens of prompt and target together.

    Raises:
        ModelError: the tokenizer has neither a chat template nor an end token.
    """

    prompt: str = SOURCE_FIELD
    max_target_length: int = 2**31
    context: int = 2**31

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template and self.tokenizer.eos_token is None:
            raise ModelError(
                "the tokenizer has neither a chat template nor an end token, so no answer ends",
                hint="name an `eos_token` in tokenizer_config.json",
            )

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens."""
        return tokenizer_fingerprint(
            self.tokenizer,
            objective="prompted_lm",
            prompt=self.prompt,
            max_length=self.max_length,
            max_target_length=self.max_target_length,
            context=self.context,
            too_long=self.too_long,
            special_tokens=self.special_tokens,
        )

    @property
    def info(self) -> dict[str, Any]:
        """What `fulltune.json` must hold for predictions to be encoded as training was."""
        return {"prompt": self.prompt, "max_target_length": self.max_target_length}

    def encode(self, example: Example) -> list[EncodedExample]:
        """One encoded pair, or none where it is dropped; other examples as `CausalLM` does.

        Raises:
            DataError: a side has no tokens, is too long and ``too_long`` is "error", or holds the
                text of a special token and ``special_tokens`` is "error".
        """
        if not isinstance(example, SourceTargetExample):
            return super().encode(example)
        assert example.target is not None, "only prediction does without the target"
        prompt, targets, after = self._encode_pair(example)
        whole_length, num_targets = len(prompt), len(targets)
        kept = targets[: self.max_target_length]
        room = min(self.max_length, self.context - len(kept))
        is_long = whole_length > room or num_targets > len(kept)
        if is_long and self.too_long == "drop":
            return []
        if is_long and self.too_long == "error":
            raise pair_too_long_error(
                example.where, whole_length, room, num_targets, self.max_target_length
            )
        if whole_length > room:
            prompt = self._shortened(example, room)
        if num_targets > len(kept) or len(prompt) + len(kept) + len(after) > self.context:
            after = []
        context = self.prompt.replace(SOURCE_FIELD, example.source)
        return [
            EncodedExample(
                input_ids=[*prompt, *kept, *after],
                targets=[*[0] * len(prompt), *[1] * len(kept), *[0] * len(after)],
                token_type_ids=[],
                labels=[],
                num_removed=whole_length - len(prompt) + num_targets - len(kept),
                num_removed_targets=num_targets - len(kept),
                input_hash=content_hash(context),
                example_hash=content_hash(context, "\0target", example.target),
                num_bytes=len(example.target.encode()),
                where=example.where,
                reference=example.target,
            )
        ]

    def prompt_ids(self, example: SourceTargetExample) -> list[int]:
        """What a model is given to answer a source.

        Raises:
            DataError: it has no tokens, or is too long and ``too_long`` is not "truncate".
        """
        prompt = self._encode_prompt(example, example.source)
        room = min(self.max_length, self.context - 1)
        if len(prompt) <= room:
            return prompt
        if self.too_long != "truncate":
            raise too_long_error(example.where, len(prompt), room)
        return self._shortened(example, room)

    def _encode_prompt(self, example: SourceTargetExample, source: str) -> list[int]:
        ids = self._encode_source(example, source)
        if not self.tokenizer.chat_template:
            return [*self._leading_ids, *ids]
        turns = [Message("user", self.prompt.replace(SOURCE_FIELD, source))]
        segments = chat.render_prompt(self.tokenizer, turns, where=example.where)
        return chat.encode_segments(self.tokenizer, segments)[0]

    def _encode_source(self, example: SourceTargetExample, source: str) -> list[int]:
        """Tokens of the prompt as a plain text, of which the source must have some."""
        before, _, after = self.prompt.partition(SOURCE_FIELD)
        ids, _ = encode_text(
            self.tokenizer,
            source,
            before=before,
            after=after,
            name="source",
            where=example.where,
            refuse=self.special_tokens == "error",
        )
        return ids

    def _encode_pair(self, example: SourceTargetExample) -> tuple[list[int], list[int], list[int]]:
        """Tokens of the prompt, of the target, and of what a chat template writes after it."""
        assert example.target is not None
        source_ids = self._encode_source(example, example.source)
        if self.special_tokens == "error":
            refuse_special_text_in(
                self.tokenizer, example.target, name="target", where=example.where
            )
        if not self.tokenizer.chat_template:
            ids, _ = encode_between(self.tokenizer, example.target)
            end = self.tokenizer.eos_token_id
            assert isinstance(end, int)
            return [*self._leading_ids, *source_ids], [*ids, end], []
        asked = Message("user", self.prompt.replace(SOURCE_FIELD, example.source))
        turns = [asked, Message("assistant", example.target)]
        segments = chat.render_conversation(self.tokenizer, turns, where=example.where)
        ids, targets = chat.encode_segments(self.tokenizer, segments)
        start = targets.index(1)
        stop = start + sum(targets)
        return ids[:start], ids[start:stop], ids[stop:]

    @cached_property
    def _leading_ids(self) -> list[int]:
        """What the tokenizer puts before a text, such as Llama's `<s>`."""
        whole = list(self.tokenizer("a")["input_ids"])
        alone = self.tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
        return whole[: whole.index(alone[0])] if alone and alone[0] in whole else []

    def _shortened(self, example: SourceTargetExample, room: int) -> list[int]:
        """The prompt of as much of a source as fits.

        Raises:
            DataError: nothing of it fits.
        """
        _, offsets = encode_between(self.tokenizer, example.source)
        kept = len(offsets)
        source, prompt = example.source, self._encode_prompt(example, example.source)
        while len(prompt) > room:
            kept -= len(prompt) - room
            source = example.source[: offsets[kept - 1][1]] if kept > 0 else ""
            if not source.strip():
                raise DataError(
                    f"{example.where}: of {room:,} tokens nothing is left for the source",
                    hint="raise `task.max_length`, or lower `task.max_target_length`",
                )
            prompt = self._encode_prompt(example, source)
        return prompt


def with_room(objective: PromptedLM, num_tokens: int) -> PromptedLM:
    """The objective with prompts so short that an answer of ``num_tokens`` fits after them.

    An answer longer than half of the context is given that half.
    """
    room = max(objective.context - num_tokens, objective.context // 2)
    return replace(objective, max_length=min(objective.max_length, room))
