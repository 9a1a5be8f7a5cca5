"""The methods MimIC is compared with: what each computes, judged by loops, by peft or by the longer way round."""

import copy
import json
import math
from pathlib import Path

import peft
import pytest
import spec
import torch
from conftest import with_pictures
from safetensors import safe_open
from safetensors.torch import save_file

import baselines
import models
from baselines.lora import LoRA
from baselines.prompt_tuning import PromptTuning
from baselines.stave import STAVE, Parted, cue_length
from data import ANSWER, PADDING, QUERY, TEMPLATES, Processor, Rows, Sample, collate, draw, encode_images, load, prompts
from data import row as row_of
from model import KVCache, attention, causal_mask
from support.files import InputError

CLOSE = {"rtol": 0, "atol": 1e-11}
ADAPTERS = baselines.adapters()
OPTIONS = {"lora": {"rank": 4}, "stave": {"n_cue": 2}, "prompt-tuning": {"n": 3}}
REPOSITORY = Path(__file__).resolve().parents[1]


def trained(method, model, **options):
    """An adapter with random parameters, as if trained."""
    torch.manual_seed(1)
    adapter = ADAPTERS[method].for_model(model, **(OPTIONS.get(method, {}) | options)).double().eval()
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return adapter


def count(adapter):
    return sum(p.numel() for p in adapter.parameters())


def prompt(n=9):
    """Two rows of n and n − 2 tokens, the second left-padded."""
    ids = torch.randint(3, 99, (2, n), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[1, :2], ids[1, 2] = 1, 0, 1
    return ids, ids != 0


def run(model, adapter, ids, mask, features=None):
    return adapter.student(model)(ids, mask, features, adapter)


# ---- LoRA
@pytest.mark.parametrize("scope, dropout", [("text", 0.0), ("text", 0.3), ("all", 0.0)])
def test_lora_has_the_logits_and_gradients_of_peft(model, scope, dropout):
    lora = trained("lora", model, scope=scope, alpha=6, dropout=dropout).train()
    names = [key.replace("/", ".") for key in lora.A]
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=names)
    judge = peft.inject_adapter_in_model(config, copy.deepcopy(model)).double().train()
    pairs = [(ours[name.replace(".", "/")], getattr(judge.get_submodule(name), f"lora_{which}").default.weight)
             for name in names for which, ours in (("A", lora.A), ("B", lora.B))]
    for ours, theirs in pairs:
        theirs.data.copy_(ours.data)
    size = (28, 28) if model.text_model.crossed else (28, 42)
    pixels, mask = torch.randn(2, 3, *size, dtype=torch.float64), torch.ones(2, *size, dtype=torch.bool)
    ids, logits = with_pictures(model, torch.randint(3, 99, (2, 8)), at=(3,))[0], []
    for who in lora.student(model), judge:
        torch.manual_seed(5)                                              # the same dropout
        logits.append(who(ids, torch.ones_like(ids), who.encode_images(pixels, mask)))
        logits[-1].square().mean().backward()
    torch.testing.assert_close(*logits, **CLOSE)
    cross, resampler = (3 * 4, 3) if model.text_model.crossed else (0, 4)
    assert len(names) == {"text": 12, "all": 12 + cross + resampler + 2 * 3}[scope]        # and q k v of the vision tower
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


def test_lora_leaves_the_base_model_alone_and_copies_none_of_its_tensors(model):
    ids, mask = prompt()
    before, lora = model(ids, mask), trained("lora", model)
    student = lora.student(model)
    assert not torch.allclose(student(ids, mask), before) and torch.equal(model(ids, mask), before)
    assert set(student.parameters()) - set(lora.parameters()) == set(model.parameters())
    assert not lora.changes_vision and LoRA.for_model(model, scope="all").changes_vision


# ---- HiFICL
def test_hificl_is_a_softmax_over_virtual_and_real_keys(model):
    hificl, layer = trained("hificl", model), 1
    torch.manual_seed(0)
    Hkv = model.config.text.num_key_value_heads
    q, k, v = (torch.randn(1, H, 5, 16, dtype=torch.float64) for H in (4, Hkv, Hkv))
    mask = causal_mask(torch.ones(1, 5), 5, 0)
    got = hificl.after_attention(layer, q, k, *attention(q, k, v, mask))
    K, V = hificl.K_A @ hificl.K_B, hificl.V_A @ hificl.V_B                                  # (L,H,n,D)
    for h in range(4):
        keys, values = (torch.cat([virtual[layer, h], real[0, h * Hkv // 4]]).tolist() for virtual, real in ((K, k), (V, v)))
        for t in range(5):
            expected, _ = spec.attend(q[0, h, t].tolist(), keys, values, [True] * 8 + mask[0, 0, t].tolist())
            torch.testing.assert_close(got[0, h, t].tolist(), expected, rtol=0, atol=1e-12)


# ---- prompt tuning
def test_prompt_tuning_puts_its_vectors_behind_the_first_token(model):
    """Against the decoder fed with the embeddings themselves, one row at a time and without padding."""
    tuning, (ids, mask) = trained("prompt-tuning", model), prompt()
    logits = model(ids, mask, shifts=tuning)
    for row, (tokens, kept) in enumerate(zip(ids, mask, strict=True)):
        words = model.text_model.embed_tokens(tokens[kept])
        x = torch.cat([words[:1], tuning.vector, words[4:]])[None]
        states = model.text_model(x, torch.ones(1, x.shape[1]), torch.arange(x.shape[1])[None], tuning, None)
        torch.testing.assert_close(logits[row, kept], model.lm_head(states)[0], **CLOSE)


def test_prompt_tuning_starts_from_words_and_asks_for_placeholders(model):
    words = model.text_model.embed_tokens.weight.float()
    tuning = PromptTuning.for_model(model)
    assert all((words == p).all(1).any() for p in tuning.vector)
    processor = Processor.from_pretrained(REPOSITORY / "checkpoints/tiny")
    query, template = Sample(1, None, "dax?", ["rot"], "rot"), TEMPLATES["toy"]
    plain, longer = (prompts([query], [[]], processor, t).input_ids[0] for t in (template, tuning.template(template)))
    assert longer.tolist() == [1, *[0] * 20, *plain.tolist()[1:]]


# ---- STAVE
def test_stave_adds_each_row_divided_by_the_root_of_what_it_covers(model):
    stave, (ids, _) = trained("stave", model), prompt()
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    got = stave.after_embedding(ids, x)
    for b, row in enumerate(ids.tolist()):
        start = 2 if b else 0                                                # columns: padding, <s>, context, two of the cue
        n_context = len(row) - start - 1 - 2
        for t in range(len(row)):
            w = stave.W[0] / math.sqrt(2) if t >= 7 else stave.W[1] / math.sqrt(n_context) if t > start else 0 * stave.W[0]
            torch.testing.assert_close(got[b, t], x[b, t] + w, **CLOSE)
    assert torch.equal(stave.after_embedding(ids[:, :1], x[:, :1]), x[:, :1])          # a generated token


def test_stave_covers_instruction_and_query_but_no_demonstration_and_no_answer(either_folder):
    processor = models.of(either_folder)[1].from_pretrained(either_folder)
    template = processor.templates["vqa"]
    a, b, c = (Sample(i, None, q, [s], s) for i, (q, s) in enumerate(
        [("what is this?", "cat"), ("is it a long one or not?", "yes it is"), ("where?", "left")]))
    batch = collate([a, b], [[b, c], [c, a]], processor, template)
    stave = STAVE(2, cue_length(processor, template), 0)
    stave.W.data = torch.eye(2)                                          # a number for each
    for rows in batch.student, batch.teacher:
        added = Parted(stave, rows).after_embedding(rows.input_ids, torch.zeros(*rows.part.shape, 2)) > 0
        for i, query in enumerate((a, b)):
            assert processor.decode(rows.input_ids[i][added[i, :, 0]].tolist()) == "Answer:"
            covered = rows.input_ids[i][added[i].any(-1)].tolist()
            assert covered == row_of(processor, template, [], query, with_answer=False)[0][1:]     # no demonstrations, no <s>


def test_a_zero_start_is_the_base_model_bit_for_bit(model):
    ids, mask = prompt()
    for method in "lora", "stave":
        fresh = ADAPTERS[method].for_model(model).double().eval()
        assert torch.equal(run(model, fresh, ids, mask), model(ids, mask))


# ---- losses of their own
@pytest.fixture(scope="module")
def toy():
    """The toy model in fp64, a batch of three queries behind two demonstrations each, its picture features."""
    toy, processor = models.load_model(REPOSITORY / "checkpoints/tiny", "cpu", "float64")
    pool = load("toy", None, "train")[:20]
    batch = collate(pool[:3], draw(pool, pool[:3], 2, 0), processor, TEMPLATES["toy"])
    return toy, batch, encode_images(toy, processor, pool, {})


def of_answers(model, rows, features, shifts):
    """The log-probabilities before each token of the answers, and these tokens, a row at a time."""
    log_p = model.lm_head(model.hidden_states(**rows.inputs(model, features), shifts=shifts)).float().log_softmax(-1)
    for found, ids, part in zip(log_p, rows.input_ids, rows.part, strict=True):
        for t in (part == part.max()).nonzero().flatten().tolist():
            yield found[t - 1], ids[t]


def test_staves_loss_is_the_mean_of_two_behind_the_query_and_behind_demonstrations_and_query(toy):
    model, batch, features = toy
    stave, total = trained("stave", model), 0
    for rows in batch.student, batch.teacher:
        found = list(of_answers(model, rows, features, Parted(stave, rows)))
        total -= sum(log_p[token] for log_p, token in found) / len(found)
    align, ce = STAVE.losses(model, stave, batch, features)
    torch.testing.assert_close(ce, total / 2)
    assert align == 0 and STAVE.losses(model, stave, batch, features, ce_on="sequence")[1] != ce


# ---- all of them
@pytest.mark.parametrize("published, text, everywhere", [("idefics2-8b-base", 13_631_488, 17_588_224),
                                                         ("idefics-9b", 16_777_216, 24_993_792)])
def test_parameters_on_the_real_models_are_the_published_numbers(published, text, everywhere, shared, tmp_path):
    config = json.loads((shared / f"spec/expected_{published}.json").read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        kind = models.of(tmp_path)[0]
        real = kind(kind.config_class.from_file(tmp_path / "config.json"))
        for method, options, n in (("mimic", {}, 263_168), ("live", {}, 131_104), ("lora", {}, text),
                                   ("lora", {"scope": "all"}, everywhere), ("stave", {}, 8_192), ("prompt-tuning", {}, 81_920),
                                   ("lora", {"targets": ["o_proj"], "rank": 1}, 262_144), ("hificl", {}, 2_228_224)):
            assert count(ADAPTERS[method].for_model(real, **options)) == n, (method, options)


@pytest.mark.parametrize("method", ADAPTERS)
def test_gradients_reach_every_parameter_of_the_adapter_and_nothing_else(model, method):
    adapter = trained(method, model)
    run(model, adapter, *prompt()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    groups = adapter.groups(0.1)
    assert sum(p.numel() for g in groups for p in g["params"]) == count(adapter)
    assert [g["lr"] for g in groups] == ([0.1, 0.2] if method == "live" else [0.1])


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_saved_adapter_gives_the_same_logits_and_no_other_method_or_model_loads_it(model, toy, method, tmp_path):
    path, adapter = tmp_path / "adapter.safetensors", trained(method, model).float()
    adapter.save(path, method=method)
    loaded = ADAPTERS[method].load(path)
    assert torch.equal(run(model, loaded, *prompt()), run(model, adapter, *prompt()))
    baselines.load_adapter(path, method, model)
    for other in ADAPTERS.keys() - {method}:
        with pytest.raises(InputError, match="adapter.safetensors: expected a .* adapter"):
            ADAPTERS[other].load(path)
    with pytest.raises(InputError, match="expected an adapter of this model's sizes, found: .*(mismatch|Missing)"):
        baselines.load_adapter(path, method, toy[0])


@pytest.mark.parametrize("method", ADAPTERS)
def test_decoding_with_a_cache_equals_the_full_forward(model, method):
    adapter, (ids, features) = trained(method, model), with_pictures(model, prompt()[0], at=(6,))
    student, mask, T = adapter.student(model), ids != 0, ids.shape[1]
    n, cache = T - 3, KVCache(3, T)
    with torch.no_grad():
        states = [student.hidden_states(ids[:, :n], mask[:, :n], features, adapter, cache=cache)]
        states += [student.hidden_states(ids[:, t:t + 1], mask[:, :t + 1], None, adapter, cache=cache) for t in range(n, T)]
        rows = Rows(ids, torch.where(mask.cumsum(1) > 1, QUERY, PADDING), [])           # <s> is no part of it
        rows.part[:, n:] = ANSWER                                          # STAVE is told what was generated
        full = student.hidden_states(ids, mask, features, Parted(adapter, rows) if method == "stave" else adapter)
    torch.testing.assert_close(torch.cat(states, 1)[mask], full[mask], **CLOSE)


@pytest.mark.parametrize("name, value", [("rank", "8"), ("alpha", "two")])
def test_a_lora_file_whose_numbers_do_not_fit_is_said_in_one_line(model, name, value, tmp_path):
    LoRA.for_model(model).save(tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        save_file(tensors, tmp_path / "bad.safetensors", file.metadata() | {name: value})
    with pytest.raises(InputError, match=f"bad.safetensors: expected a LoRA adapter, found: .*{value}"):
        LoRA.load(tmp_path / "bad.safetensors")
