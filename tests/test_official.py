"""Equal to the official MimIC code, from recordings of it running on a tiny Idefics2 (golden/official_mimic)."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from baselines.live import LIVE
from data import OFFICIAL_TEMPLATES, Processor, Sample, collate
from mimic import MimIC, Recorder, align_loss
from model import Idefics2
from train import losses, parse, taken


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "golden/official_mimic/golden.safetensors")


@pytest.fixture(scope="module")
def model(shared):
    return Idefics2.from_pretrained(shared / "golden/official_mimic/model")


def features(model, golden, prefix):
    """Image features of a recorded batch; pictures that are padding are all zero."""
    values, mask = golden[f"{prefix}.pixel_values"].flatten(0, 1), golden[f"{prefix}.pixel_attention_mask"].flatten(0, 1).bool()
    real = values.flatten(1).any(1)
    return model.encode_images(values[real], mask[real])


def adapter(golden, z2="masked"):
    mimic = MimIC(*golden["adapter.v"].shape, z2=z2)
    mimic.load_state_dict({"vector": golden["adapter.v"], **{f: golden[f"adapter.{f}"] for f in ("f_weight", "f_bias")}})
    return mimic


def forward(model, golden, who, shifts):
    ids, mask = golden[f"{who}.input_ids"], golden[f"{who}.attention_mask"]
    counted = torch.arange(ids.shape[1]).expand(ids.shape)                 # the official forward numbers padding too
    return model(ids, mask, features(model, golden, who), shifts, counted), ids, mask


def close(found, expected, bound=2e-5):
    """Within `bound` of the largest recorded value: fp32 sums in another order."""
    assert (found - expected).abs().max() <= bound * expected.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("z2", ["masked", "unmasked"])
def test_states_losses_and_gradients_are_the_official_ones(model, golden, z2):
    recorded = {k.removeprefix(f"mimic_{z2}_z2."): v for k, v in golden.items() if k.startswith(f"mimic_{z2}_z2.")}
    mimic, teacher = adapter(golden, z2), Recorder(last=golden["student.input_ids"].shape[1])
    with torch.no_grad():
        forward(model, golden, "teacher", teacher)
    student = Recorder(mimic)
    logits, ids, mask = forward(model, golden, "student", student)
    close(logits[mask], recorded["logits"][mask])
    for layer, states in enumerate(student.ffn):
        close(states[mask], recorded["ffn"][layer][mask])
    align = align_loss(student.ffn, teacher.ffn, mask & (ids != 1))
    ce = F.cross_entropy(logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]])
    close(align, recorded["ffn_mse_loss"])
    close(ce, recorded["ce_loss"])
    (align + 0.5 * ce).backward()
    for name, p in (("v", mimic.vector), ("f_weight", mimic.f_weight), ("f_bias", mimic.f_bias)):
        close(p.grad, recorded[f"grad.{name}"])


def test_teacher_states_and_logits_are_the_official_ones(model, golden):
    teacher = Recorder()
    logits, _, mask = forward(model, golden, "teacher", teacher)
    close(logits[mask], golden["teacher.logits"][mask])
    for layer, states in enumerate(teacher.ffn):
        close(states[mask], golden["teacher.ffn"][layer][mask])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompt, method", [("zero", "plain"), ("zero", "mimic"), ("few", "plain")])
def test_generated_ids_are_the_official_ones(model, golden, prompt, method, beams):
    expected = golden[f"gen.{prompt}.{method}.beams{beams}"]
    shifts = adapter(golden) if method == "mimic" else None
    found = model.generate(golden[f"gen.{prompt}.input_ids"], golden[f"gen.{prompt}.attention_mask"],
                           features(model, golden, f"gen.{prompt}"), 10, beams, 0.0, shifts)
    for a, b in zip(found.tolist(), expected.tolist(), strict=True):
        n = b.index(2) + 1 if 2 in b else len(b)
        assert a[:n] == b[:n]


def test_prefill_logits_of_generation_are_the_official_ones(model, golden):
    ids, mask = golden["gen.zero.input_ids"], golden["gen.zero.attention_mask"].bool()
    counted = torch.arange(ids.shape[1]).expand(ids.shape)
    for method, shifts in (("plain", None), ("mimic", adapter(golden))):
        logits = model(ids, mask, features(model, golden, "gen.zero"), shifts, counted)
        close(logits[mask], golden[f"gen.zero.{method}.prefill_logits"][mask])


@pytest.fixture(scope="module")
def batch(shared, golden):
    """The recorded training step from its texts and pictures, through our prompts, tokens and image transform."""
    folder = shared / "golden/official_mimic"
    rows = []
    for r, turns in enumerate(json.loads((folder / "golden.json").read_text())["train"]["qas"]):
        rows.append([Sample(10 * r + i, folder / f"image_{r}_{i}.png", q, [a], a, 10 * r + i) for i, (q, a) in enumerate(turns)])
    processor = Processor.from_pretrained(folder / "model")
    return collate([row[-1] for row in rows], [row[:-1] for row in rows], processor, OFFICIAL_TEMPLATES["vqa"]), processor


def test_official_prompts_give_the_official_ids_masks_and_pixels(batch, golden):
    batch, processor = batch
    for who, rows in (("teacher", batch.teacher), ("student", batch.student)):
        assert torch.equal(rows.input_ids, golden[f"{who}.input_ids"])
        assert torch.equal(rows.attention_mask, golden[f"{who}.attention_mask"])
        values, mask = processor.images([s.picture() for s in rows.samples])
        expected = golden[f"{who}.pixel_values"].flatten(0, 1)[:, :, :values.shape[2], :values.shape[3]]
        assert torch.equal(values, expected)
        assert torch.equal(mask, golden[f"{who}.pixel_attention_mask"].flatten(0, 1).bool()[:, :mask.shape[1], :mask.shape[2]])


def by_image(model, batch, processor):
    features = {}
    for rows in (batch.teacher, batch.student):
        values, mask = processor.images([s.picture() for s in rows.samples])
        features |= zip((s.image_id for s in rows.samples), model.encode_images(values, mask), strict=True)
    return features


def test_train_py_official_takes_the_official_step(model, golden, batch):
    """The same losses and gradients through train.py's own functions: `python train.py --official`."""
    batch, processor = batch
    args, _ = parse(["--official"])
    mimic = adapter(golden, args.z2)
    align, ce = losses(model, mimic, batch, by_image(model, batch, processor), **taken(losses, vars(args)))
    close(align, golden["mimic_unmasked_z2.ffn_mse_loss"])
    close(ce, golden["mimic_unmasked_z2.ce_loss"])
    (args.lambda_align * align + args.lambda_ce * ce).backward()
    for name, p in (("v", mimic.vector), ("f_weight", mimic.f_weight), ("f_bias", mimic.f_bias)):
        close(p.grad, golden[f"mimic_unmasked_z2.grad.{name}"])


def recorded_live(golden):
    live = LIVE(*golden["live.v"].shape)
    live.load_state_dict({"vector": golden["live.v"], "alpha": golden["live.alpha"]})
    return live


def test_live_moves_the_states_as_the_official_code_does(model, golden):
    live = recorded_live(golden)
    logits, ids, mask = forward(model, golden, "student", live)
    close(logits[mask], golden["live.logits"][mask])
    close(F.cross_entropy(logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]]), golden["live.ce_loss"])


def test_train_py_official_live_takes_the_official_step(model, golden, batch):
    """`python train.py --official --method live`: KL over the distributions behind the answer's tokens, one late."""
    batch, processor = batch
    (args, _), live = parse(["--official", "--method", "live"]), recorded_live(golden)
    kl, ce = LIVE.losses(model, live, batch, by_image(model, batch, processor), **taken(LIVE.losses, vars(args)))
    close(kl, golden["live.logits_kl_loss"])
    close(ce, golden["live.ce_loss"])
    loss = args.lambda_align * kl + args.lambda_ce * ce
    close(loss, golden["live.loss"])
    loss.backward()
    close(live.vector.grad, golden["live.grad.v"])
    close(live.alpha.grad, golden["live.grad.alpha"])


@pytest.mark.parametrize("late", [False, True])
def test_kl_is_over_every_distribution_an_answer_is_read_from_unless_it_starts_late(model, golden, batch, late):
    """By default from the column before the answer's first token to the one before its end; official: each one later."""
    batch, processor = batch
    found, _ = LIVE.losses(model, recorded_live(golden), batch, by_image(model, batch, processor), kl_late=late)
    each = []
    for b, row in enumerate(golden["student.input_ids"].tolist()):
        for t in range(row.index(0) + 1, len(row)):                                   # behind the separator, </s> included
            at = (t if late else t - 1) - len(row)
            p, q = (golden[f"{who}.logits"][b, at].double().softmax(-1).tolist() for who in ("teacher", "live"))
            each.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    close(found, torch.tensor(sum(each) / len(each)))
    assert [parse([*words, "--method", "live"])[0].kl_late for words in ([], ["--official"])] == [False, True]
