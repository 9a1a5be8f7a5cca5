"""experiments.explain: what it measures is what loops say, and its pictures are drawn from a run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import spec
import torch
from conftest import with_pictures
from grading import same

import train
from baselines.lora import LoRA
from data import ANSWER, OFFICIAL_TEMPLATES, START, TEMPLATES, Processor, Rows, Sample, collate, draw, encode_images, train_dev
from experiments import explain
from mimic import MimIC, Recorder
from model import Idefics2
from support.files import InputError

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def toy():
    """The toy checkpoint in float64, MimIC heads, a batch of two queries with two demonstrations each, image features."""
    model, processor = (c.from_pretrained(REPOSITORY / "checkpoints/tiny") for c in (Idefics2, Processor))
    pool, _ = train_dev("toy", "data", 20, 4, 0)
    batch = collate(pool[:2], draw(pool, pool[:2], 2, 0), processor, TEMPLATES["toy"])
    torch.manual_seed(0)
    mimic = MimIC.for_model(model).double()
    for p in mimic.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.double(), mimic, batch, encode_images(model, processor, pool, {})


def test_values_kept_are_those_that_the_layer_has_added(model):
    """W_o of the attention over the kept q, k and v is what a layer's states gain before the FFN; on either model."""
    ids, images = with_pictures(model, torch.randint(3, 98, (2, 9), generator=torch.Generator().manual_seed(0)))
    rows, recorder = Rows(ids, torch.full_like(ids, START), [Sample(i, None, None, []) for i in range(2)]), Recorder()
    watch, values = explain.inside(model, rows, dict(enumerate(images)))
    model(ids, rows.attention_mask, images, recorder)
    mask, pictures = explain.causal_mask(rows.attention_mask, ids.shape[1], 0), model.pictures(ids, images)
    for layer in 1, 2:
        x = recorder.layer[layer - 1]
        x = model.text_model.enter(layer, x, pictures) if model.text_model.crossed else x
        out, _ = explain.attention(*watch.seen[layer][:2], values[layer], mask)
        added = model.text_model.layers[layer].self_attn.o_proj(out.transpose(1, 2).flatten(2))
        same(added, recorder.layer[layer] - recorder.ffn[layer] - x, atol=1e-9)
        same(watch.layer[layer], recorder.layer[layer])


def test_the_true_shift_and_z1_are_what_loops_say(toy):
    model, mimic, batch, features = toy
    found = explain.truth(model, batch, features)[1]
    watch, values = explain.inside(model, batch.teacher, features)
    q, k, v = (x.tolist() for x in (*watch.seen[1][:2], values[1]))
    present, demonstrations, T = batch.teacher.attention_mask.tolist(), explain.demonstrations(batch).tolist(), len(k[0][0])
    at, group = 0, len(q[0]) // len(k[0])
    for b in range(2):
        for t in range(T - batch.T_q, T):
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
    assert at == len(found["true_mu"]) == len(explain.learnt(model, mimic, batch, features)[1]["f"]) == batch.align.sum()


def test_what_a_layer_is_said_to_add_is_what_mimic_adds(toy):
    model, mimic, batch, features = toy
    found, recorders = explain.learnt(model, mimic, batch, features)[0], (Recorder(), Recorder(mimic))
    without, with_it = (r.layer[0] - r.ffn[0] for r in recorders
                        if model.hidden_states(**batch.student.inputs(model, features), shifts=r) is not None)
    same(found["added"], (with_it - without)[:, -batch.T_q:][batch.align].detach(), atol=1e-4)


def test_an_approximation_that_holds_is_found_to_hold():
    """Planted: log Z1 linear in q, one shift a head."""
    torch.manual_seed(0)
    q, weight, v = torch.randn(200, 3, 4), torch.randn(3, 4), torch.randn(3, 4)
    f = torch.einsum("nhd,hd->nh", q, weight)
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
        found = [[{"true_added": x, "true_power": x.pow(2).sum(-1)}] for x in draws]
        layer, = explain.together(lambda tensors: torch.stack(tensors).mean(0), found)
        assert explain.common(layer, n).item() == pytest.approx(0.8, abs=0.01)


def states(model, rows, features):
    return explain.inside(model, rows, features)[0].layer


def test_distances_are_the_mean_norms_of_the_states_differences(toy):
    model, mimic, batch, features = toy
    found, total, layer = explain.distances(model, {"zero-shot": None, "MimIC": mimic}, [batch], features), 0.0, 4
    teacher, student = (states(model, rows, features)[layer] for rows in (batch.teacher, batch.student))
    for b, t in batch.align.nonzero().tolist():
        difference = (student[b, t - batch.T_q] - teacher[b, t - batch.T_q]).tolist()
        total += math.sqrt(sum(x * x for x in difference))
    assert found["zero-shot"][layer] == pytest.approx(total / batch.align.sum().item(), rel=1e-5)
    assert found["MimIC"][layer] != pytest.approx(found["zero-shot"][layer], rel=1e-3)


def test_the_distance_of_a_lora_is_that_of_the_model_with_its_weights(toy):
    model, _, batch, features = toy
    lora = LoRA.for_model(model).double().eval()
    for B in lora.B.values():
        torch.nn.init.normal_(B, std=0.3)
    found = explain.distances(model, {"zero-shot": None, "LoRA": lora}, [batch], features)
    student = states(lora.student(model), batch.student, features)[-1][:, -batch.T_q:]
    teacher = states(model, batch.teacher, features)[-1][:, -batch.T_q:]
    assert found["LoRA"][-1] == pytest.approx((student - teacher)[batch.align].norm(dim=-1).mean().item(), rel=1e-5)
    assert found["LoRA"][-1] != pytest.approx(found["zero-shot"][-1], rel=1e-3)


@pytest.mark.parametrize("official", [False, True])
def test_demonstrations_are_what_stands_in_the_teachers_prompt_alone(toy, official):
    """All that the teacher can look at and the student cannot: with --official the instruction, too."""
    pool, processor = toy[2].teacher.samples, Processor.from_pretrained(REPOSITORY / "checkpoints/tiny")
    template = replace((OFFICIAL_TEMPLATES if official else TEMPLATES)["toy"], instruction="wug?\n")
    batch = collate([pool[0], pool[3]], [pool[1:3], pool[4:5]], processor, template)
    shown = explain.demonstrations(batch)
    for b in range(2):
        rest = batch.teacher.input_ids[b, batch.teacher.attention_mask[b] & ~shown[b]]
        assert rest.tolist() == batch.student.input_ids[b, batch.student.attention_mask[b]].tolist()
        assert shown[b].any() and batch.teacher.part[b, -1] == ANSWER


def test_a_run_of_another_machine_is_opened_on_this_one(tmp_path):
    train.main(["--samples", "12", "--epochs", "1", "--limit", "2", "--shots", "1", "--compare", "--out", str(tmp_path)])
    about = json.loads((tmp_path / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps({**about, "device": "cuda:7"}))
    explain.main(["--run", str(tmp_path), "--queries", "2", "--draws", "2", "--out", str(tmp_path / "figures")])
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["approximation.png", "distance.png", "mu.png"]


def test_a_run_that_reads_another_prompt_is_refused_beside(tmp_path):
    for name in "mimic", "stave":
        train.main(["--method", name, "--samples", "4", "--dev-samples", "0", "--epochs", "1", "--limit", "2", "--shots", "1",
                    "--compare", "--out", str(tmp_path / name)])
    with pytest.raises(InputError, match=f"{tmp_path / 'stave'}: expected a method that leaves prompt .*, found stave"):
        explain.main(["--run", str(tmp_path / "mimic"), "--beside", str(tmp_path / "stave"), "--out", str(tmp_path / "figures")])
