"""Packed documents against the same documents alone, on tiny real models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fulltune.errors import ModelError
from fulltune.models.attention import (
    IMPLEMENTATION,
    DeferredMask,
    attend,
    make_document_kwargs,
    make_mask,
)

# Alone and long, equal, nearly equal (filled up in one group), and a single token.
LENGTHS = [150, 9, 33, 31, 9, 30, 1, 8]
VOCABULARY_SIZE = 101
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
} | SPECIAL


def make_llama(**options):
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, **options))


def make_gpt2(**options):
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY_SIZE,
            n_embd=48,
            n_layer=2,
            n_head=6,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            **SPECIAL,
            **{"attn_pdrop": 0.0, **options},
        )
    )


def make_bert(**options):
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**SHAPE, **dropouts, **options), add_pooling_layer=False)


def make_mistral(**options):
    return MistralForCausalLM(
        MistralConfig(**SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=12, **options)
    )


def make_qwen3(**options):
    config = Qwen3Config(
        **SHAPE,
        num_key_value_heads=3,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=12,
        max_window_layers=1,
        **options,
    )
    return Qwen3ForCausalLM(config)


def make_modernbert(**options):
    config = ModernBertConfig(
        **SHAPE, local_attention=24, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    )
    return ModernBertModel(config)


MAKERS = [make_llama, make_gpt2, make_bert, make_mistral, make_qwen3, make_modernbert]


def build(make, implementation=IMPLEMENTATION, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = make(**options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # default weights are so small that nothing attends
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_attn_implementation(implementation)
    return model.train()


def make_row(model, lengths=LENGTHS):
    torch.manual_seed(1)
    row = {"input_ids": torch.randint(3, VOCABULARY_SIZE, (1, sum(lengths)))}
    if isinstance(model, BertModel):
        row["token_type_ids"] = torch.randint(2, (1, sum(lengths)))
    return row


def without_cache(model):
    return {} if isinstance(model, (BertModel, ModernBertModel)) else {"use_cache": False}


def run_packed(model, row, lengths=LENGTHS):
    kwargs = make_document_kwargs(lengths, "cpu") | without_cache(model)
    return model(**row, **kwargs)[0][0]


def run_alone(model, row, lengths=LENGTHS):
    parts = {name: values.split(lengths, dim=1) for name, values in row.items()}
    return torch.cat(
        [
            model(**{name: part[index] for name, part in parts.items()}, **without_cache(model))[0][
                0
            ]
            for index in range(len(lengths))
        ]
    )


@pytest.mark.parametrize("make", MAKERS)
def test_a_packed_row_equals_its_documents_alone_under_eager_attention(make):
    packed, alone = build(make), build(make, "eager")
    row = make_row(packed)
    outputs, expected = run_packed(packed, row), run_alone(alone, row)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)

    weights = torch.randn_like(outputs)
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    others = dict(alone.named_parameters())
    for name, parameter in packed.named_parameters():
        if parameter.grad is not None:
            difference = (parameter.grad - others[name].grad).norm()
            assert difference < 1e-5 * others[name].grad.norm() + 1e-4, name


@pytest.mark.parametrize("make", [make_llama, make_bert, make_mistral])
def test_in_bf16_packed_and_alone_differ_only_by_rounding(make):
    packed = build(make, dtype=torch.bfloat16)
    exact, row = build(make).eval(), make_row(packed)
    expected = run_alone(exact, row)
    from_packed = (run_packed(packed, row).float() - expected).norm()
    from_alone = (run_alone(packed, row).float() - expected).norm()
    assert from_packed < 1.1 * from_alone
    assert from_alone < 0.03 * expected.norm()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("changed", [0, 2, 5], ids=["long", "grouped", "filled"])
def test_changing_a_document_changes_no_bit_of_the_others(make, changed):
    model = build(make)
    row = make_row(model)
    start, end = sum(LENGTHS[:changed]), sum(LENGTHS[: changed + 1])
    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[start:end] = False
    before = run_packed(model, row)
    embeddings = model.get_input_embeddings()

    row["input_ids"] = row["input_ids"].clone()
    row["input_ids"][0, start:end] = (row["input_ids"][0, start:end] + 7) % VOCABULARY_SIZE
    after = run_packed(model, row)
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])

    # Nor does a document's loss reach the inputs of another.
    states = []
    handle = embeddings.register_forward_hook(lambda _m, _a, out: states.append(out))
    outputs = run_packed(model, row)
    handle.remove()
    (grad,) = torch.autograd.grad(outputs[start:end].square().sum(), states[0])
    assert not grad[0, others].any()
    assert grad[0, ~others].any()


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_mistral, make_qwen3])
def test_generation_with_a_cache_and_padding_equals_sdpa(make):
    prompts = torch.randint(3, VOCABULARY_SIZE, (2, 17), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompts)
    mask[0, :5] = 0
    answers = [
        build(make, name)
        .eval()
        .generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for name in (IMPLEMENTATION, "sdpa")
    ]
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert torch.equal(torch.stack(answers[0].logits), torch.stack(answers[1].logits))


@pytest.mark.parametrize("make", MAKERS)
def test_padded_batches_equal_sdpa(make):
    ids = torch.randint(3, VOCABULARY_SIZE, (3, 40), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(40) < torch.tensor([40, 13, 1])[:, None]).long()
    outputs = [build(make, name)(ids, attention_mask=mask)[0] for name in (IMPLEMENTATION, "sdpa")]
    assert torch.equal(outputs[0], outputs[1])


def test_without_boundaries_restarting_positions_still_keep_documents_apart():
    model = build(make_llama)
    row, kwargs = make_row(model), make_document_kwargs(LENGTHS, "cpu")
    output = model(**row, position_ids=kwargs["position_ids"], use_cache=False)[0][0]
    torch.testing.assert_close(output, run_packed(model, row), rtol=1e-4, atol=1e-5)


def test_no_dense_mask_is_built_for_a_packed_row(monkeypatch):
    def refuse(self):
        raise AssertionError("a dense mask was built")

    monkeypatch.setattr(DeferredMask, "dense", refuse)
    for make in MAKERS:
        model = build(make)
        run_packed(model, make_row(model))


def test_attention_dropout_is_applied_inside_documents_only():
    model = build(make_gpt2, attn_pdrop=0.5)
    row = make_row(model)
    torch.manual_seed(5)
    first = run_packed(model, row)
    torch.manual_seed(6)
    assert not torch.equal(first, run_packed(model, row))
    row["input_ids"] = row["input_ids"].clone()
    row["input_ids"][0, : LENGTHS[0]] = 5
    torch.manual_seed(5)
    assert torch.equal(first[LENGTHS[0] :], run_packed(model, row)[LENGTHS[0] :])
    torch.testing.assert_close(
        run_packed(model.eval(), row), run_packed(build(make_gpt2), row), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_the_path_with_dropout_sees_the_same_keys(causal, window):
    """With a vanishing dropout the two paths must agree: they share no kernel call."""
    torch.manual_seed(0)
    module = nn.Module()
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 8) for heads in (6, 2, 2))
    kwargs = make_document_kwargs(LENGTHS, "cpu")
    outputs = [
        attend(
            module,
            query,
            key,
            value,
            None,
            dropout,
            is_causal=causal,
            sliding_window=window,
            **kwargs,
        )[0]
        for dropout in (0.0, 1e-12)
    ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "something_new"])
def test_what_cannot_be_honoured_is_refused_by_name(name):
    query = torch.randn(1, 2, 6, 8)
    kwargs = make_document_kwargs([2, 4], "cpu") | {name: 3.0}
    with pytest.raises(ModelError, match=f"`{name}`"):
        attend(nn.Module(), query, query, query, None, **kwargs)


def test_softcap_is_refused_without_packing_too():
    query = torch.randn(1, 2, 6, 8)
    with pytest.raises(ModelError, match="`softcap`"):
        attend(nn.Module(), query, query, query, None, softcap=30.0)


def test_a_dense_mask_with_packed_documents_is_refused():
    query, kwargs = torch.randn(1, 2, 6, 8), make_document_kwargs([2, 4], "cpu")
    with pytest.raises(ModelError, match="attention mask was given together"):
        attend(nn.Module(), query, query, query, torch.ones(1, 1, 6, 6), **kwargs)


def test_a_pattern_that_is_neither_causal_nor_banded_is_refused():
    query, kwargs = torch.randn(1, 2, 6, 8), make_document_kwargs([2, 4], "cpu")
    mask = make_mask(
        1,
        6,
        6,
        mask_function=lambda _b, _h, q, k: (q // 2 == k // 2) & (k <= q),
        allow_is_causal_skip=False,
        device="cpu",
    )
    with pytest.raises(ModelError, match="neither causal, banded nor full"):
        attend(nn.Module(), query, query, query, mask, **kwargs)


def test_boundaries_that_miss_tokens_are_refused():
    query = torch.randn(1, 2, 7, 8)
    with pytest.raises(ModelError, match="runs from 0 to 6, but the row has 7 tokens"):
        attend(nn.Module(), query, query, query, None, **make_document_kwargs([2, 4], "cpu"))


def test_cached_keys_cannot_be_packed():
    query, key = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 9, 8)
    with pytest.raises(ModelError, match="as many keys as queries"):
        attend(nn.Module(), query, key, key, None, **make_document_kwargs([2, 4], "cpu"))


def test_document_kwargs_say_where_documents_begin():
    kwargs = make_document_kwargs([2, 1, 3], "cpu")
    assert kwargs["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]
    assert kwargs["cu_seq_lens_q"].tolist() == [0, 2, 3, 6]
    assert kwargs["cu_seq_lens_q"].dtype == torch.int32
    assert kwargs["cu_seq_lens_k"] is kwargs["cu_seq_lens_q"]
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == 3
    with pytest.raises(ValueError, match="at least one token"):
        make_document_kwargs([2, 0], "cpu")
