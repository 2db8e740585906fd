"""New tokens for a trained model: rows of its embeddings that start where they belong.

A new row is the mean of the rows of the pieces that the old tokenizer gave for the token (Hewitt,
"Initializing New Word Embeddings for Pretrained Language Models", 2021, takes the mean of all rows;
of its own pieces the token begins near what the model already reads there). Suffixes: V vocabulary,
D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from fulltune.assets.quiet import quiet_transformers
from fulltune.errors import ConfigError, ModelError
from fulltune.models.chat_template import template_markers
from fulltune.models.loading import from_pretrained, load_model_config


def load_as_saved(path: Path) -> PreTrainedModel:
    """Load a checked folder with the head and the dtype that it was saved with.

    Raises:
        ModelError: the architecture is unknown, or weights are missing.
    """
    config = load_model_config(path)
    names = config.architectures or []
    auto: Any = getattr(transformers, names[0], None) if names else AutoModel
    if auto is None:
        raise ModelError(
            f"`{path}` is of architecture `{names[0]}`, which transformers does not have",
            hint="is it a model of transformers' own?",
        )
    model, report = from_pretrained(auto, path, dtype="auto")
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"`{path}` lacks {len(missing)} weights of {type(model).__name__}: {missing[0]}",
            hint="the folder is incomplete, or config.json belongs to another model",
        )
    model.eval()
    return model


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[int, list[int]]:
    """Add tokens to a tokenizer.

    Returns:
        The id of each new token -> the ids that stood for it before.

    Raises:
        ConfigError: a token exists, is repeated, is empty, or would not be found in a text.
    """
    if not tokens:
        raise ConfigError(
            "there is no token to add", hint="`--add TOKEN`, or a file with a line each"
        )
    vocabulary = tokenizer.get_vocab()
    pieces: dict[str, list[int]] = {}
    existing = []
    for token in tokens:
        if not token.strip():
            raise ConfigError("a token to add is empty", hint="give it at least one character")
        if token in pieces:
            raise ConfigError(f"`{token}` is to be added twice", hint="give each token once")
        ids = tokenizer.encode(token, add_special_tokens=False)
        if not ids:
            raise ConfigError(
                f"`{token}` is nothing to this tokenizer: it removes every character",
                hint="leave it out",
            )
        one = len(ids) == 1 and ids[0] != tokenizer.unk_token_id
        if token in vocabulary or one:
            existing.append(token)
        pieces[token] = ids
    if existing:
        shown = ", ".join(f"`{token}`" for token in existing[:8])
        more = f" and {len(existing) - 8} more" if len(existing) > 8 else ""
        raise ConfigError(
            f"{shown}{more}: one token already", hint="leave out what the vocabulary has"
        )
    tokenizer.add_tokens(list(tokens))
    pieces_of_id = {}
    for token, ids in pieces.items():
        now = tokenizer.encode(token, add_special_tokens=False)
        number = tokenizer.get_vocab()[token]
        if now != [number]:
            raise ConfigError(
                f"`{token}` would never be found in a text: the tokenizer reads it as "
                f"{tokenizer.convert_ids_to_tokens(now)}",
                hint="another new token is equal to it once normalized; leave one out",
            )
        pieces_of_id[number] = ids
    return pieces_of_id


def add_markers(tokenizer: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Make special tokens of the markers of a tokenizer's chat template, new ones if need be.

    A marker that is several tokens never ends a generation, and can be written in a message; one
    that is a token already keeps its id.

    Returns:
        The id of each new token -> the ids that stood for it before.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    markers = template_markers(str(tokenizer.chat_template))
    pieces = {marker: tokenizer.encode(marker, add_special_tokens=False) for marker in markers}
    num_before = len(tokenizer)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [marker for marker in markers if marker not in special]},
        replace_extra_special_tokens=False,
    )
    numbers = {marker: int(tokenizer.get_vocab()[marker]) for marker in markers}
    return {numbers[name]: ids for name, ids in pieces.items() if numbers[name] >= num_before}


@torch.no_grad()
def grow_embeddings(model: PreTrainedModel, pieces_of_id: Mapping[int, Sequence[int]]) -> None:
    """Give new ids their rows, in the input and an untied output embedding; a new bias is 0.

    No other row changes. A model with more rows than tokens keeps its size if the new ids fit.

    Args:
        model: whose config's ``vocab_size`` is kept right.
        pieces_of_id: new id -> the old ids whose mean it starts as.
    """
    if max(pieces_of_id) >= len(_input_rows(model)):
        with quiet_transformers():
            model.resize_token_embeddings(max(pieces_of_id) + 1, mean_resizing=False)
    input_VD = _input_rows(model)
    _set_rows(input_VD, pieces_of_id)
    output = model.get_output_embeddings()
    if output is None:
        return
    output_VD = cast(nn.Linear, output).weight
    if output_VD is not input_VD:
        _set_rows(output_VD, pieces_of_id)
    bias_V = getattr(output, "bias", None)
    if bias_V is not None:
        bias_V[list(pieces_of_id)] = 0.0


def _input_rows(model: PreTrainedModel) -> Tensor:
    return cast(nn.Embedding, model.get_input_embeddings()).weight


def _set_rows(weight_VD: Tensor, pieces_of_id: Mapping[int, Sequence[int]]) -> None:
    for number, pieces in pieces_of_id.items():
        mean_D = weight_VD[list(pieces)].float().mean(dim=0)
        weight_VD[number] = mean_D.to(weight_VD.dtype)
