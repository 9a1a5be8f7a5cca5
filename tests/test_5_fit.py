"""Step 5. The identity says what each head must add, so f and v can be fitted layer by layer, without backpropagation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import with_pictures
from grading import same

from data import ANSWER, ICD, PADDING, QUERY, START, Batch, Rows
from experiments import layerwise
from mimic import MimIC, Recorder, mixing_weight
from model import Shifts

EXACT = {"rtol": 0, "atol": 1e-10}


def planted(N=400, H=3, D=4, d=10, seed=0):
    """A layer whose Δ is Σ_h μ̃_h W_o^h v_h exactly: q (H,N,D), log Z1 (noisy), log Z2, Δ, W_o; weight, bias, v behind it."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, log_z2, w_o, weight, bias, v = rand(H, N, D), rand(N, H), rand(d, H, D), rand(H, D), rand(H), rand(H, D)
    f = torch.einsum("hnd,hd->nh", q, weight) + bias
    delta = torch.einsum("nh,dhi,hi->nd", mixing_weight(f, log_z2), w_o, v)
    return q, f + 0.5 * rand(N, H), log_z2, delta, w_o, (weight, bias, v)


def batch(n_demonstrations=6, n_query=5, seed=0, per_picture=0, asked=None):
    """Two prompts: <s>, demonstrations (one token fewer in the second row), query; and the query alone. per_picture: tokens of a
    picture, one in the demonstrations and one in the query of every row. asked: a batch with the same queries."""
    ids = torch.randint(3, 98, (2, 1 + n_demonstrations + n_query), generator=torch.Generator().manual_seed(seed))
    part = torch.tensor([[START] + n_demonstrations * [ICD] + (n_query - 2) * [QUERY] + 2 * [ANSWER]] * 2)
    ids[:, 0], ids[1, 0], ids[1, 1], part[1, 0], part[1, 1] = 1, 0, 1, PADDING, START
    ids[:, 2:2 + per_picture] = ids[:, -5:-5 + per_picture] = 99
    if asked is not None:
        ids[:, -n_query:] = asked.student.input_ids[:, 1:]
    s_ids = torch.cat([torch.ones(2, 1, dtype=torch.long), ids[:, -n_query:]], 1)
    s_part = torch.cat([torch.full((2, 1), START), part[:, -n_query:]], 1)
    shown, queries = ([SimpleNamespace(image_id=i) for i in ids[:, column].tolist()] for column in (n_demonstrations, -1))
    pictures = [s for pair in zip(shown, queries, strict=True) for s in pair]
    processor = SimpleNamespace(image_ids=[98, 99])
    return Batch(Rows(ids, part, pictures, processor), Rows(s_ids, s_part, queries, processor))


def pictured(model):
    """How many tokens a picture takes, and the features of pictures with the names 0 … 99."""
    _, features = with_pictures(model, torch.zeros(1, 3, dtype=torch.long))
    g = torch.Generator().manual_seed(0)
    return 1 if model.text_model.crossed else 4, dict(enumerate(torch.randn(100, *features.shape[1:], generator=g).to(features)))


def entering(model, rows):
    """The states of a prompt without pictures that the first layer's attention reads."""
    x = model.embed(rows.input_ids, None)
    return model.text_model.enter(0, x, None) if model.text_model.crossed else x


# ---- The streams are the model's own
def test_teacher_and_student_walk_through_the_models_own_states(model):
    per_picture, features = pictured(model)
    b, mimic = batch(per_picture=per_picture), MimIC(3, 4, 16).double()
    torch.nn.init.normal_(mimic.vector)
    whole, shifted = Recorder(), Recorder(mimic)
    teacher, student = b.teacher.inputs(model, features), b.student.inputs(model, features)
    model(**teacher, shifts=whole)
    model(**student, shifts=shifted)
    x, s = (model.embed(inputs["input_ids"], inputs["image_features"]) for inputs in (teacher, student))
    for layer in range(3):
        x = layerwise.enter(model, layer, x, b.teacher, features)
        s = layerwise.enter(model, layer, s, b.student, features)
        behind_attention, _, x = layerwise.teacher(model, layer, x, b.teacher, 5)
        torch.testing.assert_close(x, whole.layer[layer], **EXACT)
        torch.testing.assert_close(behind_attention, (whole.layer[layer] - whole.ffn[layer])[:, -5:], **EXACT)
        s = layerwise.advance(model, layer, s, b.student, mimic)
        torch.testing.assert_close(s, shifted.layer[layer], **EXACT)


def test_log_z1_counts_the_demonstrations_keys_and_no_others(model):
    b = batch()
    seen = {}

    class Keep(Shifts):
        def after_attention(self, layer, q, k, out, lse):
            seen[layer] = q, k
            return out
    model(b.teacher.input_ids, b.teacher.attention_mask, shifts=Keep())
    _, log_z1, _ = layerwise.teacher(model, 0, entering(model, b.teacher), b.teacher, 5)
    q, k = seen[0]
    for row, first in (0, 1), (1, 2):                      # behind the padding and <s>; the query takes the last 5 columns
        for h in range(4):
            for t in range(5):
                scores = [float(q[row, h, 7 + t] @ k[row, h * k.shape[1] // 4, s]) / 4 for s in range(first, 7)]
                assert log_z1[row, h, t].item() == pytest.approx(np.log(np.exp(scores).sum()), abs=1e-10)


def test_the_target_is_what_makes_the_students_stream_the_teachers(model):
    b = batch()
    x, s = entering(model, b.teacher), entering(model, b.student)
    h_T, _, above = layerwise.teacher(model, 0, x, b.teacher, 5)
    h_S, *_ = layerwise.watched(model, 0, s, b.student)
    block, moved = model.text_model.layers[0], h_S[:, -5:] + (h_T - h_S[:, -5:])
    torch.testing.assert_close(moved + block.mlp(block.post_attention_layernorm(moved)), above[:, -5:], **EXACT)


# ---- One layer's regression
def ridge_regression(q, log_z1, ridge, centre=True):
    """numpy: weight (H,D) and bias (H); the ridge as D more rows, on centred columns."""
    found = []
    for X, z in zip(q.numpy(), log_z1.T.numpy(), strict=True):
        means = (X.mean(0), z.mean()) if centre else (0 * X[0], 0.0)
        rows = np.vstack([X - means[0], np.sqrt(ridge * len(X)) * np.eye(X.shape[1])])
        weight = np.linalg.lstsq(rows, np.concatenate([z - means[1], np.zeros(X.shape[1])]), rcond=None)[0]
        found.append((weight, means[1] - means[0] @ weight))
    return [torch.tensor(np.array(x)) for x in zip(*found, strict=True)]


def test_f_starts_as_the_ridge_regression_of_log_z1_on_q_and_1():
    """argmin 1/N Σ_n (weight·q_n + bias − log Z1_n)² + ridge·‖weight‖²"""
    q, log_z1, *_ = planted()
    q = q + 1
    expected = ridge_regression(q, log_z1, 0.3)
    for i, found in enumerate(layerwise.start_f(q, log_z1, ridge=0.3)):
        same(found, expected[i], {
            "no ridge": lambda i=i: ridge_regression(q, log_z1, 0)[i],
            "the ridge is not multiplied by N, though QᵀQ is a sum": lambda i=i: ridge_regression(q, log_z1, 0.3 / 400)[i],
            "no bias: q and log Z1 are not centred": lambda i=i: ridge_regression(q, log_z1, 0.3, False)[i],
            "the bias is mean log Z1 − weight·mean q": lambda: log_z1.mean(0)}, atol=1e-10)


def noisy():
    """μ̃ (N,H) of planted f, and a Δ (N,d) that no v explains wholly; W_o (d,H,D)."""
    q, _, log_z2, delta, w_o, (weight, bias, _) = planted()
    delta = delta + torch.randn(delta.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return mixing_weight(torch.einsum("hnd,hd->nh", q, weight) + bias, log_z2), delta, w_o


def least_squares(mu, delta, w_o):
    """numpy: v (H,D), by the (N·d, H·D) matrix that layerwise.py never makes, and the share of Δ's squares that is left."""
    design, target = np.einsum("nh,dhi->ndhi", mu, w_o).reshape(delta.numel(), -1), delta.numpy().reshape(-1)
    v = np.linalg.lstsq(design, target, rcond=None)[0]
    return torch.tensor(v).view(w_o.shape[1:]), ((design @ v - target) ** 2).sum() / (target ** 2).sum()


def test_v_is_the_least_squares_solution_over_all_heads_at_once():
    """argmin_v Σ_n ‖Σ_h μ̃_nh W_o^h v_h − Δ_n‖²"""
    mu, delta, w_o = noisy()
    v = layerwise.best_v(mu, delta, w_o, layerwise.normal_o(w_o), ridge=0)
    same(v, least_squares(mu, delta, w_o)[0], {
        "every head by itself: together they add everything H times": lambda: torch.cat(
            [least_squares(mu[:, h:h + 1], delta, w_o[:, h:h + 1])[0] for h in range(3)])}, atol=1e-8)


def test_unexplained_is_the_share_of_the_targets_squares_that_is_left():
    """Σ_n ‖Σ_h μ̃_nh W_o^h v_h − Δ_n‖² / Σ_n ‖Δ_n‖²: 0 is perfect, 1 is what v = 0 leaves"""
    mu, delta, w_o = noisy()
    v, left = least_squares(mu, delta, w_o)
    same(layerwise.unexplained(mu, v, delta, w_o), left, {
        "the explained share": lambda: 1 - left, "not squared": lambda: left ** 0.5,
        "not divided by the squares of Δ": lambda: left * (delta ** 2).sum()}, atol=1e-10)
    same(layerwise.unexplained(mu, 0 * v, delta, w_o), 1)


def test_planted_f_and_v_are_found_again_when_the_model_is_exact():
    q, log_z1, log_z2, delta, w_o, (weight, bias, v) = planted()
    gram_o = layerwise.normal_o(w_o)
    got = layerwise.refine(*layerwise.start_f(q, log_z1), q, log_z2, delta, w_o, gram_o, iterations=500, penalty=0)
    for found, true in zip(got[:3], (weight, bias, v), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_refining_never_explains_less_than_the_start(seed):
    q, log_z1, log_z2, _, w_o, _ = planted(N=60, seed=seed)
    delta = torch.randn(60, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start, end = layerwise.fit_layer(MimIC(1, 3, 4).double(), 0, q, log_z1, log_z2, delta, w_o)
    assert 0 <= start <= end <= 1


def test_least_squares_sees_several_draws_only_through_their_mean():
    q, log_z1, log_z2, delta, w_o, (weight, bias, _) = planted()
    mu, gram_o = mixing_weight(log_z1, log_z2), layerwise.normal_o(w_o)
    noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    stacked = layerwise.best_v(mu.repeat(2, 1), torch.cat([delta + noise, delta - noise]), w_o, gram_o)
    torch.testing.assert_close(stacked, layerwise.best_v(mu, delta, w_o, gram_o), **EXACT)


# ---- The whole fit
def run_fit(model, mu_of="head"):
    """Four batches of queries, each behind two draws of demonstrations."""
    mimic, (per_picture, features) = MimIC(3, 4, 16, mu_of=mu_of), pictured(model)
    first = [batch(seed=2 * c, per_picture=per_picture) for c in range(4)]
    drawn = [[b, batch(seed=2 * c + 1, per_picture=per_picture, asked=b)] for c, b in enumerate(first)]
    return mimic, layerwise.fit(model, mimic, drawn, features)


def test_every_layer_explains_a_share_and_a_constant_shift_a_smaller_one(model):
    _, shares = run_fit(model)
    _, constant = run_fit(model, mu_of="one")
    assert len(shares) == 3 and all(0 < c < s < 1 for c, s in zip(constant[:1], shares[:1], strict=True))


def test_the_same_samples_give_the_same_bytes(model):
    for a, b in zip(run_fit(model)[0].parameters(), run_fit(model)[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_token_of_query_and_answer_is_fitted_image_tokens_too(model, monkeypatch):
    counted = []
    real = layerwise.fit_layer
    monkeypatch.setattr(layerwise, "fit_layer",
                        lambda m, layer, q, *rest: (counted.append(q.shape[1]), real(m, layer, q, *rest))[1])
    run_fit(model)
    assert counted == [4 * 2 * 5] * 3
