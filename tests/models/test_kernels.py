"""Replaced modules against transformers' own, forward and backward."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fulltune.models.kernels import install_fast_kernels

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(make, dtype):
    torch.manual_seed(0)
    model = make().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_llama():
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def make_llama_with_biases():
    return LlamaForCausalLM(LlamaConfig(**SHAPE, mlp_bias=True))


def make_qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16))


@pytest.mark.parametrize("make", [make_llama, make_llama_with_biases, make_qwen3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=["fp32", "bf16"]
)
def test_logits_are_the_same_bits_and_gradients_the_same_to_rounding(make, dtype, tolerance):
    plain, fast = build(make, dtype), build(make, dtype)
    assert len(install_fast_kernels(fast)) == 2
    ids = torch.randint(3, 101, (2, 30))
    outputs = [model(input_ids=ids, use_cache=False).logits for model in (plain, fast)]
    assert torch.equal(outputs[0], outputs[1])

    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    for (name, expected), parameter in zip(
        plain.named_parameters(), fast.parameters(), strict=True
    ):
        difference = (parameter.grad - expected.grad).float().norm()
        assert difference < tolerance * expected.grad.float().norm(), name


def test_what_was_replaced_is_told():
    assert install_fast_kernels(build(make_llama, torch.float32)) == [
        "2 x LlamaMLP",
        "5 x LlamaRMSNorm",
    ]


def test_variants_and_other_families_are_left_alone():
    gemma = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8))
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=6, bos_token_id=1, eos_token_id=2)
    )
    assert install_fast_kernels(gemma) == []
    assert install_fast_kernels(gpt2) == []


def saved_bytes(model):
    storages = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(input_ids=torch.ones(1, 64, dtype=torch.long), use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storages.values())


def test_fewer_bytes_are_kept_for_the_backward_pass():
    model = build(make_llama, torch.bfloat16)
    before = saved_bytes(model)
    install_fast_kernels(model)
    assert saved_bytes(model) < 0.75 * before
