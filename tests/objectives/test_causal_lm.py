"""The loss of a causal model is that of its own logits, or the model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM

from fulltune.data.tasks import TextExample
from fulltune.errors import ModelError
from fulltune.models.loading import load_tokenizer
from fulltune.objectives.causal_lm import CausalLM, require_plain_head


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


def test_a_model_that_transforms_its_last_hidden_states_is_refused() -> None:
    with pytest.raises(ModelError, match="`roformer`"):
        require_plain_head(make_model("roformer", embedding_size=16))
