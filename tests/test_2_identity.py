"""Step 2. Section 3.1: attention over [demonstrations; query] is attention over the query plus a shift, exactly."""

import pytest
import spec
import torch
from grading import same

from mimic import icl_attention, mixing_weight
from model import attention, causal_mask, rope, rotate

torch.manual_seed(0)
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


def whole(prompt):
    """Attention over [K_D; K] at the query's tokens, in loops."""
    return torch.tensor(spec.attention(*prompt)[0], dtype=torch.float64)[:, :, T_D:]


def both(prompt):
    """SA_D, log Z1 and SA, log Z2: the attentions to the demonstrations alone and to the query alone, in loops."""
    q, k_D, v_D, k, v, mask_D, mask = parts(prompt)
    return (torch.tensor(x, dtype=torch.float64) for x in (*spec.attention(q, k_D, v_D, mask_D), *spec.attention(q, k, v, mask)))


def unmasked_mu(prompt):
    """μ as it comes out when nobody passes the masks on."""
    q, k_D, v_D, k, v, *_ = parts(prompt)
    log_z1, log_z2 = (torch.tensor(spec.attention(q, *kv, torch.ones(B, 1, T, kv[0].shape[2]))[1], dtype=torch.float64)
                      for kv in ((k_D, v_D), (k, v)))
    return 1 / (1 + (log_z2 - log_z1).exp()).unsqueeze(-1)


def test_the_sum_over_two_key_sets_is_the_sum_of_two_sums(prompt):
    """Z(q,[K_D;K]) = Z1 + Z2,  Z1 = Σ_i exp(q·K_D,i/√D),  Z2 = Σ_j exp(q·K_j/√D), under the mask of the whole prompt"""
    _, log_z1, _, log_z2 = both(prompt)
    log_z = torch.tensor(spec.attention(*prompt)[1], dtype=torch.float64)[:, :, T_D:]
    same(log_z1.exp() + log_z2.exp(), log_z.exp())


def test_attending_to_two_key_sets_is_a_weighted_mean_of_two_attentions(prompt):
    """SA(q,[K_D;K],[V_D;V]) = Z1/(Z1+Z2) · SA(q,K_D,V_D) + Z2/(Z1+Z2) · SA(q,K,V)"""
    SA_D, log_z1, SA, log_z2 = both(prompt)
    Z1, Z2 = log_z1.exp().unsqueeze(-1), log_z2.exp().unsqueeze(-1)
    same(Z1 / (Z1 + Z2) * SA_D + Z2 / (Z1 + Z2) * SA, whole(prompt))


def test_the_weight_mu_is_the_sigmoid_of_the_lse_difference():
    """μ = Z1 / (Z1 + Z2) = 1 / (1 + e^(log Z2 − log Z1))"""
    Z1, Z2 = torch.rand(2, 50, dtype=torch.float64) * 10
    same(mixing_weight(Z1.log(), Z2.log()), Z1 / (Z1 + Z2), {
        "Z2 stands in the numerator": lambda: Z2 / (Z1 + Z2),
        "Z1/Z2: not divided by the sum": lambda: Z1 / Z2,
        "the arguments are logarithms already": lambda: Z1.log() / (Z1.log() + Z2.log()),
        "the sigmoid of log Z1 alone": lambda: Z1 / (Z1 + 1)})


def test_mu_does_not_overflow_where_exp_would():
    assert mixing_weight(torch.tensor([1000.0, -1000.0]), torch.tensor([990.0, 1000.0])).tolist() == pytest.approx([0.9999546, 0])


def test_mu_of_a_row_without_keys_is_one_and_without_anything_zero():
    nothing = torch.tensor(-torch.inf)
    same(mixing_weight(torch.tensor(0.3), nothing), 1)
    same(mixing_weight(nothing, nothing), 0, {"−inf − −inf is nan": lambda: torch.nan})


def test_icl_attention_equals_zero_shot_attention_plus_mu_times_shift(prompt):
    """SA(q,[K_D;K],[V_D;V]) = SA(q,K,V) + μ·(SA(q,K_D,V_D) − SA(q,K,V)): heads, shared keys, RoPE and causal mask included"""
    out, mu, shift = icl_attention(*parts(prompt))
    SA_D, log_z1, SA, log_z2 = both(prompt)
    true_mu = 1 / (1 + (log_z2 - log_z1).exp()).unsqueeze(-1)
    same(mu, true_mu, {"Z2 stands in the numerator": lambda: 1 - true_mu,
                       "the masks are not passed on to attention": lambda: unmasked_mu(prompt)})
    same(shift, SA_D - SA, {"SA − SA_D: the sign": lambda: SA - SA_D, "SA_D alone is no difference": lambda: SA_D})
    same(out, whole(prompt), {"SA + shift, without μ": lambda: SA_D, "μ · shift alone, without SA": lambda: whole(prompt) - SA,
                              "SA + μ · SA_D: SA has to lose what SA_D gains": lambda: SA + true_mu * SA_D})


def test_the_shift_is_added_at_every_head_before_w_o_mixes_them(prompt):
    """W_o [head 1; … head H] is linear, so the shift of a layer is Σ_h W_o^h μ_h · shift_h: one vector of d numbers a token."""
    (_, mu, shift), (_, _, SA, _) = icl_attention(*parts(prompt)), both(prompt)
    W_o = torch.randn(H, D, 16, dtype=torch.float64)
    layer_shift = sum((mu[:, h] * shift[:, h]) @ W_o[h] for h in range(H))
    with_demonstrations, without = (torch.einsum("bhtd,hde->bte", x, W_o) for x in (whole(prompt), SA))
    same(without + layer_shift, with_demonstrations)


def test_without_demonstrations_mu_is_zero_and_nothing_is_shifted(prompt):
    q, k_D, v_D, k, v, mask_D, mask = parts(prompt)
    out, mu, _ = icl_attention(q, k_D, v_D, k, v, torch.zeros_like(mask_D), mask)
    assert (mu == 0).all()
    same(out, spec.attention(q, k, v, mask)[0])


def test_with_nothing_but_demonstrations_mu_is_one_and_all_is_shifted(prompt):
    q, k_D, v_D, k, v, mask_D, mask = parts(prompt)
    out, mu, _ = icl_attention(q, k_D, v_D, k, v, mask_D, torch.zeros_like(mask))
    assert (mu == 1).all()
    same(out, spec.attention(q, k_D, v_D, mask_D)[0])


def test_identity_survives_moving_the_query_to_position_zero():
    """RoPE is relative: the student, whose query starts at 0, has the teacher's SA(q,K,V). Only f(q) sees the position."""
    q, k, v = (torch.randn(1, n, T, D, dtype=torch.float64) for n in (H, Hkv, Hkv))
    mask, outs = causal_mask(torch.ones(1, T), T, 0), []
    for first in (0, T_D):
        cos, sin = rope(torch.arange(first, first + T)[None], D, 10000.0, torch.float64)
        outs.append(attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask)[0])
    same(*outs)


def test_identity_fails_if_lse_sees_the_future(prompt):
    """The official code's log Z2 has no mask (shift_encoder.py:697): only the last token, without a future, comes out right."""
    q, k_D, v_D, k, v, mask_D, mask = parts(prompt)
    (SA_D, log_z1), (SA, _) = attention(q, k_D, v_D, mask_D), attention(q, k, v, mask)
    mu = mixing_weight(log_z1, attention(q, k, v)[1]).unsqueeze(-1)
    error = (SA + mu * (SA_D - SA) - whole(prompt)).abs().amax((0, 1, 3))
    assert error[-1] < 1e-12 and (error[:-1] > 0.01).all()


def test_mu_and_the_shift_differ_between_heads_and_between_tokens(prompt):
    """So neither one magnitude nor one vector a layer is what demonstrations do."""
    _, mu, shift = icl_attention(*parts(prompt))
    assert mu.std(1).min() > 0.01 and mu.std(2).min() > 0.01
    assert shift.std(1).min() > 0.001 and shift.std(2).min() > 0.001


def test_one_vector_cannot_shift_two_queries_that_look_at_different_demonstrations():
    """q1 looks at a demonstration whose value is +1, q2 at one whose value is −1: whatever c is added, max_q |shift(q) − c| is at
    least half of |shift(q1) − shift(q2)|. (The next step shows two heads with a magnitude each that do it.)"""
    eye = torch.eye(2, dtype=torch.float64)[None, None]
    nothing, values = torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.tensor([[[[1.0, 0], [-1, 0]]]], dtype=torch.float64)
    _, mu, shift = icl_attention(10 * eye, 10 * eye, values, nothing, nothing)
    first, second = (mu * shift)[0, 0, :, 0]
    c = torch.linspace(-2, 2, 401, dtype=torch.float64)
    misses = torch.stack([(first - c).abs(), (second - c).abs()]).amax(0)
    assert misses.min() >= (first - second) / 2 - 1e-12 > 0.99


def test_the_shift_moves_the_next_layers_query_so_the_identity_holds_layer_by_layer_only(prompt):
    """A second layer fed the unshifted output has another q: the shifts of all layers have to be right together."""
    out, _, _ = icl_attention(*parts(prompt))
    plain = attention(parts(prompt)[0], *parts(prompt)[3:5], parts(prompt)[6])[0]
    W = torch.randn(D, D, dtype=torch.float64)
    second = [icl_attention(x @ W, *parts(prompt)[1:])[0] for x in (out, plain)]
    assert (second[0] - second[1]).abs().max() > 0.01
