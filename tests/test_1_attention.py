"""Step 1. Softmax attention, and the number it divides by: Z2 = Σ_s exp(q·k_s/√D), kept as lse = log Z2."""

import math

import pytest
import spec
import torch

from model import attention, causal_mask, sdpa

torch.manual_seed(0)
EXACT = {"rtol": 0, "atol": 1e-12}          # float64: about 16 digits, sums of some ten terms


def qkv(B=2, H=4, Hkv=2, T=5, S=7, D=8):
    return (torch.randn(B, n, t, D, dtype=torch.float64) for n, t in ((H, T), (Hkv, S), (Hkv, S)))


def test_attention_and_lse_are_what_the_loops_say():
    q, k, v = qkv()
    mask = torch.rand(2, 1, 5, 7) < 0.6
    out, lse = attention(q, k, v, mask)
    expected_out, expected_lse = spec.attention(q, k, v, mask)
    torch.testing.assert_close(out, torch.tensor(expected_out, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(lse, torch.tensor(expected_lse, dtype=torch.float64), **EXACT)


def test_softmax_weights_are_exp_of_score_minus_lse():
    q, k, v = qkv(H=2)
    _, lse = attention(q, k, v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    torch.testing.assert_close((scores - lse.unsqueeze(-1)).exp(), scores.softmax(-1), **EXACT)


def test_lse_of_equal_scores_is_the_score_plus_log_of_their_number():
    q, k, v = torch.full((1, 1, 1, 4), 10.0), torch.full((1, 1, 3, 4), 50.0), torch.zeros(1, 1, 3, 4)
    assert attention(q, k, v)[1].item() == pytest.approx(1000 + math.log(3), rel=1e-6)      # q·k/√D = 4·500/2: no overflow


def test_lse_of_a_fully_masked_row_is_minus_infinity_and_its_output_zero():
    q, k, v = qkv()
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 1] = False
    out, lse = attention(q, k, v, mask)
    assert (lse[0, :, 1] == -math.inf).all() and (out[0, :, 1] == 0).all() and out.isfinite().all()


def test_a_fully_masked_row_sends_no_gradient_and_no_nan():
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 1] = False
    out, lse = attention(q, k, v, mask)
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    assert (q.grad[0, :, 1] == 0).all() and all(x.grad.isfinite().all() for x in (q, k, v))


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
    torch.testing.assert_close(sdpa(q, k, v, mask), attention(q, k, v, mask)[0], **EXACT)
