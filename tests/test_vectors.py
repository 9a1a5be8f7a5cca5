"""Methods without training: RICES, task vector, function vector, judged by loops and by the model's own full passes."""

import json
import random
from dataclasses import replace

import pytest
import torch
from test_commands import okvqa_run  # noqa: F401

import eval as evaluation
from baselines import function_vector as fv
from baselines import rices
from baselines import task_vector as tv
from data import TEMPLATES, Sample, pick_icds, train_dev
from mimic import Recorder
from model import InputError, Shifts

TEMPLATE = TEMPLATES["toy"]
VECTOR = torch.randn(128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Toy:
    """The trained toy model in fp64, samples and their image features."""

    def __init__(self):
        self.model, self.processor = evaluation.load_model("checkpoints/tiny", "cpu", "float64")
        self.pool, self.dev = train_dev("toy", None, 60, 10, 0)
        self.features = {}
        evaluation.encode_images(self.model, self.processor, self.pool + self.dev, self.features)

    def inputs(self, queries, shots=3):
        """input_ids, attention_mask, image_features of queries; `shots` is a number or a list of them, one a query."""
        shots = shots if isinstance(shots, list) else [shots] * len(queries)
        icds = [pick_icds(self.pool, q, n, f"{q.id}") for q, n in zip(queries, shots, strict=True)]
        return tv.inputs(self.model, self.processor, TEMPLATE, self.features, queries, icds)


@pytest.fixture(scope="module")
def toy():
    return Toy()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ---- RICES ---------------------------------------------------------------------------------------------------------

def test_an_image_vector_is_the_mean_of_its_valid_patches_with_length_1_whatever_is_padded(toy, monkeypatch):
    picture = toy.pool[0].picture().resize((24, 16))
    values, mask = torch.zeros(1, 3, 40, 32, dtype=torch.float64), torch.zeros(1, 40, 32, dtype=torch.bool)
    monkeypatch.setattr(toy.processor, "shortest", 8)
    small, whole = toy.processor.images([picture])
    values[:, :, :16, :24], mask[:, :16, :24] = small, True
    states = toy.model.model["vision_model"](small.double(), torch.ones(1, 2, 3, dtype=torch.bool))[0].float()
    mean = [sum(states[p, i].item() for p in range(6)) / 6 for i in range(states.shape[1])]
    length = sum(x * x for x in mean) ** 0.5
    expected = torch.tensor([x / length for x in mean])
    for found in rices.image_vector(toy.model, small, whole), rices.image_vector(toy.model, values, mask):
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-6)


def naive_ranking(pool, vectors, query):
    """Indices of the pool without the query, by cosine, equal ones as they stand."""
    z = vectors[query.image_id].double()
    cosine = [float(vectors[s.image_id].double() @ z / vectors[s.image_id].norm() / z.norm()) for s in pool]
    return [i for i in sorted(range(len(pool)), key=lambda i: -round(cosine[i], 6)) if pool[i].id != query.id]


def test_rices_picks_what_a_loop_over_cosines_ranks_first_and_never_the_query(toy, tmp_path):
    def encode(samples, found):
        evaluation.encode_images(toy.model, toy.processor, samples, found, None, lambda *x: rices.image_vector(toy.model, *x))

    vectors = rices.image_vectors(toy.model, toy.pool + toy.dev, encode, tmp_path / "rices.safetensors")
    last, first = rices.Nearest(toy.pool, vectors), rices.Nearest(toy.pool, vectors, "first")
    for query in toy.dev + toy.pool[:10]:
        expected = [toy.pool[i] for i in naive_ranking(toy.pool, vectors, query)[:5]]
        assert first(toy.pool, query, 5) == expected and last(toy.pool, query, 5) == expected[::-1] and query not in expected
    with pytest.raises(InputError, match="at least 60 training samples beside the query, found 59"):
        last(toy.pool, toy.pool[0], 60)
    read = rices.image_vectors(toy.model, toy.pool, None, tmp_path / "rices.safetensors")          # nothing is encoded again
    assert read.keys() == vectors.keys() and all(torch.equal(read[i], vectors[i]) for i in read)


def test_two_questions_about_one_picture_stand_as_in_the_pool_and_one_may_be_shown_for_the_other():
    pool = [Sample(image, None, "?", [], id=10 * image + n) for n in range(2) for image in range(30)]
    vectors = dict(enumerate(torch.nn.functional.normalize(torch.randn(30, 96, generator=torch.Generator().manual_seed(0)))))
    found = rices.Nearest(pool, vectors, "first")(pool, pool[7], 59)
    assert [s.id for s in found[:1]] == [71] and [s.image_id for s in found[1::2]] == [s.image_id for s in found[2::2]]
    assert all(a.id + 1 == b.id for a, b in zip(found[1::2], found[2::2], strict=True))


def test_the_cache_of_another_vision_tower_is_not_used(toy, tmp_path):
    file, calls = tmp_path / "rices.safetensors", []

    def encode(samples, found):
        calls.append(len(samples))
        found.update({s.image_id: torch.ones(3) for s in samples})

    rices.image_vectors(toy.model, toy.pool[:4], encode, file)
    rices.image_vectors(toy.model, toy.pool[:6], encode, file)
    weight = toy.model.model["vision_model"].post_layernorm.weight
    weight.data[0] += 1
    rices.image_vectors(toy.model, toy.pool[:4], encode, file)
    weight.data[0] -= 1
    assert calls == [4, 2, 4]


# ---- Task vector ---------------------------------------------------------------------------------------------------

def test_the_last_layers_own_state_in_its_place_gives_the_prompts_own_logits_whatever_the_query(toy):
    ids, mask, images = toy.inputs(toy.dev[:1])
    recorder = Recorder(last=1)
    own = toy.model(ids, mask, images, recorder)[:, -1]
    last = tv.TaskVector(recorder.layer[-1][0, 0], len(recorder.layer) - 1)
    for shots in (3, 0):                                         # its own prompt, and another query without demonstrations
        ids, mask, images = toy.inputs(toy.dev[:1] if shots else toy.dev[1:2], shots)
        close(toy.model(ids, mask, images, last)[:, -1], own)


def test_theta_is_the_mean_over_dummy_queries_one_at_a_time(toy):
    total = [0.0] * 6
    for query in toy.dev[:5]:
        recorder = Recorder()
        toy.model(*toy.inputs([query]), recorder)
        total = [t + state[0, -1] for t, state in zip(total, recorder.layer, strict=True)]
    found = tv.mean_states(toy.model, [toy.inputs(toy.dev[:2], [3, 3]), toy.inputs(toy.dev[2:5], 3)])
    torch.testing.assert_close(found, torch.stack(total).float() / 5, rtol=1e-5, atol=1e-6)


class At(Shifts):
    """The judge: the state after `layer` becomes (or grows by) `vector` in the columns from `start` to `end` of a full pass."""

    def __init__(self, vector, layer, start, end=None, add=False):
        self.vector, self.layer, self.columns, self.add = vector, layer, slice(start, end), add

    def after_layer(self, layer, hidden_states):
        if layer == self.layer:
            hidden_states = hidden_states.clone()
            hidden_states[:, self.columns] = self.vector + (hidden_states[:, self.columns] if self.add else 0)
        return hidden_states


@pytest.mark.parametrize("kind", [tv.TaskVector, fv.FunctionVector])
@pytest.mark.parametrize("layer", [1, 5])
def test_cached_decoding_patches_what_a_full_pass_does(toy, kind, layer, monkeypatch):
    """The task vector patches the prompt's last column alone, the function vector that and all that follow."""
    prompt, mask, images = toy.inputs(toy.dev[:3], 0)
    T, ids = prompt.shape[1], prompt
    judge = At(VECTOR, layer, T - 1, T) if kind is tv.TaskVector else At(VECTOR, layer, T - 1, add=True)
    for _ in range(4):
        best = toy.model(ids, torch.ones_like(ids), images, judge)[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], 1)
    monkeypatch.setattr(toy.model, "end_ids", set())                                       # nothing ends an answer here
    found = toy.model.generate(prompt, mask, images, 4, shifts=kind(VECTOR, layer))
    assert found.tolist() == ids[:, T:].tolist()


@pytest.mark.parametrize("kind", [tv.TaskVector, fv.FunctionVector])
def test_padding_another_row_changes_nothing(toy, kind):
    shifts, alone, padded = kind(VECTOR, 2), toy.inputs(toy.dev[:1], 0), toy.inputs(toy.dev[:2], [0, 3])
    assert padded[1][0].sum() < padded[1].shape[1]
    close(toy.model(*padded, shifts)[0, -1], toy.model(*alone, shifts)[0, -1])
    for beams in (1, 3):
        found, expected = (toy.model.generate(*x, 4, beams, 0.0, shifts)[0].tolist() for x in (padded, alone))
        assert found[:len(expected)] == expected and not any(found[len(expected):])


# ---- Function vector -----------------------------------------------------------------------------------------------

class OnePatch(Shifts):
    """The judge: one head's output at the last column becomes a value, in a full pass without a cache."""

    def __init__(self, layer, head, value):
        self.layer, self.head, self.value = layer, head, value

    def after_attention(self, layer, q, k, out, lse):
        if layer == self.layer:
            out = out.clone()
            out[:, self.head, -1] = self.value
        return out


def test_a_head_patched_with_its_own_output_changes_nothing(toy):
    prompt, reader = toy.inputs(toy.dev[:1]), fv.HeadReader()
    own = fv.last_logits(toy.model, *prompt[:2], fv.prefill(toy.model, *prompt), reader)
    torch.testing.assert_close(own, toy.model(*prompt)[:, -1].float())
    effects = fv.indirect_effects(toy.model, prompt, 40, torch.stack(reader.outputs)[:, 0])
    assert effects.shape == (6, 8) and effects.abs().max() < 1e-6


def test_indirect_effects_of_the_batched_heads_equal_patching_one_head_at_a_time(toy):
    prompt, values = toy.inputs(toy.dev[:1]), torch.randn(6, 8, 16, generator=torch.Generator().manual_seed(0))
    gold = int(toy.model(*prompt)[0, -1].argmax())
    base = toy.model(*prompt)[0, -1].softmax(-1)[gold]
    patched = [[toy.model(*prompt, OnePatch(layer, head, values[layer, head].double()))[0, -1].softmax(-1)[gold]
                for head in range(8)] for layer in range(6)]
    expected = torch.tensor(patched) - base
    found = fv.indirect_effects(toy.model, prompt, gold, values)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)
    assert expected.abs().max() > 0.01


def test_the_vector_is_o_proj_of_the_concatenated_heads_with_all_others_zero(toy):
    values, heads = torch.randn(6, 8, 16), [(0, 3), (4, 7), (4, 0)]
    expected = 0
    for layer in range(6):
        masked = torch.cat([values[layer, h] if (layer, h) in heads else torch.zeros(16) for h in range(8)])
        expected = expected + toy.model.model["text_model"].layers[layer].self_attn.o_proj(masked.double())
    torch.testing.assert_close(fv.function_vector(toy.model, heads, values), expected.float())


def test_make_reads_right_prompts_only_and_takes_the_heads_of_largest_mean_effect(toy, monkeypatch):
    """The whole recipe again, a prompt at a time."""
    for name, value in {"PROMPTS": 6, "SHUFFLED": 2, "HEADS": 3}.items():
        monkeypatch.setattr(fv, name, value)
    right, total, effects = [], 0, torch.zeros(6, 8)
    for q in random.Random("0-clean").sample(toy.pool, len(toy.pool)):
        icds = pick_icds(toy.pool, q, 8, f"0-clean-{q.id}")
        prompt, reader = tv.inputs(toy.model, toy.processor, TEMPLATE, toy.features, [q], [icds]), fv.HeadReader()
        word = toy.processor.decode([toy.model(*prompt, reader)[0, -1].argmax()])
        if len(right) < 6 and word == q.target.split()[0]:
            right, total = [*right, q], total + torch.stack(reader.outputs)[:, 0]
    for q in right[:2]:
        icds = pick_icds(toy.pool, q, 8, f"0-shuffled-{q.id}")
        targets = random.Random(f"0-targets-{q.id}").sample([s.target for s in icds], 8)
        icds = [replace(s, target=t) for s, t in zip(icds, targets, strict=True)]
        prompt = tv.inputs(toy.model, toy.processor, TEMPLATE, toy.features, [q], [icds])
        effects += fv.indirect_effects(toy.model, prompt, toy.processor.encode(q.target)[1], total / 6) / 2
    best = sorted(((effects[i, h].item(), -i, -h) for i in range(6) for h in range(8)), reverse=True)[:3]
    heads = [(-i, -h) for _, i, h in best]
    scores = iter([1.0, 3.0, 2.0, 3.0, 0.0, 0.0])
    found, about = fv.make(toy.model, toy.processor, TEMPLATE, toy.features, toy.pool, 8, 0, lambda shifts: next(scores), 5)
    assert [tuple(h[:2]) for h in json.loads(about["heads"])] == heads and about["prompts"] == 6
    torch.testing.assert_close(found.vector, fv.function_vector(toy.model, heads, total / 6), rtol=1e-4, atol=1e-5)
    assert found.layer == 1 and about["dev_scores"] == [1.0, 3.0, 2.0, 3.0, 0.0, 0.0]             # of equals the lower layer


# ---- The commands --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, method, shots", [
    (["rices"], "rices", 8), (["rices", "--order", "first", "--shots", "2"], "rices-first", 2),
    (["task-vector"], "task-vector", 0), (["function-vector", "--samples", "9"], "function-vector", 0)])
def test_each_method_runs_through_eval(words, method, shots, tmp_path):
    row = evaluation.main(["--method", *words, "--limit", "4", "--dev-samples", "4", "--num-beams", "1", "--out", str(tmp_path),
                           *([] if "--samples" in words else ["--samples", "30"])])
    made = "vector" in method
    assert (row["method"], row["shots"], row["n"], row["parameters"]) == (method, shots, 4, 128 * made)
    assert (row["train_seconds"] > 0) == made and json.loads((tmp_path / "results.json").read_text()) == [row]
    if made:
        kind = {"task-vector": tv.TaskVector, "function-vector": fv.FunctionVector}[method]
        vector = kind.load(tmp_path / f"{method}.safetensors")
        assert vector.vector.shape == (128,) and 0 <= vector.layer < 6
        with pytest.raises(InputError, match="expected a x"):
            tv.load_vector(tmp_path / "results.json", "x")


def test_demonstrations_are_restored_beside_a_trained_adapter(okvqa_run, tmp_path):  # noqa: F811
    words = ["--run", str(okvqa_run), "--out", str(tmp_path), "--limit", "2", "--restore-shots"]
    rows = [evaluation.main([*words, k]) for k in "02"]
    assert [(r["method"], r["shots"]) for r in rows] == [("mimic", 0), ("mimic", 2)]
    assert rows[1]["prompt_tokens"] > rows[0]["prompt_tokens"] and rows[1]["train_seconds"] == rows[0]["train_seconds"] > 0


@pytest.mark.parametrize("words, message", [
    (["--restore-shots", "2"], "--restore-shots 2: expected --run beside it"),
    (["--order", "first"], "--order first: expected --method rices, found zero-shot"),
    (["--method", "rices", "--shots", "0"], "expected --shots of at least 1, found 0"),
    (["--method", "function-vector", "--samples", "2"], "at least 2 training samples beside the query"),
    (["--method", "task-vector", "--dev-samples", "0"], "expected dev samples")])
def test_a_mistake_is_named_before_the_long_work(words, message, tmp_path):
    with pytest.raises(InputError, match=message):
        evaluation.main([*words, "--limit", "2", "--out", str(tmp_path)])


def test_a_model_that_gets_nothing_right_has_no_function_vector(tiny_folder, tmp_path, shared):
    with pytest.raises(InputError, match="prompts that the model gets right with 3 demonstrations, found none"):
        evaluation.main(["--method", "function-vector", "--shots", "3", "--dataset", "okvqa", "--data", str(shared / "data"),
                         "--model", str(tiny_folder), "--limit", "2", "--out", str(tmp_path)])
