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
from transformers.activations import NewGELUActivation

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


def test_variants_of_norms_and_products_are_left_alone():
    gemma = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8))
    assert install_fast_kernels(gemma) == []


def make_gpt2(**settings):
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=6, bos_token_id=1, eos_token_id=2,
                   **settings)
    )  # fmt: skip


def test_the_one_operation_gelu_is_no_less_exact_than_the_composed_one():
    gpt2 = make_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    assert install_fast_kernels(gpt2) == ["2 x NewGELUActivation"]
    values = 3 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        states = values.to(dtype)
        exact = torch.nn.functional.gelu(states.double(), approximate="tanh")
        composed, single = NewGELUActivation()(states), gpt2.transformer.h[0].mlp.act(states)
        assert (single - exact).abs().max() <= (composed - exact).abs().max()


def test_dropout_modules_draw_anew_in_training_and_do_nothing_in_evaluation():
    model = make_gpt2()
    assert "7 x Dropout" in install_fast_kernels(model)
    drop = model.transformer.drop
    states = torch.ones(64, 48)
    drop.train()
    torch.manual_seed(0)
    first, second = drop(states), drop(states)
    torch.manual_seed(0)
    assert torch.equal(drop(states), first)
    assert not torch.equal(first, second)
    drop.eval()
    assert torch.equal(drop(states), states)


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
