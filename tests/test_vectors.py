"""Methods without training: RICES, task vector, function vector, judged by loops and by the model's own full passes."""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import with_pictures
from torch.testing import assert_close

import baselines
import eval as evaluation
import models
from baselines import function_vector as fv
from baselines import rices
from baselines import task_vector as tv
from data import TEMPLATES, Sample, encode_images, pick_icds, prompts, train_dev
from mimic import Recorder
from model import Shifts
from support.files import InputError

TEMPLATE, MODEL = TEMPLATES["toy"], str(Path(__file__).resolve().parents[1] / "checkpoints/tiny")
VECTOR = torch.randn(128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Toy:
    """The trained toy model in fp64, samples and their image features."""

    def __init__(self):
        self.model, self.processor = models.load_model(MODEL, "cpu", "float64")
        self.pool, self.dev = train_dev("toy", None, 60, 10, 0)
        self.features = encode_images(self.model, self.processor, self.pool + self.dev, {})

    def rows(self, queries, icds):
        """Rows; icds: a list a query, or the number of them (one number for all)."""
        if isinstance(icds, int):
            icds = [pick_icds(self.pool, q, icds, f"{q.id}") for q in queries]
        return prompts(queries, icds, self.processor, TEMPLATE)

    def inputs(self, queries, icds):
        return self.rows(queries, icds).inputs(self.model, self.features)

    def prepare(self, kind, pool, dev_score, batch_size=16):
        """The vector of the pool's task, of 8 shots and seed 0."""
        icds, vector = kind.prepare(self.model, self.processor, TEMPLATE, pool, [pool[0]] * 3, 8, 0, batch_size, dev_score)
        assert icds == [[], [], []]
        return vector


@pytest.fixture(scope="module")
def toy():
    return Toy()


# ---- RICES
def test_an_image_vector_is_the_mean_of_its_valid_patches_with_length_1_whatever_is_padded(toy, monkeypatch):
    monkeypatch.setattr(toy.processor, "shortest", 8)
    small, whole = toy.processor.images([toy.pool[0].picture().resize((24, 16))])
    values, mask = (torch.nn.functional.pad(x, (0, 8, 0, 24)) for x in (small, whole))
    states = toy.model.model["vision_model"](small.double(), torch.ones(1, 2, 3, dtype=torch.bool))[0].float()
    mean = [sum(states[p, i].item() for p in range(6)) / 6 for i in range(states.shape[1])]
    length = sum(x * x for x in mean) ** 0.5
    for found in rices.image_vector(toy.model, small, whole), rices.image_vector(toy.model, values, mask):
        assert_close(found[0], torch.tensor(mean) / length, rtol=1e-4, atol=1e-6)


def test_rices_picks_what_a_loop_over_cosines_ranks_first_and_never_the_query(toy):
    queries = toy.dev + toy.pool[:10]
    last, first = (kind.prepare(toy.model, toy.processor, TEMPLATE, toy.pool, queries, 5, 0, 16, None)[0]
                   for kind in (rices.Nearest, rices.NearestFirst))
    vectors = encode_images(toy.model, toy.processor, queries + toy.pool, {}, None, partial(rices.image_vector, toy.model))
    for query, found, other in zip(queries, first, last, strict=True):
        z, images = vectors[query.image_id].numpy(), np.stack([vectors[s.image_id].numpy() for s in toy.pool])
        cosine = images @ z / np.linalg.norm(images, axis=1) / np.linalg.norm(z)
        expected = [toy.pool[i] for i in np.argsort(-cosine) if toy.pool[i].id != query.id][:5]
        assert found == expected and other == expected[::-1] and query not in expected


def test_two_questions_about_one_picture_stand_as_in_the_pool_and_one_may_be_shown_for_the_other():
    pool = [Sample(image, None, "?", [], id=10 * image + n) for n in range(2) for image in range(30)]
    vectors = dict(enumerate(torch.nn.functional.normalize(torch.randn(30, 96, generator=torch.Generator().manual_seed(0)))))
    found, = rices.nearest(pool, [pool[7]], 59, vectors)
    assert found[0].id == 71 and all(a.id + 1 == b.id for a, b in zip(found[1::2], found[2::2], strict=True))


# ---- Task vector
def test_the_last_layers_own_state_in_its_place_gives_the_prompts_own_logits_whatever_the_query(toy):
    recorder = Recorder(last=1)
    own = toy.model(**toy.inputs(toy.dev[:1], 3), shifts=recorder)[:, -1]
    last = tv.TaskVector(recorder.layer[-1][0, 0], len(recorder.layer) - 1)
    for prompt in toy.inputs(toy.dev[:1], 3), toy.inputs(toy.dev[1:2], 0):
        assert_close(toy.model(**prompt, shifts=last)[:, -1], own)


def test_theta_is_the_mean_over_dummy_queries_one_at_a_time(toy):
    total = [0.0] * 6
    for query in toy.dev[:5]:
        recorder = Recorder()
        toy.model(**toy.inputs([query], 3), shifts=recorder)
        total = [t + state[0, -1] for t, state in zip(total, recorder.layer, strict=True)]
    found = tv.mean_states(toy.model, toy.features, [toy.rows(toy.dev[:2], 3), toy.rows(toy.dev[2:5], 3)])
    assert_close(found, torch.stack(total).float() / 5, rtol=1e-5, atol=1e-6)


def test_the_task_vector_of_one_question_word_answers_it_without_a_demonstration(toy, capsys):
    asked = [s for s in train_dev("toy", None, 300, 0, 0)[0] if s.question == "dax?"]

    def right(shifts):
        said = evaluation.answer(toy.model, toy.processor, "toy", asked[40:60], [[]] * 20, shifts, num_beams=1)
        return evaluation.score("toy", asked[40:60], said)[0]

    vector = toy.prepare(tv.TaskVector, asked[:40], right)
    assert right(None) == 0 and right(vector) == 100
    line = capsys.readouterr().out
    assert line.startswith(f"task-vector: after layer {vector.layer} (the first is 0); dev score by layer: ") and "100.0" in line


class At(Shifts):
    """The judge: in some columns of a full pass the state after `layer` becomes (add: grows by) VECTOR."""

    def __init__(self, layer, columns, add):
        self.layer, self.columns, self.add = layer, columns, add

    def after_layer(self, layer, hidden_states):
        if layer == self.layer:
            hidden_states = hidden_states.clone()
            hidden_states[:, self.columns] = VECTOR + self.add * hidden_states[:, self.columns]
        return hidden_states


@pytest.mark.parametrize("kind", [tv.TaskVector, fv.FunctionVector])
@pytest.mark.parametrize("layer", [1, 5])
def test_cached_decoding_patches_what_a_full_pass_does(toy, kind, layer, monkeypatch):
    """The task vector patches the prompt's last column alone, the function vector all that follow too."""
    prompt, mask, images = toy.inputs(toy.dev[:3], 0).values()
    T, ids = prompt.shape[1], prompt
    judge = At(layer, slice(T - 1, T), False) if kind is tv.TaskVector else At(layer, slice(T - 1, None), True)
    for _ in range(4):
        best = toy.model(ids, torch.ones_like(ids), images, judge)[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], 1)
    monkeypatch.setattr(toy.model, "end_ids", set())                                       # nothing ends an answer here
    found = toy.model.generate(prompt, mask, images, 4, shifts=kind(VECTOR, layer))
    assert found.tolist() == ids[:, T:].tolist()


@pytest.mark.parametrize("kind", [tv.TaskVector, fv.FunctionVector])
def test_padding_another_row_changes_nothing(toy, kind):
    shifts, alone, padded = kind(VECTOR, 2), toy.inputs(toy.dev[:1], 0), toy.inputs(toy.dev[:2], [[], toy.pool[:3]])
    assert not padded["attention_mask"][0].all()
    assert_close(toy.model(**padded, shifts=shifts)[0, -1], toy.model(**alone, shifts=shifts)[0, -1])
    for beams in (1, 3):
        found, expected = (toy.model.generate(*x.values(), 4, beams, 0.0, shifts)[0].tolist() for x in (padded, alone))
        assert found[:len(expected)] == expected and not any(found[len(expected):])


# ---- Function vector
class OnePatch(Shifts):
    """The judge: in a full pass without a cache one head's output at the last column becomes a value."""

    def __init__(self, layer, head, value):
        self.layer, self.head, self.value = layer, head, value

    def after_attention(self, layer, q, k, out, lse):
        if layer == self.layer:
            out = out.clone()
            out[:, self.head, -1] = self.value
        return out


def test_indirect_effects_of_the_batched_heads_equal_patching_one_head_at_a_time(model):
    ids, features = with_pictures(model, torch.tensor([[1, 5, 6, 7, 8, 9, 10]]), at=(2, 4))
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_features": features}
    values = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    base = model(**prompt)[0, -1].softmax(-1)
    gold = int(base.argmax())
    patched = [[model(**prompt, shifts=OnePatch(layer, head, values[layer, head])) for head in range(4)] for layer in range(3)]
    expected = torch.stack([torch.stack([x[0, -1].softmax(-1)[gold] for x in row]) for row in patched]) - base[gold]
    found = fv.indirect_effects(model, prompt, gold, values)
    assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)
    assert expected.abs().max() > 0.001
    rows = ids.expand(4, -1), torch.ones(4, ids.shape[1]), features.repeat(4, 1, 1)
    assert_close(model(*rows, fv.HeadPatch(2, values[2])), torch.cat(patched[2]))               # at the last token alone


def test_the_vector_is_o_proj_of_the_concatenated_heads_with_all_others_zero(toy):
    values, heads, expected = torch.randn(6, 8, 16), [(0, 3), (4, 7), (4, 0)], 0
    for i, layer in enumerate(toy.model.model["text_model"].layers):
        masked = torch.cat([values[i, h] if (i, h) in heads else torch.zeros(16) for h in range(8)])
        expected = expected + layer.self_attn.o_proj(masked.double())
    assert_close(fv.sum_of_heads(toy.model, heads, values), expected.float())


def test_it_reads_right_prompts_only_and_takes_the_heads_of_largest_mean_effect(toy, monkeypatch, capsys):
    """The whole recipe again, a prompt at a time."""
    for name, value in {"PROMPTS": 6, "SHUFFLED": 2, "HEADS": 3}.items():
        monkeypatch.setattr(fv, name, value)
    right, total, effects = [], 0, torch.zeros(6, 8)
    for q in random.Random("0-clean").sample(toy.pool, len(toy.pool)):
        icds = pick_icds(toy.pool, q, 8, f"0-clean-{q.id}")
        reader = fv.HeadReader()
        word = toy.processor.decode([toy.model(**toy.inputs([q], [icds]), shifts=reader)[0, -1].argmax()])
        if len(right) < 6 and word == q.target.split()[0]:
            right, total = [*right, q], total + torch.stack(reader.outputs)[:, 0]
    for q in right[:2]:
        icds = pick_icds(toy.pool, q, 8, f"0-shuffled-{q.id}")
        targets = random.Random(f"0-targets-{q.id}").sample([s.target for s in icds], 8)
        icds = [replace(s, target=t) for s, t in zip(icds, targets, strict=True)]
        effects += fv.indirect_effects(toy.model, toy.inputs([q], [icds]), toy.processor.encode(q.target)[1], total / 6) / 2
    heads = sorted(((i, h) for i in range(6) for h in range(8)), key=lambda head: -effects[head].item())[:3]
    scores = iter([1.0, 3.0, 2.0, 3.0, 0.0, 0.0])
    found = toy.prepare(fv.FunctionVector, toy.pool, lambda shifts: next(scores), 5)
    assert_close(found.vector.data, fv.sum_of_heads(toy.model, heads, total / 6), rtol=1e-4, atol=1e-5)
    assert found.layer == 1                                                          # of equals the lower layer
    said = capsys.readouterr().out
    assert said.startswith("function-vector: 6 prompts answered right; ") and said.endswith("layer: 1.0 3.0 2.0 3.0 0.0 0.0\n")
    assert [f" {layer}.{head} " in said for layer, head in heads] == [True] * 3


# ---- The commands
@pytest.mark.parametrize("words, method, shots", [
    (["rices"], "rices", 8), (["rices-first", "--shots", "2"], "rices-first", 2), (["task-vector"], "task-vector", 0),
    (["function-vector", "--official"], "function-vector", 0)])
def test_each_method_runs_through_eval(words, method, shots, tmp_path):
    row = evaluation.main(["--model", MODEL, "--samples", "30", "--limit", "4", "--dev-samples", "4", "--num-beams", "1", "--out",
                           str(tmp_path), "--method", *words])
    made = "vector" in method
    assert (row["method"], row["shots"], row["n"], row["parameters"]) == (method, shots, 4, 128 * made)
    assert (row["train_seconds"] > 0) == made and json.loads((tmp_path / "results.json").read_text()) == [row]
    if made:
        found = baselines.untrained()[method].load(tmp_path / f"{method}.safetensors")
        assert found.vector.shape == (128,) and 0 <= found.layer < 6


@pytest.mark.parametrize("words, message", [
    (["--method", "rices", "--shots", "0"], "--shots: expected at least 1 for rices, found 0"),
    (["--method", "function-vector", "--samples", "9"], "at least 10 training samples beside the query"),
    (["--method", "task-vector", "--samples", "20", "--dev-samples", "0"], "--dev-samples: expected ")])
def test_a_mistake_is_named_before_the_long_work(words, message, tmp_path):
    with pytest.raises(InputError, match=message):
        evaluation.main(["--model", MODEL, *words, "--limit", "2", "--out", str(tmp_path)])


def test_real_pictures_and_questions_and_a_model_that_gets_nothing_right(either_folder, tmp_path, shared):
    words = ["--dataset", "okvqa", "--data", str(shared / "data"), "--model", str(either_folder), "--limit", "2", "--shots", "3",
             "--num-beams", "1", "--out", str(tmp_path), "--method"]
    assert [evaluation.main([*words, m])["parameters"] for m in ("rices", "task-vector")] == [0, 64]
    with pytest.raises(InputError, match="prompts that the model gets right with 3 demonstrations, found none"):
        evaluation.main([*words, "function-vector"])
