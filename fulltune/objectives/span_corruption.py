"""Span corruption (T5) and the mixture of denoisers (UL2), for encoder-decoders.

Shape suffixes: B rows, S tokens of the inputs, T tokens of the targets, H hidden size, N targets,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from fulltune.config import Settings
from fulltune.data.arranged import Documents
from fulltune.data.encoding import EncodedExample
from fulltune.data.streams import TokenStream
from fulltune.data.tasks import Example
from fulltune.errors import DataError, ModelError
from fulltune.models.evaluation_mode import evaluation_mode
from fulltune.objectives.base import Batch, Scores, token_scores, tokenizer_fingerprint
from fulltune.objectives.documents import encode_document
from fulltune.objectives.linear_cross_entropy import LossSums
from fulltune.objectives.noise import noise_generator
from fulltune.objectives.plain_head import is_plain, logit_scale, plain_head_losses
from fulltune.objectives.spans import UL2_DENOISERS, Denoiser, corrupt, raw_length

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class SpanCorruptionBatch(TypedDict):
    """A micro-batch for an encoder-decoder.

    input_ids:      int64 [B, S], corrupted tokens, right-padded.
    attention_mask: int64 [B, S], 1 on tokens and 0 on padding; absent where nothing is padded.
    decoder_input_ids: int64 [B, T], the targets one place to the right, right-padded. The first
                    column is the pad token until the loss puts the model's start token there.
    prediction_positions: int64 [N], into the flattened [B * T]: where a target is predicted.
    target_ids:     int64 [N], the token to be predicted there. There is no ignored value.
    document_targets: how many of them each example has, one after another.
    """

    input_ids: Tensor
    attention_mask: NotRequired[Tensor]
    decoder_input_ids: Tensor
    prediction_positions: Tensor
    target_ids: Tensor
    document_targets: list[int]


class SpanConfig(Settings):
    """`span_corruption`: which tokens are noise."""

    mixture: Literal["t5", "ul2"] = "t5"
    """`t5` is one kind of noise; `ul2` is seven, one drawn for each example and told by a mode
    token where the tokenizer has `[NLU]`, `[NLG]` and `[S2S]`."""
    noise_density: Annotated[float, Field(gt=0, le=0.9)] = 0.15
    """`t5`: share of the tokens that is noise. A window is as much text as fills the inputs once
    the noise is out: at 0.9 already ten times `objective.length`."""
    mean_length: Annotated[float, Field(ge=1)] = 3.0
    """`t5`: tokens of a span of noise, on average."""

    @model_validator(mode="after")
    def _refuse_settings_without_effect(self) -> SpanConfig:
        for key in ("noise_density", "mean_length"):
            if self.mixture == "ul2" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"`objective.spans.{key}` has no effect with `objective.spans.mixture: ul2`; "
                    "leave it out"
                )
        return self


@dataclass(frozen=True)
class SpanCorruption:
    """Rebuild the spans that sentinels stand for.

    Documents are one stream, each with its end token, cut into windows that fill the encoder after
    corruption: with T5's noise no token is padding.

    Args:
        tokenizer: with the sentinels ``<extra_id_0>``, ``<extra_id_1>``, ..., an end and a pad
            token.
        max_length: tokens of the corrupted inputs.
        spans: which tokens are noise.

    Raises:
        ModelError: the tokenizer lacks one of its special tokens, or sentinels.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    spans: SpanConfig = field(default_factory=SpanConfig)
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("eos_token", "pad_token"):
            if getattr(self.tokenizer, name) is None:
                raise ModelError(
                    f"the tokenizer has no `{name}`, which span corruption needs",
                    hint="use a tokenizer made for T5",
                )
        needed = self._num_spans(self.max_length)
        num_sentinels = len(self.sentinels)
        if num_sentinels < needed:
            raise ModelError(
                f"the tokenizer has {num_sentinels} sentinels (`<extra_id_0>` and so on), but "
                f"`objective.length: {self.max_length}` reads {self.window_tokens:,} tokens at "
                f"once, with up to {needed} spans of noise",
                hint=self._fewer_spans(num_sentinels),
            )

    @property
    def head(self) -> Literal["sequence_to_sequence"]:
        """The language-modelling head over a decoder."""
        return "sequence_to_sequence"

    @property
    def packing(self) -> bool:
        """Never: windows fill their rows already."""
        return False

    @property
    def fingerprint(self) -> str:
        """Changes whenever `encode` would give other tokens."""
        return tokenizer_fingerprint(
            self.tokenizer, objective="span_corruption", sentinels=self.sentinels
        )

    @cached_property
    def denoisers(self) -> tuple[Denoiser, ...]:
        """The kinds of noise an example's is drawn from."""
        if self.spans.mixture == "ul2":
            return UL2_DENOISERS
        return (Denoiser(self.spans.noise_density, self.spans.mean_length),)

    @cached_property
    def sentinels(self) -> tuple[int, ...]:
        """Ids of ``<extra_id_0>``, ``<extra_id_1>``, ... as far as the tokenizer has them."""
        ids = self.tokenizer.get_vocab()
        found: list[int] = []
        while (sentinel := ids.get(f"<extra_id_{len(found)}>")) is not None:
            found.append(sentinel)
        return tuple(found)

    @cached_property
    def mode_ids(self) -> dict[str, int]:
        """Ids of the mode tokens; empty unless the mixture is UL2's and all three are there."""
        ids = self.tokenizer.get_vocab()
        modes = {denoiser.mode for denoiser in self.denoisers}
        if self.spans.mixture != "ul2" or not modes <= ids.keys():
            return {}
        return {mode: ids[mode] for mode in modes}

    @cached_property
    def window_tokens(self) -> int:
        """Tokens before corruption: as many as fit ``max_length`` with every kind of noise."""
        return self._window_tokens(self.max_length)

    def _window_tokens(self, max_length: int) -> int:
        longest = max_length - bool(self.mode_ids)
        return min(raw_length(longest, denoiser)[0] for denoiser in self.denoisers)

    def _num_spans(self, max_length: int) -> int:
        """The most sentinels that a window takes."""
        window = self._window_tokens(max_length)
        return max(denoiser.counts(window)[1] for denoiser in self.denoisers)

    def _fewer_spans(self, num_sentinels: int) -> str:
        if not num_sentinels:
            return "use the tokenizer of a T5, or train one with `--family t5`"
        shortest, longest = 8, self.max_length - 1
        if self._num_spans(shortest) > num_sentinels:
            return "use the tokenizer of a T5, which has 100, or train one with `--family t5`"
        while shortest < longest:  # the longest that the sentinels are enough for
            middle = (shortest + longest + 1) // 2
            if self._num_spans(middle) <= num_sentinels:
                shortest = middle
            else:
                longest = middle - 1
        hint = f"set `objective.length` to {shortest} or less"
        if self.spans.mixture == "ul2":
            return hint
        mean_length = math.ceil(self.spans.mean_length)
        while self._num_spans_of(mean_length) > num_sentinels:
            mean_length += 1
        return f"{hint}, or `objective.spans.mean_length` to {mean_length} or more"

    def _num_spans_of(self, mean_length: int) -> int:
        denoiser = Denoiser(self.spans.noise_density, mean_length)
        return denoiser.counts(raw_length(self.max_length, denoiser)[0])[1]

    def encode(self, example: Example) -> list[EncodedExample]:
        """A document as it is, without special tokens.

        Raises:
            DataError: a sentinel stands in the text itself.
        """
        documents = encode_document(self.tokenizer, example)
        for document in documents:
            if not self._sentinel_set.isdisjoint(document["input_ids"]):
                raise DataError(
                    f"{document['where']}: the text holds a sentinel such as `<extra_id_0>`, which "
                    "only span corruption may write",
                    hint="take it out of the text",
                )
        return documents

    @cached_property
    def _sentinel_set(self) -> frozenset[int]:
        return frozenset(self.sentinels)

    def arrange(
        self, documents: Documents, indices: npt.NDArray[np.int64], seed: int
    ) -> TokenStream:
        """The windows of the documents in a shuffled order."""
        end_id = self.tokenizer.eos_token_id
        assert isinstance(end_id, int)
        return TokenStream(
            documents, indices, seed, window_tokens=self.window_tokens, end_id=end_id
        )

    def corrupt(self, example: EncodedExample) -> tuple[list[int], list[int]]:
        """Inputs and targets of one window of at least 2 tokens, with the noise of its seed."""
        generator = noise_generator(example)
        denoiser = self.denoisers[0]
        if len(self.denoisers) > 1:
            denoiser = self.denoisers[int(generator.integers(len(self.denoisers)))]
        ids = example["input_ids"]
        kept, noise = denoiser.draw(len(ids), generator)
        sentinels = () if denoiser.mean_span_length is None else self.sentinels
        inputs, targets = corrupt(ids, kept, noise, sentinels, self.tokenizer.eos_token_id)
        if self.mode_ids:
            inputs.insert(0, self.mode_ids[denoiser.mode])
        return inputs, targets

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        """The tensors of one forward pass; see `SpanCorruptionBatch`."""
        pairs = [self.corrupt(example) for example in examples]
        return collate_pairs(pairs, padding=self.tokenizer.pad_token_id)

    def num_targets(self, batch: Batch) -> int:
        """Tokens of the targets, sentinels and end tokens included."""
        return int(batch["target_ids"].numel())

    def loss_sum(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Cross-entropy of every target, summed and not averaged: a float32 scalar."""
        return self._losses(model, batch).loss_sum

    def score(self, model: PreTrainedModel, batch: Batch) -> Scores:
        """Plain cross-entropy (no smoothing, no z-loss) and how often the first guess was right."""
        with torch.no_grad():
            sums = self._losses(model, batch)
        return token_scores(sums, batch["document_targets"])

    def _losses(self, model: PreTrainedModel, batch: Batch) -> LossSums:
        return plain_head_losses(
            model,
            batch,
            decoder_hidden_states(model, batch),
            scale=decoder_logit_scale(model.config),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )


def collate_pairs(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, padding: int) -> Batch:
    """A `SpanCorruptionBatch` of inputs and targets, both with their end tokens."""
    inputs = [torch.tensor(inputs) for inputs, _ in pairs]
    targets = [torch.tensor(targets) for _, targets in pairs]
    lengths_B = torch.tensor([len(each) for each in inputs])
    target_lengths_B = torch.tensor([len(each) for each in targets])
    pad = torch.nn.utils.rnn.pad_sequence
    targets_BT = pad(targets, batch_first=True, padding_value=padding)
    is_target_BT = torch.arange(targets_BT.shape[1])[None] < target_lengths_B[:, None]
    batch: Batch = {
        "input_ids": pad(inputs, batch_first=True, padding_value=padding),
        "decoder_input_ids": F.pad(targets_BT, (1, -1), value=padding),
        "prediction_positions": is_target_BT.flatten().nonzero()[:, 0],
        "target_ids": targets_BT[is_target_BT],
        "document_targets": target_lengths_B.tolist(),
    }
    if lengths_B.min() < lengths_B.max():
        mask_BS = torch.arange(int(lengths_B.max()))[None] < lengths_B[:, None]
        batch["attention_mask"] = mask_BS.long()
    return batch


def decoder_hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The decoder's last hidden states [B, T, H], without the product with the vocabulary."""
    mask = batch.get("attention_mask")
    encoded = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask)
    decoded = model.get_decoder()(
        input_ids=_started(model.config, batch["decoder_input_ids"]),
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=mask,
        use_cache=False,
    )
    hidden_BTH: Tensor = decoded.last_hidden_state
    return hidden_BTH


def _started(config: PretrainedConfig, decoder_input_ids_BT: Tensor) -> Tensor:
    """The decoder's inputs with the model's own start token in the first column."""
    start = config.decoder_start_token_id
    if start is None or start == config.pad_token_id:
        return decoder_input_ids_BT
    started_BT = decoder_input_ids_BT.clone()
    started_BT[:, 0] = start
    return started_BT


def decoder_logit_scale(config: PretrainedConfig) -> float:
    """The factor on an encoder-decoder's logits: the first T5 divides them by sqrt(d_model)."""
    scale = logit_scale(config)
    if getattr(config, "scale_decoder_outputs", False):
        scale *= float(config.d_model) ** -0.5
    return scale


@torch.no_grad()
def require_plain_decoder_head(model: PreTrainedModel) -> None:
    """See that an encoder-decoder's logits are what the loss takes them for.

    Raises:
        ModelError: they are not, found by trying on a few tokens.
    """
    device = next(model.parameters()).device
    ids_BT = torch.arange(min(8, model.config.vocab_size), device=device)[None]
    batch: Batch = {"input_ids": ids_BT, "decoder_input_ids": ids_BT}
    with evaluation_mode(model):
        decoder_ids_BT = _started(model.config, ids_BT)
        own_BTV = model(input_ids=ids_BT, decoder_input_ids=decoder_ids_BT).logits.float()
        hidden_BTH = decoder_hidden_states(model, batch)
    if not is_plain(model, hidden_BTH, own_BTV, scale=decoder_logit_scale(model.config)):
        raise ModelError(
            f"models of type `{model.config.model_type}` do not multiply the decoder's hidden "
            "states by the output weights alone, as the loss does",
            hint="use a T5, mT5 or UMT5 model",
        )
