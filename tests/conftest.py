"""Tiny real models, tokenizers and data files, made once per test session from fixed seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

# Before torch and huggingface_hub are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers.normalizers import BertNormalizer
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fulltune.data.encoding import EncodedExample
from fulltune.data.tasks import TextExample
from fulltune.objectives.base import Objective

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PLACES = ("Paris", "Rome", "Tokyo", "Cairo", "Lima", "Oslo", "Quito", "Riga")
QUESTION_WORDS = "where is the house of who painted door in number how many birds live near"
COLOURS = ("red", "green", "blue", "white")
LINES = (
    "The capital of the country is a city by the river.",
    "system user assistant tool: what is the answer to the question?",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "How many apples are there in the basket? There are seven apples.",
    "She sells sea shells by the sea shore.",
    "法国的首都是巴黎。你好，世界！今天天气很好。",
)


def encoded_example(input_ids: Sequence[int], number: int = 0, **others: object) -> EncodedExample:
    """An example whose tokens are all targets, unless ``others`` says otherwise.

    ``number`` stands for its content in both hashes.
    """
    example: dict[str, object] = {
        "input_ids": list(input_ids),
        "targets": [1] * len(input_ids),
        "token_type_ids": [],
        "labels": [],
        "num_removed": 0,
        "num_removed_targets": 0,
        "input_hash": number,
        "example_hash": number,
        "num_bytes": 0,
        "where": f"a.txt:{number + 1}",
    }
    return cast(EncodedExample, {**example, **others})


class DocumentsInMemory:
    """Encoded documents in a list, as an encoded data set offers them; counts what is read."""

    fingerprint = "documents"

    def __init__(self, examples: Iterable[EncodedExample]) -> None:
        self.examples = list(examples)
        self.lengths = np.array([len(each["input_ids"]) for each in self.examples], dtype=np.int32)
        self.num_tokens_read = 0

    @classmethod
    def of_texts(cls, objective: Objective, texts: Sequence[str]) -> DocumentsInMemory:
        """The texts as an objective encodes them, one a line of a file."""
        return cls(
            example
            for line, text in enumerate(texts, start=1)
            for example in objective.encode(TextExample(text, f"a.txt:{line}"))
        )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> EncodedExample:
        return self.piece(index, 0, int(self.lengths[index]))

    def piece(self, index: int, start: int, stop: int, /) -> EncodedExample:
        document = self.examples[index]
        piece = {
            name: value[start:stop] if isinstance(value, list) else value
            for name, value in document.items()
        }
        self.num_tokens_read += len(document["input_ids"][start:stop])
        return cast(EncodedExample, piece)

    def where(self, index: int, /) -> str:
        return self.examples[index]["where"]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with grouped keys, untied head, and a ChatML tokenizer."""
    tokenizer = _byte_level_tokenizer()
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return _save(model, tokenizer, tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer GPT-2: learned positions, tied head, dropout 0.1, a ChatML tokenizer."""
    tokenizer = _byte_level_tokenizer()
    torch.manual_seed(2)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=256,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return _save(model, tokenizer, tmp_path_factory.mktemp("tiny_gpt2"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT body with a WordPiece tokenizer that gives segment ids."""
    tokenizer = _wordpiece_tokenizer()
    torch.manual_seed(3)
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return _save(model, tokenizer, tmp_path_factory.mktemp("tiny_bert"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of two layers on each side, dropout 0.1, with a tokenizer that ends a text itself."""
    tokenizer = _byte_level_tokenizer(
        ["<pad>", "</s>", "<extra_id_0>"], eos_token="</s>", pad_token="<pad>"
    )
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    torch.manual_seed(4)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    return _save(model, tokenizer, tmp_path_factory.mktemp("tiny_t5"))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short sources with the target that follows from each, some in Chinese."""
    rows = []
    for index in range(40):
        place, colour = PLACES[index % 8], COLOURS[index // 8 % 4]
        if index % 4 == 3:
            rows.append({"source": f"{place}的颜色{index}是{colour}", "target": f"{colour}。"})
        else:
            rows.append({"source": f"The {colour} house {index} of {place}", "target": colour})
    return _write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short conversations: one or two turns, some with a system prompt, some in Chinese."""
    conversations: list[list[dict[str, str]]] = []
    for index in range(40):
        place, colour = PLACES[index % 8], COLOURS[index // 8 % 4]
        if index % 5 == 4:
            messages = [
                {"role": "user", "content": f"{place}的颜色是什么？第{index}题"},
                {"role": "assistant", "content": f"{place}是{index}号，颜色很好。"},
            ]
        else:
            messages = [
                {"role": "user", "content": f"What colour is house {index} in {place}?"},
                {"role": "assistant", "content": f"House {index} in {place} is {colour}."},
            ]
        if index % 4 == 1:
            messages.insert(0, {"role": "system", "content": "Answer in one short sentence."})
        if index % 3 == 2:
            messages += [
                {"role": "user", "content": "Are you sure?"},
                {"role": "assistant", "content": f"Yes, I am sure that it is {colour}."},
            ]
        conversations.append(messages)
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    return _write_jsonl(path, [{"messages": messages} for messages in conversations])


@pytest.fixture(scope="session")
def classification_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 questions of three kinds that one word of each tells apart."""
    templates = {
        "place": "Where is the {0} house of {1} number {2}?",
        "person": "Who painted the {0} door in {1} number {2}?",
        "number": "How many {0} birds live in {1} near {2}?",
    }
    rows = [
        {"text": template.format(COLOURS[index % 4], PLACES[index // 4 % 8], index), "label": label}
        for index in range(40)
        for label, template in templates.items()
    ]
    return _write_jsonl(tmp_path_factory.mktemp("classification") / "questions.jsonl", rows)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty paragraphs, one a line with blank lines between, English and Chinese."""
    paragraphs = [
        f"{LINES[index % len(LINES)]} Paragraph {index} is about {PLACES[index % 8]}."
        for index in range(30)
    ]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


def _byte_level_tokenizer(
    special_tokens: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    **values: Any,
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [*LINES, *PLACES, *COLOURS] * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    chatml = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": ["<|im_start|>"],
        "chat_template": CHATML,
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=256, **(values or chatml)
    )


def _wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        [*LINES, *PLACES, *COLOURS, QUESTION_WORDS, *(str(number) for number in range(120))] * 4,
        trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=special_tokens, show_progress=False
        ),
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    ids = backend.get_vocab()
    backend.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=128,
    )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path
