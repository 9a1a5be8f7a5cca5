"""Step 3. Section 3.2: a MimIC head is SA(q,K,V) + μ̃·v with μ̃ = e^f(q) / (e^f(q) + Z2)."""

import json
import math

import pytest
import torch
from conftest import with_pictures

from idefics1 import Idefics1Config
from mimic import MimIC, Recorder, icl_attention, mixing_weight
from model import Config, InputError, Shifts, attention, causal_mask

EXACT = {"rtol": 0, "atol": 1e-12}


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


def test_a_head_computes_sigmoid_of_f_minus_log_z2_times_the_vector():
    torch.manual_seed(0)
    mimic = MimIC(2, 3, 4).double()
    q, k, v = (torch.randn(1, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    out, lse = attention(q, k, v, causal_mask(torch.ones(1, 5), 5, 0))
    got = mimic.after_attention(1, q, k, out, lse)
    for h in range(3):
        for t in range(5):
            f = mimic.f_bias[1, h].item() + sum(
                w * x for w, x in zip(mimic.f_weight[1, h].tolist(), q[0, h, t].tolist(), strict=True))
            mu = math.exp(f) / (math.exp(f) + math.exp(lse[0, h, t].item()))
            torch.testing.assert_close(got[0, h, t], out[0, h, t] + mu * mimic.vector[1, h], **EXACT)


def test_with_the_true_z1_and_the_true_shift_it_is_icl():
    """One query token: f and v can be exact, and then a MimIC head is in-context learning."""
    torch.manual_seed(0)
    q, k_D, v_D, k, v = (torch.randn(1, 1, n, 4, dtype=torch.float64) for n in (1, 6, 6, 3, 3))
    _, _, shift = icl_attention(q, k_D, v_D, k, v)
    mimic = MimIC(1, 1, 4).double()
    with torch.no_grad():
        mimic.f_weight.zero_()
        mimic.f_bias[0, 0] = attention(q, k_D, v_D)[1].item()
        mimic.vector[0, 0] = shift[0, 0, 0]
    got = mimic.after_attention(0, q, k, *attention(q, k, v))
    torch.testing.assert_close(got, attention(q, torch.cat([k_D, k], 2), torch.cat([v_D, v], 2))[0], **EXACT)


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


def test_f_to_minus_infinity_is_zero_shot_and_to_plus_infinity_adds_the_whole_vector():
    mimic = MimIC(1, 1, 4).double()
    q, out, lse = torch.randn(1, 1, 2, 4).double(), torch.randn(1, 1, 2, 4).double(), torch.randn(1, 1, 2).double()
    for f, expected in ((-1e9, out), (1e9, out + mimic.vector[0])):
        torch.nn.init.constant_(mimic.f_bias, f)
        torch.testing.assert_close(mimic.after_attention(0, q, None, out, lse), expected, **EXACT)


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

    def loss(vector, f_weight, f_bias):
        parameters = {"vector": vector, "f_weight": f_weight, "f_bias": f_bias}
        return _Functional(mimic, parameters).run(model, ids, mask)

    values = tuple(p.detach().clone().requires_grad_() for p in (mimic.vector, mimic.f_weight, mimic.f_bias))
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


class _Functional(Shifts):
    """The adapter with other parameter values."""

    def __init__(self, mimic, parameters):
        self.mimic, self.parameters = mimic, parameters

    def after_attention(self, layer, q, k, out, lse):
        f = torch.einsum("bhtd,hd->bht", q, self.parameters["f_weight"][layer]) + self.parameters["f_bias"][layer][:, None]
        return out + mixing_weight(f, lse).unsqueeze(-1) * self.parameters["vector"][layer][:, None]

    def run(self, model, ids, mask):
        return model(ids, mask, shifts=self).logsumexp(-1).mean()


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
    for z2, same in (("masked", True), ("unmasked", False)):
        mimic, seen = random_mimic(model, z2=z2), []

        class Watch(Shifts):
            def after_attention(self, layer, q, k, out, lse, mimic=mimic, seen=seen):
                seen.append(mimic.mu(layer, q, k, lse)[:, :, 3])
                return out

        model(ids, mask, shifts=Watch())
        model(ids[:, :4], mask[:, :4], shifts=Watch())
        assert torch.allclose(seen[0], seen[3], rtol=0, atol=1e-12) == same


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
    torch.testing.assert_close(mimic.after_attention(0, q, None, q, lse), q + mimic.vector[0][:, None], **EXACT)
    assert sum(p.numel() for p in mimic.parameters() if p.requires_grad) == mimic.vector.numel()


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
