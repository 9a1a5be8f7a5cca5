"""Step 1. Softmax attention, and the number it divides by: Z2 = Σ_s exp(q·k_s/√D), kept as lse = log Z2."""

import math

import pytest
import spec
import torch
from grading import same

from model import attention, causal_mask
from support.kernels import sdpa

torch.manual_seed(0)


def qkv(B=2, H=4, Hkv=2, T=5, S=7, D=8):
    return (torch.randn(B, n, t, D, dtype=torch.float64) for n, t in ((H, T), (Hkv, S), (Hkv, S)))


def wrong(q, k, v, mask, i):
    """What the usual mistakes give for out (i = 0) or lse (i = 1)."""
    turned = [0, 2, 1, 3]                   # key heads handed out in turn: 0 1 0 1 instead of 0 0 1 1
    return {"q·k is not divided by √D": lambda: spec.attention(q * q.shape[-1] ** 0.5, k, v, mask)[i],
            "q·k is divided by D instead of √D": lambda: spec.attention(q / q.shape[-1] ** 0.5, k, v, mask)[i],
            "the mask is not applied": lambda: spec.attention(q, k, v, torch.ones_like(mask))[i],
            "True in the mask means may attend, not hidden": lambda: spec.attention(q, k, v, ~mask)[i],
            "key heads are handed out in turn, 0 1 0 1, not to neighbours":
                lambda: torch.tensor(spec.attention(q[:, turned], k, v, mask)[i])[:, turned]}


def test_attention_and_lse_are_what_the_loops_say():
    """out = Σ_s exp(q·k_s/√D) v_s / Z2 and lse = log Z2, Z2 = Σ_s exp(q·k_s/√D), over the keys that the mask allows."""
    q, k, v = qkv()
    mask = (torch.arange(7) <= torch.arange(5)[:, None] + 2).expand(2, 1, 5, 7)
    out, lse = attention(q, k, v, mask)
    expected_out, expected_lse = spec.attention(q, k, v, mask)
    same(lse, expected_lse, wrong(q, k, v, mask, 1))
    same(out, expected_out, wrong(q, k, v, mask, 0))


def test_any_mask_will_do_and_none_means_all_keys():
    q, k, v = qkv()
    mask = torch.rand(2, 1, 5, 7) < 0.6
    same(attention(q, k, v, mask)[1], spec.attention(q, k, v, mask)[1], wrong(q, k, v, mask, 1))
    same(attention(q, k, v)[0], spec.attention(q, k, v, torch.ones_like(mask))[0])


def test_every_head_attends_by_itself():
    """Multi-head attention is H attentions side by side: another query in head 3 changes head 3 alone."""
    q, k, v = qkv()
    out, lse = attention(q, k, v)
    q[:, 3] = 0
    same(attention(q, k, v)[0][:, :3], out[:, :3])
    assert (attention(q, k, v)[1][:, 3] - lse[:, 3]).abs().max() > 0.1


def test_grouped_query_heads_are_heads_whose_neighbours_have_the_same_keys():
    """H = 4 query heads on Hkv = 2 key heads: heads 0 and 1 read the first, 2 and 3 the second."""
    q, k, v = qkv()
    neighbours, in_turn = (attention(q, k[:, of], v[:, of]) for of in ([0, 0, 1, 1], [0, 1, 0, 1]))
    for i, found in enumerate(attention(q, k, v)):
        same(found, neighbours[i], {"key heads are handed out in turn, 0 1 0 1, not to neighbours": lambda i=i: in_turn[i]})


def test_softmax_weights_are_exp_of_score_minus_lse():
    """softmax(x)_s = exp(x_s − log Σ exp(x))"""
    q, k, v = qkv(H=2)
    _, lse = attention(q, k, v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    same((scores - lse.unsqueeze(-1)).exp(), scores.softmax(-1))


def test_lse_lies_between_the_largest_score_and_that_plus_log_of_the_number_of_keys():
    """max_s x_s ≤ log Σ_s exp(x_s) ≤ max_s x_s + log S: log Z is a soft maximum of the scores."""
    q, k, v = qkv(H=2)
    largest = (q @ k.transpose(-1, -2) / math.sqrt(8)).amax(-1)
    _, lse = attention(q, k, v)
    assert (largest < lse).all() and (lse < largest + math.log(7)).all()


def test_the_gradient_of_lse_is_the_mean_key():
    """∂ log Z2 / ∂q = Σ_s softmax_s · k_s / √D: what attention would return if the keys were its values."""
    q, k, v = (x.requires_grad_() for x in qkv())
    mean_key, lse = attention(q, k, k)
    lse.sum().backward()
    same(q.grad, mean_key / math.sqrt(8))


def test_lse_of_equal_scores_is_the_score_plus_log_of_their_number():
    q, k, v = torch.full((1, 1, 1, 4), 10.0), torch.full((1, 1, 3, 4), 50.0), torch.zeros(1, 1, 3, 4)
    assert attention(q, k, v)[1].item() == pytest.approx(1000 + math.log(3), rel=1e-6)      # q·k/√D = 4·500/2: no overflow


def test_lse_of_a_fully_masked_row_is_minus_infinity_and_its_output_zero():
    q, k, v = qkv()
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 1] = False
    out, lse = attention(q, k, v, mask)
    same(lse[0, :, 1], torch.full_like(lse[0, :, 1], -torch.inf), {
        "−inf − −inf is nan": lambda: torch.full_like(lse[0, :, 1], torch.nan)})
    same(out[0, :, 1], torch.zeros_like(out[0, :, 1]), {
        "the softmax of a row of −inf is nan": lambda: torch.full_like(out[0, :, 1], torch.nan),
        "a large negative number instead of −inf: the mean of values that nobody may see":
            lambda: v[0].mean(1).repeat_interleave(q.shape[1] // v.shape[1], 0)})
    assert out.isfinite().all()


def test_a_fully_masked_row_sends_no_gradient_and_no_nan():
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 1] = False
    out, lse = attention(q, k, v, mask)
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    same([x.grad.isfinite().all() for x in (q, k, v)], [True] * 3, {
        "nan of a softmax of −inf comes back in v's gradient, even where `out` is masked behind it": lambda: [True, True, False],
        "nan comes back in every gradient": lambda: [False] * 3})
    same(q.grad[0, :, 1], torch.zeros_like(q[0, :, 1]))


def test_gradients_of_output_and_lse_are_right():
    q, k, v = (x.requires_grad_() for x in qkv(B=1, T=3, S=4, D=2))
    mask = torch.ones(3, 4).tril(1).bool()[None, None]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask), (q, k, v))


def test_a_token_sees_itself_what_came_before_no_padding_and_no_further_than_the_window():
    seen = causal_mask(torch.tensor([[0, 1, 1, 1]]), 4, window=2)[0, 0].int().tolist()
    assert seen == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_the_library_kernel_computes_the_same_attention_without_lse():
    q, k, v = qkv()
    mask = causal_mask(torch.ones(2, 7), 5, window=0)
    same(attention(q, k, v, mask)[0], sdpa(q, k, v, mask))
