"""Every trained method through the same two commands, on a few samples of the toy world; what the training step does for each."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_model, small

import eval as evaluation
import train
from data import TEMPLATES, collate, load, pick_icds
from eval import ADAPTERS, answer, load_model
from features import encode_images
from idefics1 import Idefics1
from mimic import MimIC
from model import Idefics2, InputError, Shifts
from train import DEFAULTS, EPOCHS, losses, parse


def run(out, *options):
    return train.main(["--samples", "24", "--dev-samples", "6", "--limit", "12", "--epochs", "2", "--compare", "0",
                       "--out", str(out), *options])


@pytest.fixture(scope="module")
def tiny():
    """The toy world's model and processor, four queries with two demonstrations each."""
    model, processor = load_model("checkpoints/tiny", "cpu", "float32")
    samples = load("toy", "data", "train", 0)[:40]
    queries = samples[:4]
    return model, processor, queries, [pick_icds(samples, q, 2, f"0-{q.id}") for q in queries]


VARIANTS = {**{method: ["--method", method] for method in ADAPTERS},
            "mimic by KL": ["--align-on", "logits"],
            "lora everywhere": ["--method", "lora", "--scope", "all"],
            "official lora": ["--method", "lora", "--official"],
            "lora with a teacher": ["--method", "lora", "--lambda-align", "1", "--targets", "o_proj", "--rank", "1"],
            "mimic on both prompts": ["--ce-prompts", "both", "--shots", "2"]}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_trains_and_eval_of_it_scores_the_same(name, tmp_path):
    rows = run(tmp_path / "run", *VARIANTS[name])
    method = rows[-1]["method"]
    assert method in ADAPTERS and rows[0]["method"] == "zero-shot" and rows[0]["prompt_tokens"] == 9
    assert rows[-1]["prompt_tokens"] == 9 + 20 * (method == "prompt-tuning")        # the zero-shot prompt is untouched
    log = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert len(log) == 12 and all(float(r["grad_norm"]) > 0 for r in log)
    again = evaluation.main(["--run", str(tmp_path / "run"), "--limit", "12", "--out", str(tmp_path / "again")])
    same = ("method", "score", "n", "parameters", "prompt_tokens", "seed")
    assert {k: again[k] for k in same} == {k: rows[-1][k] for k in same}
    said = [[json.loads(x) for x in (tmp_path / f / "predictions.jsonl").read_text().splitlines()] for f in ("run", "again")]
    assert [x["prediction"] for x in said[0] if x["method"] == method] == [x["prediction"] for x in said[1]]


@pytest.fixture(scope="module")
def toy_idefics1(tmp_path_factory):
    """A tiny random Idefics1 that has the toy world's words."""
    folder = save_model(tmp_path_factory.mktemp("toy") / "idefics1", small("idefics1", 122))
    return Path(shutil.copy("checkpoints/tiny/tokenizer.json", folder)).parent


@pytest.mark.parametrize("options", [[], ["--fit", "layerwise"], ["--share-icds"], ["--method", "lora", "--scope", "all"],
                                     ["--dataset", "toy-caption", "--method", "stave"]], ids=" ".join)
def test_the_toy_world_runs_through_an_idefics1(options, toy_idefics1, tmp_path):
    rows = run(tmp_path / "run", "--model", str(toy_idefics1), "--shots", "2", "--epochs", "1", *options)
    again = evaluation.main(["--run", str(tmp_path / "run"), "--limit", "12", "--out", str(tmp_path / "again")])
    same = ("method", "score", "n", "parameters", "prompt_tokens")
    assert {k: again[k] for k in same} == {k: rows[-1][k] for k in same}
    assert rows[-1]["prompt_tokens"] == 9 - 3 or "toy-caption" in options           # a picture is one token here, four in the toy


def test_the_model_says_how_many_demonstrations_and_epochs_are_the_papers(toy_idefics1, tmp_path):
    assert parse(["--model", str(toy_idefics1)]).shots == 32 and parse([]).shots == 8
    assert parse(["--model", str(toy_idefics1), "--method", "stave"]).shots == 1
    assert (Idefics1.epochs, Idefics2.epochs) == (10, 5)
    assert [n or Idefics1.epochs for _, n in EPOCHS] == [15, 10, 10] and [n or Idefics2.epochs for _, n in EPOCHS] == [15, 10, 5]
    row = evaluation.main(["--model", str(toy_idefics1), "--method", "icl", "--limit", "2", "--num-beams", "1", "--out",
                           str(tmp_path)])
    assert row["shots"] == 32


def test_without_a_teacher_nobody_reads_demonstrations():
    for method in ADAPTERS:
        args = parse(["--method", method])
        assert (args.lambda_align, args.lambda_ce) == DEFAULTS[method][2:4] and args.lr == DEFAULTS[method][1]
        assert args.shots == {"mimic": 8, "live": 8, "stave": 1}.get(method, 0)
    assert parse(["--method", "lora", "--dataset", "okvqa", "--model", "checkpoints/tiny"]).lr == 5e-4
    assert parse(["--lambda-align", "0"]).shots == 0 and parse(["--method", "lora", "--lambda-align", "1"]).shots == 8


@pytest.mark.parametrize("options, message", [
    (["--method", "hificl", "--official"], "--official: expected mimic, live or lora, .* found hificl"),
    (["--method", "prompt-tuning", "--lambda-align", "1"], "--method prompt-tuning: expected --lambda-align 0 .* found 1"),
    (["--method", "lora", "--rank", "0"], "--rank: expected at least 1, found 0"),
    (["--method", "lora", "--targets", "w_q"], "--targets: expected names of linear layers .* found w_q")])
def test_what_does_not_go_together_is_refused_in_one_line(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", *options)


def test_both_prompts_mean_the_mean_of_two_losses(tiny):
    """The LM loss behind the demonstrations is that of the answer's tokens at the end of the longer prompt."""
    model, processor, queries, icds = tiny
    torch.manual_seed(0)
    mimic = MimIC.for_model(model)
    features = encode_images(model, processor, queries + sum(icds, []), {})
    batch = collate(queries, icds, processor, TEMPLATES["toy"])
    _, one = losses(model, mimic, batch, features, parse(["--lambda-align", "0"]))
    _, both = losses(model, mimic, batch, features, parse(["--lambda-align", "0", "--ce-prompts", "both"]))
    total, n, rows = 0.0, 0, batch.teacher
    logits = model(rows.input_ids, rows.attention_mask, evaluation.gather(features, rows.samples), mimic)
    for row, answered in enumerate(batch.answer.sum(1).tolist()):
        for back in range(answered, 0, -1):
            total -= logits[row, -back - 1].log_softmax(-1)[batch.teacher.input_ids[row, -back]]
            n += 1
    torch.testing.assert_close(both, (one + total / n) / 2)


def test_lora_everywhere_trains_the_vision_tower_through_the_pictures(tiny):
    model, processor, queries, icds = tiny
    args = parse(["--method", "lora", "--scope", "all"])
    lora = ADAPTERS["lora"].for_model(model, scope="all").train()
    for B in lora.B.values():
        torch.nn.init.normal_(B, std=0.1)
    _, ce = losses(model, lora, collate(queries, icds, processor, TEMPLATES["toy"]), {}, args, processor)
    ce.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora.parameters())
    assert any("vision_model" in name for name in lora.A) and all(p.grad is None for p in model.parameters())


def test_dropout_is_for_training_alone(tiny):
    model, processor, queries, icds = tiny
    lora = ADAPTERS["lora"].for_model(model, dropout=0.5)
    for B in lora.B.values():
        torch.nn.init.normal_(B, std=0.1)
    features = encode_images(model, processor, queries, {})
    args, batch = parse(["--method", "lora"]), collate(queries, icds, processor, TEMPLATES["toy"])

    def twice():
        return [losses(model, lora, batch, features, args)[1].item() for _ in range(2)]

    assert len(set(twice())) == 2
    lora.eval()
    assert len(set(twice())) == 1


def test_the_answers_of_the_base_model_do_not_change_with_an_adapter_in_between(tiny):
    """No state is switched on or off: features of the base model are not those of a model with another vision tower."""
    model, processor, queries, _ = tiny
    lora, features = ADAPTERS["lora"].for_model(model, scope="all").eval(), {}
    for B in lora.B.values():
        torch.nn.init.normal_(B, std=0.2)
    before = answer(model, processor, "toy", queries, features=features)[0]
    with_lora = answer(model, processor, "toy", queries, features=features, shifts=lora)[0]
    assert answer(model, processor, "toy", queries, features=features)[0] == before != with_lora
    assert answer(lora.merge(model), processor, "toy", queries)[0] == with_lora
    assert answer(model, processor, "toy", queries, shifts=Shifts())[0] == before


@pytest.mark.parametrize("method", ADAPTERS)
def test_every_method_runs_on_real_pictures_and_questions(method, either_folder, shared, tmp_path):
    words = ["--dataset", "okvqa", "--model", str(either_folder), "--data", str(shared / "data"), "--out", str(tmp_path)]
    row, = train.main([*words, "--method", method, "--samples", "6", "--epochs", "1", "--limit", "2", "--num-beams", "2",
                       "--shots", "2", "--test-every-epoch"])
    assert row["method"] == method and row["n"] == 2 and row["test_best"] == row["score"] and row["score_of"] == "stemmed"
    assert list(csv.DictReader(open(tmp_path / "log.csv")))[-1]["test"]
