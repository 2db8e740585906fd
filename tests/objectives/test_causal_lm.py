"""The loss of a causal model is that of its own logits, or the model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM

from fulltune.data.encoding import EncodedExample
from fulltune.data.tasks import TextExample
from fulltune.errors import ModelError
from fulltune.models.kernels import install_fast_kernels
from fulltune.models.loading import load_model, load_tokenizer
from fulltune.objectives.causal_lm import CausalLM, require_plain_head
from fulltune.objectives.causal_stream import CausalStream

TEXTS = (
    "The capital of the country is a city by the river. She sells sea shells by the sea shore!",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "法国的首都是巴黎。你好，世界！今天天气很好。",
    "It rains.",
)


class Documents:
    """Encoded documents in a list, as an encoded data set offers them."""

    fingerprint = "list"

    def __init__(self, objective: CausalStream) -> None:
        self.examples = [
            example
            for line, text in enumerate(TEXTS, start=1)
            for example in objective.encode(TextExample(text, f"a.txt:{line}"))
        ]
        self.lengths = np.array([len(example["input_ids"]) for example in self.examples])

    def __getitem__(self, index: int) -> EncodedExample:
        return self.examples[index]

    def piece(self, index: int, start: int, stop: int, /) -> EncodedExample:
        example = self.examples[index]
        return {**example, "input_ids": example["input_ids"][start:stop]}

    def where(self, index: int) -> str:
        return self.examples[index]["where"]


def make_model(model_type: str, **values: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
        **{**dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0), **values},
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("llama", {}),
        ("gpt_neox", {}),
        ("gemma2", {"head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 0.1}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_and_capped_logits_are_what_the_loss_takes_them_for(
    model_type: str, values: dict[str, Any], dtype: torch.dtype
) -> None:
    require_plain_head(make_model(model_type, **values).to(dtype))


@pytest.mark.parametrize("adds_end", [False, True])
def test_the_bytes_of_a_text_are_those_of_its_predicted_tokens(
    tiny_llama: Path, adds_end: bool
) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    if adds_end:
        end = [("<|im_end|>", tokenizer.eos_token_id)]
        processor = processors.TemplateProcessing("$0 <|im_end|>", special_tokens=end)
        tokenizer.backend_tokenizer.post_processor = processor
    text = "She sells sea shells by the sea shore. " * 4
    windows = CausalLM(tokenizer, 16).encode(TextExample(text, "here"))
    assert len(windows) > 2
    first = len(tokenizer.decode(windows[0]["input_ids"][:1]))
    assert sum(window["num_bytes"] for window in windows) == len(text) - first


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bert"])
def test_characters_cut_in_two_and_spaces_between_windows_count_once(
    request: pytest.FixtureRequest, model: str
) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(model))
    text = "天气很好，她在河边看书。 It rains on the river. " * 4 + "你好"
    first = tokenizer.backend_tokenizer.encode(text).offsets[0][1]  # 0 of a token that is added
    for max_length in (4, 5, 6, 7):
        windows = CausalLM(tokenizer, max_length).encode(TextExample(text, "here"))
        num_bytes = sum(window["num_bytes"] for window in windows)
        assert num_bytes == len(text[first:].encode())


def test_a_stream_needs_a_token_that_ends_documents(tiny_bert: Path) -> None:
    with pytest.raises(ModelError, match="has no `eos_token`, which ends each document"):
        CausalStream(CausalLM(load_tokenizer(tiny_bert), 16))


def test_a_model_that_transforms_its_last_hidden_states_is_refused() -> None:
    with pytest.raises(ModelError, match="`roformer`"):
        require_plain_head(make_model("roformer", embedding_size=16))


@pytest.mark.parametrize("stream", [False, True], ids=["windows of a document", "stream"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_llama"])
def test_the_loss_and_its_gradients_are_those_of_the_models_own_forward(
    request: pytest.FixtureRequest, model: str, packing: bool, stream: bool
) -> None:
    folder: Path = request.getfixturevalue(model)
    ours: Any = load_model(folder, head="causal_lm", dtype=torch.float32, attention="fulltune")
    install_fast_kernels(ours.eval())
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    with torch.no_grad():  # away from the start, where every loss is that of a uniform guess
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours.load_state_dict(theirs.state_dict())

    tokenizer = load_tokenizer(folder)
    language_model = CausalLM(tokenizer, 24, packing=packing)
    objective: Any = CausalStream(language_model) if stream else language_model
    if stream:
        windows = objective.arrange(Documents(objective), np.arange(len(TEXTS)), seed=0)
        examples = [windows[index] for index in range(len(windows))]
        ends = [example["input_ids"][:-1].count(tokenizer.eos_token_id) for example in examples]
        assert sum(ends) > 0  # documents that end inside of a window
    else:
        examples = [
            window
            for line, text in enumerate(TEXTS, start=1)
            for window in objective.encode(TextExample(text, f"a.txt:{line}"))
        ]
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    assert lengths.min() < lengths.max() == 24

    rows = [torch.tensor(example["input_ids"]) for example in examples]
    ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask_BT = torch.arange(24)[None] < lengths[:, None]
    labels_BT = ids_BT.masked_fill(~mask_BT, -100)
    expected = theirs(input_ids=ids_BT, attention_mask=mask_BT.long(), labels=labels_BT).loss
    expected.backward()

    batch = objective.collate(examples)
    count = objective.num_targets(batch)
    assert count == int((labels_BT[:, 1:] != -100).sum())
    loss = objective.loss_sum(ours, batch) / count
    loss.backward()
    # A mean of a hundred float32 terms near 6, added up in another order.
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    found = {name: each.grad for name, each in ours.named_parameters()}
    # Sums of as many float32 products as the batch has tokens.
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=2e-6)
    scores = objective.score(ours, batch)
    assert scores.loss_sum / scores.num_targets == pytest.approx(expected.item(), rel=1e-6)
