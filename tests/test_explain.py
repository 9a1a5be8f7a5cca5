"""explain.py: what it measures is what loops say, and its pictures are drawn from a run."""

import json
import math
from pathlib import Path

import pytest
import spec
import torch
from conftest import with_pictures
from grading import same

import explain
import train
from baselines.lora import LoRA
from data import OFFICIAL_TEMPLATES, TEMPLATES, Processor, Rows, Sample, collate, pick_icds, train_dev
from features import encode_images
from fit import is_demonstration
from mimic import MimIC, Recorder
from model import Idefics2, InputError

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def toy():
    """The toy checkpoint in float64, MimIC heads, a batch of two queries with two demonstrations each, image features."""
    model, processor = (c.from_pretrained(REPOSITORY / "checkpoints/tiny") for c in (Idefics2, Processor))
    pool, _ = train_dev("toy", "data", 20, 4, 0)
    batch = collate(pool[:2], [pick_icds(pool, q, 2, f"{q.id}") for q in pool[:2]], processor, TEMPLATES["toy"])
    torch.manual_seed(0)
    mimic = MimIC.for_model(model).double()
    for p in mimic.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.double(), mimic, batch, encode_images(model, processor, pool, {})


def test_values_kept_are_those_that_the_layer_has_added(model):
    """W_o of the attention over the kept q, k and v is what a layer's states gain before the FFN; on either model."""
    ids, images = with_pictures(model, torch.randint(3, 98, (2, 9), generator=torch.Generator().manual_seed(0)))
    rows, recorder = Rows(ids, torch.ones_like(ids), [Sample(i, None, None, []) for i in range(2)]), Recorder()
    watch = explain.inside(model, rows, dict(enumerate(images)))
    model(ids, rows.attention_mask, images, recorder)
    mask, pictures = explain.causal_mask(rows.attention_mask, ids.shape[1], 0), model.pictures(ids, images)
    for layer in 1, 2:
        x = recorder.layer[layer - 1]
        x = model.text_model.enter(layer, x, pictures) if model.text_model.crossed else x
        out, _ = explain.attention(*watch.seen[layer][:3], mask)
        added = model.text_model.layers[layer].self_attn.o_proj(out.transpose(1, 2).flatten(2))
        same(added, recorder.layer[layer] - recorder.ffn[layer] - x, atol=1e-9)
        same(watch.states[layer], recorder.layer[layer])


def test_the_true_shift_and_z1_are_what_loops_say(toy):
    model, mimic, batch, features = toy
    found = explain.compare(model, mimic, batch, features)[1]
    q, k, v, _ = (x.tolist() for x in explain.inside(model, batch.teacher, features).seen[1])
    present, demonstrations, T = batch.teacher.attention_mask.tolist(), is_demonstration(batch).tolist(), len(k[0][0])
    at, group = 0, len(q[0]) // len(k[0])
    for b in range(2):
        for t in range(T - batch.align.shape[1], T):
            if batch.align[b, t - T]:
                shown = [demonstrations[b][s] for s in range(T)]
                own = [present[b][s] and not shown[s] and s <= t for s in range(T)]
                (SA_D, log_z1), (SA, log_z2) = (spec.attend(q[b][5][t], k[b][5 // group], v[b][5 // group], which)
                                                for which in (shown, own))
                same(found["true_log_z1"][at, 5], log_z1, atol=1e-5)                  # kept in fp32
                mu = 1 / (1 + math.exp(log_z2 - log_z1))
                same(found["true_mu"][at, 5], mu, atol=1e-5)
                same(found["true_shift"][at, 5], mu * (torch.tensor(SA_D) - torch.tensor(SA)), atol=1e-5)
                at += 1
    assert at == len(found["f"]) == batch.align.sum()


def test_an_approximation_that_holds_is_found_to_hold():
    """Planted: log Z1 linear in q, one shift a head."""
    torch.manual_seed(0)
    q, weight, v = torch.randn(3, 200, 4), torch.randn(3, 4), torch.randn(3, 4)
    f = torch.einsum("hnd,hd->nh", q, weight)
    mu, added = f.sigmoid(), torch.randn(200, 5)
    layer = {"q": q, "f": f, "true_log_z1": f, "mu": mu, "true_mu": mu, "true_shift": mu.unsqueeze(-1) * v, "added": added,
             "true_added": added}
    found = explain.approximation([layer], v[None])
    constant = [found.pop(name) for name in ("share, constant shift", "share of a layer, constant")]
    assert all(values == pytest.approx(1, abs=1e-4) for values in found.values()) and max(c.max() for c in constant) < 0.95
    assert explain.approximation([layer | {"f": -f}], v[None])["correlation, trained f"] == pytest.approx(-1, abs=1e-5)


def test_what_is_common_to_all_draws_is_told_from_what_is_not():
    """Planted: a common part of variance 4 and one of variance 1 that is new in every draw; 4/5, however few draws there are."""
    g = torch.Generator().manual_seed(0)
    same_for_all = 2 * torch.randn(2000, 8, generator=g)
    for n in 2, 5:
        draws = [same_for_all + torch.randn(2000, 8, generator=g) for _ in range(n)]
        layers = explain.joined([[[{"true_added": x, "true_power": x.pow(2).sum(-1)}] for x in draws]])
        assert explain.common(layers[0], n).item() == pytest.approx(0.8, abs=0.01)


def test_distances_are_the_mean_norms_of_the_states_differences(toy):
    model, mimic, batch, features = toy
    found = explain.distances(model, {"zero-shot": None, "MimIC": mimic}, [batch], features)
    T_q, total = batch.align.shape[1], 0.0
    (teacher, student), layer = (explain.inside(model, rows, features).states for rows in (batch.teacher, batch.student)), 4
    for b, t in batch.align.nonzero().tolist():
        difference = (student[layer][b, t - T_q] - teacher[layer][b, t - T_q]).tolist()
        total += math.sqrt(sum(x * x for x in difference))
    assert found["zero-shot"][layer] == pytest.approx(total / batch.align.sum().item(), rel=1e-5)
    assert found["MimIC"][layer] != pytest.approx(found["zero-shot"][layer], rel=1e-3)


def test_the_distance_of_a_lora_is_that_of_the_model_with_its_weights(toy):
    model, _, batch, features = toy
    lora = LoRA.for_model(model).double().eval()
    for B in lora.B.values():
        torch.nn.init.normal_(B, std=0.3)
    found = explain.distances(model, {"zero-shot": None, "LoRA": lora}, [batch], features)
    student = explain.inside(lora.merge(model), batch.student, features).states[-1][:, -batch.align.shape[1]:]
    teacher = explain.inside(model, batch.teacher, features).states[-1][:, -batch.align.shape[1]:]
    assert found["LoRA"][-1] == pytest.approx((student - teacher)[batch.align].norm(dim=-1).mean().item(), rel=1e-5)
    assert found["LoRA"][-1] != pytest.approx(found["zero-shot"][-1], rel=1e-3)


def test_demonstrations_of_an_official_prompt_end_at_its_masked_separator(toy):
    pool, processor = toy[2].teacher.samples, Processor.from_pretrained(REPOSITORY / "checkpoints/tiny")
    batch = collate([pool[0], pool[3]], [pool[1:3], pool[4:5]], processor, OFFICIAL_TEMPLATES["toy"])
    for ids, found in zip(batch.teacher.input_ids.tolist(), is_demonstration(batch).tolist(), strict=True):
        begin = ids.index(processor.bos_id) + 1
        end = ids.index(processor.pad_id, begin)               # the separator before the query; it is masked as a key
        assert found == [begin <= i <= end for i in range(len(ids))] and end < ids.index(processor.pad_id, end + 1)


def test_an_official_prompt_is_looked_at_with_its_own_positions(toy):
    model, _, batch, features = toy
    processor, samples = Processor.from_pretrained(REPOSITORY / "checkpoints/tiny"), batch.teacher.samples
    rows = collate(samples[:2], [samples[2:3], samples[3:5]], processor, OFFICIAL_TEMPLATES["toy"]).teacher
    images = torch.stack([features[s.image_id] for s in rows.samples])
    expected = [model.hidden_states(rows.input_ids, rows.attention_mask, images, position_ids=positions)
                for positions in (rows.position_ids, None)]
    found = model.text_model.norm(explain.inside(model, rows, features).states[-1])[rows.attention_mask]
    same(found, expected[0][rows.attention_mask], atol=1e-9)
    assert not torch.allclose(found, expected[1][rows.attention_mask], atol=1e-3)


def test_a_run_of_another_machine_is_opened_on_this_one(tmp_path):
    train.main(["--samples", "12", "--epochs", "1", "--limit", "2", "--shots", "1", "--compare", "--out", str(tmp_path)])
    about = json.loads((tmp_path / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps({**about, "device": "cuda:7"}))
    explain.main(["--run", str(tmp_path), "--only", "distance", "cost", "--queries", "2", "--out", str(tmp_path / "figures")])
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["distance.png"]       # one row of results makes no curve


@pytest.mark.parametrize("method", ["stave", "prompt-tuning"])
def test_a_run_that_reads_another_prompt_is_refused_beside(tmp_path, method):
    for name in "mimic", method:
        train.main(["--method", name, "--samples", "12", "--epochs", "1", "--limit", "2", "--out", str(tmp_path / name)])
    with pytest.raises(InputError, match=f"--beside .*: expected, for distance, .*, found {method}"):
        explain.main(["--run", str(tmp_path / "mimic"), "--beside", str(tmp_path / method), "--only", "distance",
                      "--out", str(tmp_path / "figures")])


@pytest.mark.parametrize("content", ["[]", "{}", '{"method": "icl"}', '{"method": []}'])
def test_arguments_of_something_else_are_refused(tmp_path, content):
    (tmp_path / "args.json").write_text(content)
    with pytest.raises(InputError, match="args.json: expected the arguments of a run of train.py"):
        explain.main(["--run", str(tmp_path)])


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a run of train.py, found no args.json"):
        explain.main(["--run", str(tmp_path)])
