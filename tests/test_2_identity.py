"""Step 2. Section 3.1: attention over [demonstrations; query] is attention over the query plus a shift, exactly."""

import pytest
import torch

from mimic import icl_attention, mixing_weight
from model import attention, causal_mask, rope, rotate

torch.manual_seed(0)
EXACT = {"rtol": 0, "atol": 1e-12}          # float64
B, H, Hkv, D, T_D, T = 2, 4, 2, 8, 6, 5     # T_D demonstration tokens, then T query tokens


@pytest.fixture
def prompt():
    """q, k, v of a whole prompt [X_D; X], rotated by their positions in it, and its causal mask."""
    q, k, v = (torch.randn(B, n, T_D + T, D, dtype=torch.float64) for n in (H, Hkv, Hkv))
    cos, sin = rope(torch.arange(T_D + T).expand(B, -1), D, 10000.0, torch.float64)
    return rotate(q, cos, sin), rotate(k, cos, sin), v, causal_mask(torch.ones(B, T_D + T), T_D + T, 0)


def parts(prompt):
    """The prompt cut at the query → arguments of icl_attention."""
    q, k, v, mask = prompt
    return (q[:, :, T_D:], k[:, :, :T_D], v[:, :, :T_D], k[:, :, T_D:], v[:, :, T_D:],
            mask[:, :, T_D:, :T_D], mask[:, :, T_D:, T_D:])


def test_attending_to_two_key_sets_is_a_weighted_mean_of_two_attentions(prompt):
    q, k_D, v_D, k, v, mask_D, mask = parts(prompt)
    (out_D, lse_D), (out, lse) = attention(q, k_D, v_D, mask_D), attention(q, k, v, mask)
    Z1, Z2 = lse_D.exp().unsqueeze(-1), lse.exp().unsqueeze(-1)
    whole, _ = attention(*prompt)
    torch.testing.assert_close(Z1 / (Z1 + Z2) * out_D + Z2 / (Z1 + Z2) * out, whole[:, :, T_D:], **EXACT)


def test_the_weight_mu_is_the_sigmoid_of_the_lse_difference():
    Z1, Z2 = torch.rand(2, 50, dtype=torch.float64) * 10
    torch.testing.assert_close(mixing_weight(Z1.log(), Z2.log()), Z1 / (Z1 + Z2), **EXACT)


def test_mu_does_not_overflow_where_exp_would():
    assert mixing_weight(torch.tensor([1000.0, -1000.0]), torch.tensor([990.0, 1000.0])).tolist() == pytest.approx([0.9999546, 0])


def test_mu_of_a_row_without_keys_is_one_and_without_anything_zero():
    nothing = torch.tensor(-torch.inf)
    assert mixing_weight(torch.tensor(0.3), nothing) == 1 and mixing_weight(nothing, nothing) == 0


def test_icl_attention_equals_zero_shot_attention_plus_mu_times_shift(prompt):
    """SA(q,[K_D;K],[V_D;V]) = SA(q,K,V) + μ·(SA(q,K_D,V_D) − SA(q,K,V))"""
    out, mu, shift = icl_attention(*parts(prompt))
    torch.testing.assert_close(out, attention(*prompt)[0][:, :, T_D:], **EXACT)
    q, k_D, v_D, k, v, mask_D, mask = parts(prompt)
    torch.testing.assert_close(shift, attention(q, k_D, v_D, mask_D)[0] - attention(q, k, v, mask)[0], **EXACT)
    assert ((mu > 0) & (mu < 1)).all()


def test_without_demonstrations_mu_is_zero_and_nothing_is_shifted(prompt):
    q, k_D, v_D, k, v, mask_D, mask = parts(prompt)
    out, mu, _ = icl_attention(q, k_D, v_D, k, v, torch.zeros_like(mask_D), mask)
    assert (mu == 0).all()
    torch.testing.assert_close(out, attention(q, k, v, mask)[0], **EXACT)


def test_identity_survives_moving_the_query_to_position_zero():
    """RoPE is relative: the student, whose query starts at 0, has the teacher's SA(q,K,V). Only f(q) sees the position."""
    q, k, v = (torch.randn(1, n, T, D, dtype=torch.float64) for n in (H, Hkv, Hkv))
    mask, outs = causal_mask(torch.ones(1, T), T, 0), []
    for first in (0, T_D):
        cos, sin = rope(torch.arange(first, first + T)[None], D, 10000.0, torch.float64)
        outs.append(attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask)[0])
    torch.testing.assert_close(*outs, **EXACT)


def test_identity_fails_if_lse_sees_the_future(prompt):
    """The official code's log Z2 has no mask (shift_encoder.py:697): only the last token, without a future, comes out right."""
    q, k_D, v_D, k, v, mask_D, mask = parts(prompt)
    (out_D, lse_D), (out, _) = attention(q, k_D, v_D, mask_D), attention(q, k, v, mask)
    mu = mixing_weight(lse_D, attention(q, k, v)[1]).unsqueeze(-1)
    error = (out + mu * (out_D - out) - attention(*prompt)[0][:, :, T_D:]).abs().amax((0, 1, 3))
    assert error[-1] < 1e-12 and (error[:-1] > 0.01).all()


def test_mu_differs_between_heads_and_between_tokens(prompt):
    """Why one vector per layer with one magnitude cannot do it."""
    _, mu, _ = icl_attention(*parts(prompt))
    assert mu.std(1).min() > 0.01 and mu.std(2).min() > 0.01


def test_the_shift_moves_the_next_layers_query_so_the_identity_holds_layer_by_layer_only(prompt):
    """A second layer fed the unshifted output has another q: the shifts of all layers have to be right together."""
    out, _, _ = icl_attention(*parts(prompt))
    plain = attention(parts(prompt)[0], *parts(prompt)[3:5], parts(prompt)[6])[0]
    W = torch.randn(D, D, dtype=torch.float64)
    second = [icl_attention(x @ W, *parts(prompt)[1:])[0] for x in (out, plain)]
    assert (second[0] - second[1]).abs().max() > 0.01
