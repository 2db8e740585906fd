"""The chunked loss against the plain one: values, gradients, precision, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fulltune.objectives.linear_cross_entropy import LossSums, linear_cross_entropy


def make_inputs(num_positions, vocabulary_size, hidden_size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_positions, hidden_size, generator=generator)
    weight = torch.randn(vocabulary_size, hidden_size, generator=generator) / hidden_size**0.5
    targets = torch.randint(vocabulary_size, (num_positions,), generator=generator)
    return (
        (2 * hidden).to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        targets,
    )


def plain_loss(
    hidden,
    weight,
    targets,
    bias_V=None,
    label_smoothing=0.0,
    z_loss=0.0,
    logit_scale=1.0,
    softcap=None,
):
    """The loss as anyone would write it, with all logits in float32 or float64."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias_V is not None:
        logits = logits + bias_V.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
    return loss + z_loss * logits.logsumexp(-1).square().sum(), logits


VARIANTS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"logit_scale": 0.25, "softcap": 3.0},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "logit_scale": 2.0, "softcap": 5.0},
]


@pytest.mark.parametrize("num_rows", [1, 7, 1000], ids=["rows one by one", "uneven", "one chunk"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_loss_and_gradients_equal_the_plain_loss_for_any_chunk(num_rows, options):
    hidden, weight, targets = make_inputs(50, 301, 24)
    bias = torch.linspace(-1, 1, 301).requires_grad_()
    expected, logits = plain_loss(hidden, weight, targets, bias, **options)
    expected_grads = torch.autograd.grad(expected / 7, (hidden, weight, bias))

    sums = linear_cross_entropy(
        hidden, weight, targets, bias_V=bias, chunk_bytes=num_rows * 301 * 4, **options
    )
    grads = torch.autograd.grad(sums.loss_sum / 7, (hidden, weight, bias))

    assert sums.loss_sum.dtype == torch.float32
    torch.testing.assert_close(sums.loss_sum, expected, rtol=1e-6, atol=0)
    token_losses = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(sums.cross_entropy_sum, token_losses.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.cross_entropy_N, token_losses, rtol=1e-5, atol=1e-6)
    assert sums.num_correct == (logits.argmax(-1) == targets).sum()
    assert (sums.is_correct_N == (logits.argmax(-1) == targets)).all()
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).norm() < 2e-6 * expected_grad.norm()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradients_equal_those_of_the_plain_loss_in_float64(options):
    hidden, weight, targets = make_inputs(5, 11, 4, dtype=torch.float64)
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_()
    inputs = (hidden, weight, bias)
    expected = torch.autograd.grad(plain_loss(hidden, weight, targets, bias, **options)[0], inputs)
    sums = linear_cross_entropy(
        hidden, weight, targets, bias_V=bias, chunk_bytes=2 * 11 * 8, **options
    )
    grads = torch.autograd.grad(sums.loss_sum, inputs)
    torch.testing.assert_close(grads, expected, rtol=1e-11, atol=1e-12)


def test_a_second_backward_pass_is_refused():
    hidden, weight, targets = make_inputs(5, 11, 4)
    sums = linear_cross_entropy(hidden, weight, targets)
    sums.loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        sums.loss_sum.backward()


def test_a_tied_weight_gets_the_gradient_of_both_uses():
    _, weight, targets = make_inputs(20, 30, 8)

    def gradient(loss_of):
        return torch.autograd.grad(loss_of(F.embedding(targets, weight).tanh()), weight)[0]

    ours = gradient(lambda hidden: linear_cross_entropy(hidden, weight, targets).loss_sum)
    expected = gradient(lambda hidden: plain_loss(hidden, weight, targets)[0])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_evaluation_computes_no_gradients_and_gives_the_same_sums():
    hidden, weight, targets = make_inputs(20, 30, 8)
    trained = linear_cross_entropy(hidden, weight, targets)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, targets)
    assert isinstance(evaluated, LossSums)
    assert not evaluated.loss_sum.requires_grad
    assert evaluated.loss_sum == trained.loss_sum
    assert evaluated.num_correct == trained.num_correct


def test_only_the_asked_gradients_are_given():
    hidden, weight, targets = make_inputs(6, 30, 8)
    linear_cross_entropy(hidden, weight.detach(), targets).loss_sum.backward()
    expected = torch.autograd.grad(plain_loss(hidden, weight, targets)[0], hidden)[0]
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-5, atol=1e-6)
    assert weight.grad is None


def test_no_positions_give_a_zero_loss_and_zero_gradients():
    hidden, weight, targets = make_inputs(0, 30, 8)
    sums = linear_cross_entropy(hidden, weight, targets)
    sums.loss_sum.backward()
    assert sums.loss_sum == 0
    assert sums.num_correct == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_of_equal_logits_the_first_counts_as_the_prediction():
    hidden = torch.ones(3, 1)
    weight = torch.tensor([[0.0], [1.0], [1.0]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 0])).num_correct == 1


def test_targets_outside_the_vocabulary_are_refused():
    hidden, weight, _ = make_inputs(2, 30, 8)
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(hidden, weight, torch.tensor([1, -100]))


def make_trained_like_inputs():
    """bf16 states whose logits look like a trained model's: a sharp peak, a long tail."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8192, 64, generator=generator) * 0.5
    targets = torch.randint(8192, (400,), generator=generator)
    hidden = 0.45 * weight[targets] + 0.8 * torch.randn(400, 64, generator=generator)
    return (
        hidden.bfloat16().requires_grad_(),
        weight.bfloat16().requires_grad_(),
        targets,
    )


def test_bf16_loss_is_near_the_float32_truth_and_far_nearer_than_pytorchs():
    hidden, weight, targets = make_trained_like_inputs()
    truth, _ = plain_loss(hidden, weight, targets)
    ours = linear_cross_entropy(hidden, weight, targets).loss_sum
    theirs = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        fused = F.linear_cross_entropy(hidden, weight, targets, reduction="sum")
        torch.testing.assert_close(fused, theirs)
    our_error = (ours - truth).abs() / truth
    their_error = (theirs.float() - truth).abs() / truth
    assert our_error < 2e-4
    assert our_error < 0.1 * their_error


def test_bf16_gradients_are_the_float32_truth_to_bf16_rounding():
    hidden, weight, targets = make_trained_like_inputs()
    expected = torch.autograd.grad(plain_loss(hidden, weight, targets)[0], (hidden, weight))
    sums = linear_cross_entropy(hidden, weight, targets, chunk_bytes=100 * 8192 * 2)
    grads = torch.autograd.grad(sums.loss_sum, (hidden, weight))
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert grad.dtype == torch.bfloat16
        difference = (grad.float() - expected_grad.float()).norm()
        assert difference < 0.02 * expected_grad.float().norm()
