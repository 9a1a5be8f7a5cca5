"""Step 5. The identity says what each head must add, so f and v can be fitted layer by layer, without backpropagation."""


import numpy as np
import pytest
import torch
from conftest import with_pictures
from grading import same

import fit
from data import Batch, Rows
from mimic import MimIC, Recorder, mixing_weight
from model import InputError, Shifts

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


def batch(n_demonstrations=6, n_query=5, seed=0, per_picture=0):
    """Two prompts: <s>, demonstrations (one token fewer in the second row), query; and the query alone. per_picture: tokens of a
    picture, one in the demonstrations and one in the query of every row."""
    ids = torch.randint(3, 98, (2, 1 + n_demonstrations + n_query), generator=torch.Generator().manual_seed(seed))
    present = torch.ones_like(ids, dtype=torch.bool)
    ids[:, 0], ids[1, 0], ids[1, 1], present[1, 0] = 1, 0, 1, False
    ids[:, 2:2 + per_picture] = ids[:, -5:-5 + per_picture] = 99
    s_ids = torch.cat([torch.ones(2, 1, dtype=torch.long), ids[:, -n_query:]], 1)
    whole = torch.ones_like(s_ids, dtype=torch.bool)
    answer = whole.clone()
    answer[:, :-2] = False
    return Batch(Rows(ids, present, []), Rows(s_ids, whole, []), whole[:, 1:], answer, whole)


def pictured(model):
    """How many tokens a picture takes, and a function: rows → their image features, a query's the same in teacher and student."""
    _, features = with_pictures(model, torch.zeros(1, 3, dtype=torch.long))
    per_picture = 1 if model.text_model.crossed else 4

    def images(rows):
        n, found = int((rows.input_ids[0] == 99).sum()) // per_picture, []
        for row in rows.input_ids.tolist():
            g = torch.Generator().manual_seed(row[-1])
            found += [torch.randn(features.shape[1:], generator=g, dtype=features.dtype) for _ in range(n)][::-1]
        return torch.stack(found)

    return per_picture, images


def entering(model, rows):
    """The states of a prompt without pictures that the first layer's attention reads."""
    x = model.embed(rows.input_ids, None)
    return model.text_model.enter(0, x, None) if model.text_model.crossed else x


# ---------------------------------------------------------------------------------------------------------------------
# The streams are the model's own
# ---------------------------------------------------------------------------------------------------------------------
def test_teacher_and_student_walk_through_the_models_own_states(model):
    per_picture, images = pictured(model)
    b, mimic = batch(per_picture=per_picture), MimIC(3, 4, 16).double()
    torch.nn.init.normal_(mimic.vector)
    whole, shifted = Recorder(), Recorder(mimic)
    model(b.teacher.input_ids, b.teacher.attention_mask, images(b.teacher), shifts=whole)
    model(b.student.input_ids, b.student.attention_mask, images(b.student), shifts=shifted)
    x, s = (model.embed(rows.input_ids, images(rows)) for rows in (b.teacher, b.student))
    for layer in range(3):
        if layer in model.text_model.crossed:
            x, s = (model.text_model.enter(layer, states, model.pictures(rows.input_ids, images(rows)))
                    for states, rows in ((x, b.teacher), (s, b.student)))
        behind_attention, _, x = fit.teacher(model, layer, x, b.teacher, fit.is_demonstration(b), 5)
        torch.testing.assert_close(x, whole.layer[layer], **EXACT)
        torch.testing.assert_close(behind_attention, (whole.layer[layer] - whole.ffn[layer])[:, -5:], **EXACT)
        s = fit.advance(model, layer, s, b.student, mimic)
        torch.testing.assert_close(s, shifted.layer[layer], **EXACT)


def test_log_z1_counts_the_demonstrations_keys_and_no_others(model):
    b = batch()
    seen = {}

    class Keep(Shifts):
        def after_attention(self, layer, q, k, out, lse):
            seen[layer] = q, k
            return out
    model(b.teacher.input_ids, b.teacher.attention_mask, shifts=Keep())
    _, log_z1, _ = fit.teacher(model, 0, entering(model, b.teacher), b.teacher, fit.is_demonstration(b), 5)
    q, k = seen[0]
    for row, first in (0, 1), (1, 2):                      # behind the padding and <s>; the query takes the last 5 columns
        for h in range(4):
            for t in range(5):
                scores = [float(q[row, h, 7 + t] @ k[row, h * k.shape[1] // 4, s]) / 4 for s in range(first, 7)]
                assert log_z1[row, h, t].item() == pytest.approx(np.log(np.exp(scores).sum()), abs=1e-10)


def test_the_target_is_what_makes_the_students_stream_the_teachers(model):
    b = batch()
    x, s = entering(model, b.teacher), entering(model, b.student)
    h_T, _, above = fit.teacher(model, 0, x, b.teacher, fit.is_demonstration(b), 5)
    h_S, _, _ = fit.student(model, 0, s, b.student)
    block, moved = model.text_model.layers[0], h_S[:, -5:] + (h_T - h_S[:, -5:])
    torch.testing.assert_close(moved + block.mlp(block.post_attention_layernorm(moved)), above[:, -5:], **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# One layer's regression
# ---------------------------------------------------------------------------------------------------------------------
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
    for i, found in enumerate(fit.start_f(q, log_z1, ridge=0.3)):
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
    """numpy: v (H,D), by the (N·d, H·D) matrix that fit.py never makes, and the share of Δ's squares that is left."""
    design, target = np.einsum("nh,dhi->ndhi", mu, w_o).reshape(delta.numel(), -1), delta.numpy().reshape(-1)
    v = np.linalg.lstsq(design, target, rcond=None)[0]
    return torch.tensor(v).view(w_o.shape[1:]), ((design @ v - target) ** 2).sum() / (target ** 2).sum()


def test_v_is_the_least_squares_solution_over_all_heads_at_once():
    """argmin_v Σ_n ‖Σ_h μ̃_nh W_o^h v_h − Δ_n‖²"""
    mu, delta, w_o = noisy()
    v = fit.best_v(mu, delta, w_o, fit.normal_o(w_o), ridge=0)
    same(v, least_squares(mu, delta, w_o)[0], {
        "every head by itself: together they add everything H times": lambda: torch.cat(
            [least_squares(mu[:, h:h + 1], delta, w_o[:, h:h + 1])[0] for h in range(3)])}, atol=1e-8)


def test_unexplained_is_the_share_of_the_targets_squares_that_is_left():
    """Σ_n ‖Σ_h μ̃_nh W_o^h v_h − Δ_n‖² / Σ_n ‖Δ_n‖²: 0 is perfect, 1 is what v = 0 leaves"""
    mu, delta, w_o = noisy()
    v, left = least_squares(mu, delta, w_o)
    same(fit.unexplained(mu, v, delta, w_o), left, {
        "the explained share": lambda: 1 - left, "not squared": lambda: left ** 0.5,
        "not divided by the squares of Δ": lambda: left * (delta ** 2).sum()}, atol=1e-10)
    same(fit.unexplained(mu, 0 * v, delta, w_o), 1)


def test_planted_f_and_v_are_found_again_when_the_model_is_exact():
    q, log_z1, log_z2, delta, w_o, (weight, bias, v) = planted()
    got = fit.refine(*fit.start_f(q, log_z1), q, log_z2, delta, w_o, fit.normal_o(w_o), iterations=500, penalty=0)
    for found, true in zip(got[:3], (weight, bias, v), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_refining_never_explains_less_than_the_start(seed):
    q, log_z1, log_z2, _, w_o, _ = planted(N=60, seed=seed)
    delta = torch.randn(60, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start, end = fit.fit_layer(MimIC(1, 3, 4).double(), 0, q, log_z1, log_z2, delta, w_o)
    assert 0 <= start <= end <= 1


def test_least_squares_sees_several_draws_only_through_their_mean():
    q, log_z1, log_z2, delta, w_o, (weight, bias, _) = planted()
    mu, gram_o = mixing_weight(log_z1, log_z2), fit.normal_o(w_o)
    noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    stacked = fit.best_v(mu.repeat(2, 1), torch.cat([delta + noise, delta - noise]), w_o, gram_o)
    torch.testing.assert_close(stacked, fit.best_v(mu, delta, w_o, gram_o), **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# The whole fit
# ---------------------------------------------------------------------------------------------------------------------
def run_fit(model, folder, mu_of="head", tokens="all", memory_gb=1.0):
    folder.mkdir(exist_ok=True)
    mimic, (per_picture, images) = MimIC(3, 4, 16, mu_of=mu_of), pictured(model)
    chunks = [[batch(seed=2 * c + n, per_picture=per_picture) for n in range(2)] for c in range(4)]
    for draws in chunks:                                   # other demonstrations, the same queries
        draws[1].student.input_ids[:] = draws[0].student.input_ids
        draws[1].teacher.input_ids[:, -5:] = draws[0].teacher.input_ids[:, -5:]
    kept, on_disk = fit.plan(model, chunks, [98, 99], tokens, memory_gb)
    shares = fit.fit(model, mimic, chunks, kept, on_disk, lambda rows: model.embed(rows.input_ids, images(rows)), folder,
                     lambda rows: model.pictures(rows.input_ids, images(rows)))
    return mimic, shares


def test_every_layer_explains_a_share_and_a_constant_shift_a_smaller_one(model, tmp_path):
    _, shares = run_fit(model, tmp_path / "head")
    _, constant = run_fit(model, tmp_path / "one", mu_of="one")
    assert len(shares) == 3 and all(0 < c < s < 1 for c, s in zip(constant[:1], shares[:1], strict=True))


def test_the_same_seed_gives_the_same_bytes_and_a_fit_goes_on_behind_its_last_layer(model, tmp_path, monkeypatch):
    whole, _ = run_fit(model, tmp_path / "whole")
    again, _ = run_fit(model, tmp_path / "again")
    real = fit.fit_layer

    def stops(mimic, layer, *args):
        if layer == 2:
            raise KeyboardInterrupt
        return real(mimic, layer, *args)
    monkeypatch.setattr(fit, "fit_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        run_fit(model, tmp_path / "cut")
    monkeypatch.setattr(fit, "fit_layer", real)
    resumed, shares = run_fit(model, tmp_path / "cut")
    assert len(shares) == 3
    for a, b, c in zip(whole.parameters(), again.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_states_beyond_the_memory_lie_on_disk_as_bf16_and_the_fit_is_nearly_the_same(model, tmp_path):
    kept, shares = run_fit(model, tmp_path / "memory")
    spilled, others = run_fit(model, tmp_path / "disk", memory_gb=2e-4)
    assert others == pytest.approx(shares, abs=0.02) and not torch.equal(kept.vector, spilled.vector)
    assert not (tmp_path / "disk" / "states").exists()
    with pytest.raises(InputError, match="--memory-gb: expected at least"):
        run_fit(model, tmp_path / "none", memory_gb=1e-6)


def test_image_tokens_may_be_kept_or_left_out(model, tmp_path, monkeypatch):
    counted = []
    real = fit.fit_layer
    monkeypatch.setattr(fit, "fit_layer", lambda m, layer, q, *rest: (counted.append(q.shape[1]), real(m, layer, q, *rest))[1])
    for tokens in "all", "text", "answer":
        run_fit(model, tmp_path / tokens, tokens=tokens)
    every, text, answer = counted[0], counted[3], counted[6]
    assert (every, text, answer) == (4 * 2 * 5, 4 * 2 * (5 - pictured(model)[0]), 4 * 2 * 2)


def test_demonstrations_begin_behind_what_both_prompts_share_and_end_before_the_query(model):
    b, column = batch(), torch.arange(12)
    assert torch.equal(fit.is_demonstration(b), torch.stack([(1 <= column) & (column < 7), (2 <= column) & (column < 7)]))
