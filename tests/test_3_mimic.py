"""Step 3. Section 3.2: a MimIC head is SA(q,K,V) + μ̃·v with μ̃ = e^f(q) / (e^f(q) + Z2)."""

import json
import math

import pytest
import spec
import torch
from conftest import with_pictures
from grading import same

from mimic import MimIC, Recorder
from model import Config, Shifts, attention, causal_mask
from models.idefics1 import Idefics1Config
from support.files import InputError


def random_mimic(model, **options):
    c = model.config.text
    torch.manual_seed(1)
    mimic = MimIC(c.num_hidden_layers, c.num_attention_heads, c.head_dim, **options).double()
    for p in mimic.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return mimic


def prompt(n=7, seed=0):
    ids = torch.randint(3, 99, (2, n), generator=torch.Generator().manual_seed(seed))
    return ids, torch.ones_like(ids)


def head(L=1, H=1, D=4, seed=0):
    """MimIC heads with parameters of size 1 in float64, and q, k, v of five tokens for them."""
    torch.manual_seed(seed)
    mimic = MimIC(L, H, D).double()
    for p in mimic.parameters():
        torch.nn.init.normal_(p)
    return mimic, *(torch.randn(1, H, 5, D, dtype=torch.float64) for _ in range(3))


# ---------------------------------------------------------------------------------------------------------------------
# The equation
# ---------------------------------------------------------------------------------------------------------------------
def test_f_is_a_linear_map_to_one_number_for_every_head_of_every_layer():
    """f(q) = f_weight · q + f_bias"""
    mimic, q, *_ = head(2, 3)
    w, b = mimic.f_weight.detach(), mimic.f_bias.detach()
    expected = torch.stack([torch.stack([q[0, h] @ w[1, h] + b[1, h] for h in range(3)])])
    same(mimic.f(1, q), expected, {
        "f looks at q itself, not at q/√D": lambda: (expected - b[1][:, None]) / 2 + b[1][:, None],
        "the bias is missing": lambda: expected - b[1][:, None],
        "every head has weights of its own; these are head 0's": lambda: torch.einsum("bhtd,d->bht", q, w[1, 0]) + b[1][:, None],
        "every layer has weights of its own; these are layer 0's": lambda: torch.einsum("bhtd,hd->bht", q, w[0]) + b[0][:, None]})


def test_mu_is_the_weight_of_the_identity_with_f_in_the_place_of_log_z1():
    """μ̃ = e^f / (e^f + Z2)"""
    mimic, q, k, _ = head(2, 3)
    lse = torch.randn(1, 3, 5, dtype=torch.float64)
    f = torch.einsum("bhtd,hd->bht", q, mimic.f_weight[1]) + mimic.f_bias[1][:, None]
    same(mimic.mu(1, q, k, lse), f.exp() / (f.exp() + lse.exp()), {
        "Z2 stands in the numerator": lambda: lse.exp() / (f.exp() + lse.exp()),
        "f alone: Z2 is missing": lambda: f.sigmoid(),
        "f is log Z1, not Z1": lambda: f / (f + lse.exp()),
        "log Z2 over all keys, future and padding included, though z2 is masked":
            lambda: 1 / (1 + (torch.logsumexp(q @ k.mT / 2, -1) - f).exp())})


def test_a_head_adds_mu_times_its_vector_at_every_token():
    """SA(q,K,V) + μ̃·v, in loops over heads and tokens"""
    mimic, q, k, v = head(2, 3)
    SA, lse = attention(q, k, v, causal_mask(torch.ones(1, 5), 5, 0))
    expected, w, b, bold_v = SA.clone(), *(p.detach()[1] for p in (mimic.f_weight, mimic.f_bias, mimic.vector))
    for h in range(3):
        for t in range(5):
            f = b[h].item() + sum(x * y for x, y in zip(w[h].tolist(), q[0, h, t].tolist(), strict=True))
            expected[0, h, t] += math.exp(f) / (math.exp(f) + math.exp(lse[0, h, t].item())) * bold_v[h]
    same(mimic.after_attention(1, q, k, SA, lse), expected, {
        "μ̃·v is what is added; SA is missing": lambda: expected - SA,
        "v is added whole, without μ̃": lambda: SA + bold_v[:, None],
        "(1 − μ̃)·SA + μ̃·v: v stands for the difference SA_D − SA, so SA stays whole":
            lambda: expected - (expected - SA).norm(dim=-1, keepdim=True) / bold_v.norm(dim=-1)[:, None, None] * SA})


def test_f_to_minus_infinity_is_zero_shot_and_to_plus_infinity_adds_the_whole_vector():
    """μ̃ → 0: SA(q,K,V);  μ̃ → 1: SA(q,K,V) + v"""
    mimic, q, k, SA = head()
    for f, expected in ((-1e9, SA), (1e9, SA + mimic.vector[0])):
        torch.nn.init.constant_(mimic.f_bias, f)
        same(mimic.after_attention(0, q, None, SA, torch.randn(1, 1, 5).double()), expected)


def test_gradients_in_closed_form():
    """With g the gradient of the output: ∂/∂v = Σ μ̃·g,  ∂/∂f = μ̃(1−μ̃)·(g·v) and through f ∂/∂weight = Σ ∂/∂f·q: a head learns
    when to add its vector most where μ̃ is near 1/2, and not at all where it is saturated."""
    mimic, q, k, SA = head()
    lse, g = torch.randn(1, 1, 5, dtype=torch.float64), torch.randn(1, 1, 5, 4, dtype=torch.float64)
    (mimic.after_attention(0, q, k, SA, lse) * g).sum().backward()
    mu = 1 / (1 + (lse - q @ mimic.f_weight[0, 0] - mimic.f_bias[0, 0]).exp()).detach()[0, 0]
    df = mu * (1 - mu) * (g[0, 0] @ mimic.vector[0, 0].detach())
    same(mimic.vector.grad[0, 0], mu @ g[0, 0])
    same(mimic.f_bias.grad[0, 0], df.sum())
    same(mimic.f_weight.grad[0, 0], df @ q[0, 0])


# ---------------------------------------------------------------------------------------------------------------------
# What it approximates, and when it is exact
# ---------------------------------------------------------------------------------------------------------------------
def test_with_the_true_z1_and_the_true_shift_it_is_icl():
    """One query token: f and v can be exact, and then a MimIC head is in-context learning."""
    mimic, *_ = head()
    q, k_D, v_D, k, v = (torch.randn(1, 1, n, 4, dtype=torch.float64) for n in (1, 6, 6, 3, 3))
    mimic.f_weight.data.zero_()
    mimic.f_bias.data.fill_(spec.attention(q, k_D, v_D, torch.ones(1, 1, 1, 6))[1][0][0][0])
    mimic.vector.data[0, 0] = (attention(q, k_D, v_D)[0] - attention(q, k, v)[0])[0, 0, 0]
    k_all, v_all = torch.cat([k_D, k], 2), torch.cat([v_D, v], 2)
    same(mimic.after_attention(0, q, k, *attention(q, k, v)), spec.attention(q, k_all, v_all, torch.ones(1, 1, 1, 9))[0])


def test_for_one_demonstration_token_and_one_query_token_it_is_icl_whatever_the_query():
    """log Z1 = q·k_D/√D is linear, f_weight = k_D/√D;  SA_D − SA = v_D − v is constant: nothing is approximated."""
    mimic, *_ = head()
    q, k_D, v_D, k, v = (torch.randn(50, 1, 1, 4, dtype=torch.float64) for _ in range(5))
    k_D, v_D, k, v = (x[:1].expand(50, -1, -1, -1) for x in (k_D, v_D, k, v))
    mimic.f_weight.data[0, 0], mimic.vector.data[0, 0] = k_D[0, 0, 0] / 2, (v_D - v)[0, 0, 0]
    mimic.f_bias.data.zero_()
    expected = spec.attention(q, torch.cat([k_D, k], 2), torch.cat([v_D, v], 2), torch.ones(50, 1, 1, 2))[0]
    same(mimic.after_attention(0, q, k, *attention(q, k, v)), expected)


def test_of_several_demonstration_tokens_log_z1_is_convex_so_a_linear_f_is_a_tangent():
    """log Σ exp(q·k/√D) lies above its tangent at q0, whose slope is the mean key / √D; halving the step quarters the gap."""
    mimic, *_ = head()
    k_D, q0 = torch.randn(1, 1, 6, 4, dtype=torch.float64), torch.randn(1, 1, 1, 4, dtype=torch.float64)
    mean_key, log_z1 = attention(q0, k_D, k_D)
    mimic.f_weight.data[0, 0] = mean_key[0, 0, 0] / 2
    mimic.f_bias.data[0, 0] = (log_z1 - q0 @ mimic.f_weight[0, 0])[0, 0, 0]
    step = torch.randn(1, 1, 50, 4, dtype=torch.float64)
    far, near, nearer = (attention(q0 + s * step, k_D, k_D)[1] - mimic.f(0, q0 + s * step).detach() for s in (1, 0.02, 0.01))
    assert (far > 0).all() and torch.allclose(near / nearer, torch.tensor(4.0).double(), rtol=0.05)


def test_two_heads_with_a_magnitude_each_do_what_one_vector_for_all_queries_cannot():
    """The two queries of step 2, to be moved by +1 and −1: head 0 adds +1 where its f is large, head 1 adds −1 where its is."""
    mimic = MimIC(1, 2, 2).double()
    mimic.vector.data[0] = torch.tensor([[1.0, 0], [-1, 0]])
    mimic.f_weight.data[0] = torch.tensor([[3.0, -3], [-3, 3]])
    mimic.f_bias.data.zero_()
    q = 10 * torch.eye(2, dtype=torch.float64).expand(1, 2, 2, 2)
    moved = mimic.after_attention(0, q, q, torch.zeros_like(q), torch.zeros(1, 2, 2, dtype=torch.float64)).sum(1)
    same(moved[0, :, 0], [1, -1])


# ---------------------------------------------------------------------------------------------------------------------
# In the model
# ---------------------------------------------------------------------------------------------------------------------
def test_zero_vector_is_the_base_model_bit_for_bit(model):
    class Explicit(Shifts):
        def after_attention(self, layer, q, k, out, lse):
            return out

    mimic = random_mimic(model)
    torch.nn.init.zeros_(mimic.vector)
    ids, features = with_pictures(model, prompt()[0])
    given = ids, torch.ones_like(ids), features
    assert torch.equal(model(*given, shifts=mimic), model(*given, shifts=Explicit()))
    torch.testing.assert_close(model(*given, shifts=mimic), model(*given), rtol=0, atol=1e-12)


@pytest.mark.parametrize("published, kind", [("idefics2-8b-base", Config), ("idefics-9b", Idefics1Config)])
def test_mimic_has_263168_parameters_on_both_models(published, kind, shared, tmp_path):
    spec = json.loads((shared / f"spec/expected_{published}.json").read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(spec))
    c = kind.from_file(tmp_path / "config.json").text
    assert sum(p.numel() for p in MimIC(c.num_hidden_layers, c.num_attention_heads, c.head_dim).parameters()) == 263_168


def test_gradients_reach_only_vector_and_f(model):
    mimic = random_mimic(model)
    model(*prompt(), shifts=mimic).logsumexp(-1).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert {name: bool(p.grad.abs().gt(0).all()) for name, p in mimic.named_parameters()} == {
        "vector": True, "f_weight": True, "f_bias": True}


def test_gradients_are_right_through_all_layers(model):
    mimic, (ids, mask) = random_mimic(model), prompt(3)

    def loss(*values):
        for name, value in zip(("vector", "f_weight", "f_bias"), values, strict=True):
            mimic._parameters[name] = value
        return model(ids, mask, shifts=mimic).logsumexp(-1).mean()

    values = tuple(p.detach().clone().requires_grad_() for p in (mimic.vector, mimic.f_weight, mimic.f_bias))
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def record_mu(mimic, model, run):
    """μ̃ of every layer at the last token of every call of the model in `run`."""
    seen = []

    class Watch(Shifts):
        def after_attention(self, layer, q, k, out, lse):
            seen.append(mimic.mu(layer, q, k, lse)[:, :, -1])
            return mimic.after_attention(layer, q, k, out, lse)

    run(Watch())
    return torch.stack(seen).unflatten(0, (-1, model.config.text.num_hidden_layers))


def test_prefill_and_one_by_one_decoding_use_the_same_mu(model):
    mimic, (ids, features) = random_mimic(model), with_pictures(model, prompt()[0], at=(2, 4))
    mask = torch.ones_like(ids)
    made = model.generate(ids, mask, features, 4, shifts=mimic, banned_ids=[2, 99])
    whole = torch.cat([ids, made], 1)
    decoded = record_mu(mimic, model, lambda s: model.generate(ids, mask, features, 4, shifts=s, banned_ids=[2, 99]))
    for i, one in enumerate(decoded):
        n = ids.shape[1] + i
        at_once = record_mu(mimic, model, lambda s, n=n: model(whole[:, :n], torch.ones(2, n), features, shifts=s))
        torch.testing.assert_close(one, at_once[0], rtol=0, atol=1e-12)


def test_the_official_z2_gives_prefill_another_mu_than_decoding(model):
    """Why z2="unmasked" is not the default: in training a token's Z2 contains the answer that stands behind it."""
    ids, mask = prompt()
    for z2, equal in (("masked", True), ("unmasked", False)):
        mimic, seen = random_mimic(model, z2=z2), []

        class Watch(Shifts):
            def after_attention(self, layer, q, k, out, lse, mimic=mimic, seen=seen):
                seen.append(mimic.mu(layer, q, k, lse)[:, :, 3])
                return out

        model(ids, mask, shifts=Watch())
        model(ids[:, :4], mask[:, :4], shifts=Watch())
        assert torch.allclose(seen[0], seen[3], rtol=0, atol=1e-12) == equal


def test_padding_a_batch_changes_no_logits_no_mu_and_no_gradient(model):
    ids, features = with_pictures(model, prompt()[0], at=(2, 4))
    mask, T, results = torch.ones_like(ids), ids.shape[1], []
    padded, padded_mask = (torch.nn.functional.pad(x, (3, 0)) for x in (ids, mask))
    for i, m in ((ids, mask), (padded, padded_mask)):
        mimic = random_mimic(model)
        logits = model(i, m, features, shifts=mimic)[:, -T:]
        logits.logsumexp(-1).sum().backward()
        results.append((logits, *(p.grad for p in mimic.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_one_mu_a_layer_is_shared_by_its_heads_and_mu_one_is_the_vectors_alone(model):
    q, lse = torch.randn(2, 4, 5, 16).double(), torch.randn(2, 4, 5).double()
    shared_mu = random_mimic(model, mu_of="layer").mu(0, q, None, lse)
    assert (shared_mu == shared_mu[:, :1]).all() and shared_mu.std(2).min() > 0
    mimic = random_mimic(model, mu_of="one")
    same(mimic.after_attention(0, q, None, q, lse), q + mimic.vector[0][:, None])
    assert sum(p.numel() for p in mimic.parameters() if p.requires_grad) == mimic.vector.numel()


# ---------------------------------------------------------------------------------------------------------------------
# Files, and the recorder
# ---------------------------------------------------------------------------------------------------------------------
def test_a_saved_adapter_comes_back_with_its_options(model, tmp_path):
    mimic = random_mimic(model, z2="unmasked").float()
    mimic.save(tmp_path / "a.safetensors", method="mimic", shots=8)
    loaded = MimIC.load(tmp_path / "a.safetensors")
    assert loaded.z2 == "unmasked"
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), mimic.parameters(), strict=True))


@pytest.mark.parametrize("content", [None, b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_file_that_is_no_adapter_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="a.safetensors: expected a MimIC adapter") as error:
        MimIC.load(path)
    assert "\n" not in str(error.value)


def test_recorder_keeps_states_after_the_shifts_of_the_adapter_it_wraps(model):
    mimic, (ids, mask) = random_mimic(model), prompt()
    alone, wrapped = model(ids, mask, shifts=mimic), Recorder(mimic, last=3)
    assert torch.equal(model(ids, mask, shifts=wrapped), alone)
    assert len(wrapped.ffn) == len(wrapped.layer) == 3 and wrapped.layer[-1].shape == (2, 3, 64)
    torch.testing.assert_close(model.lm_head(model.text_model.norm(wrapped.layer[-1])), alone[:, -3:])
    model(ids, mask, shifts=wrapped)
    assert len(wrapped.layer) == 3                                          # a new pass starts anew
