"""Every trained method through the same two commands, on a few samples of the toy world; what the training step does for each."""

import csv
import json

import pytest
import torch

import baselines
import eval as evaluation
import models
import train
from data import TEMPLATES, collate, draw, load
from eval import answer
from model import Idefics2, Shifts
from models.idefics1 import Idefics1
from train import losses, parse

ADAPTERS = baselines.adapters()


def run(out, *options):
    return train.main(["--samples", "12", "--dev-samples", "4", "--limit", "12", "--epochs", "2", "--compare", "0",
                       "--out", str(out), *options])


def of_method(name, *options):
    """The arguments of a training with that method."""
    args, _ = parse(["--method", name, *options])
    return args


@pytest.fixture(scope="module")
def tiny():
    """The toy world's model and processor, four queries with two demonstrations each."""
    samples = load("toy", "data", "train", 0)[:40]
    return *models.load_model("checkpoints/tiny"), samples[:4], draw(samples, samples[:4], 2, 0)


def random_lora(model, **options):
    """One that does something already."""
    lora = ADAPTERS["lora"].for_model(model, **options).train()
    for B in lora.B.values():
        torch.nn.init.normal_(B, std=0.1)
    return lora


def check_again(folder, rows):
    """eval.py of the run gives its last row again, and the same answers."""
    again = evaluation.main(["--run", str(folder), "--limit", "12", "--out", str(folder / "again")])
    same = ("method", "score", "n", "parameters", "prompt_tokens", "seed")
    assert {k: again[k] for k in same} == {k: rows[-1][k] for k in same}
    said = [[json.loads(x) for x in (f / "predictions.jsonl").read_text().splitlines()] for f in (folder, folder / "again")]
    assert [x["prediction"] for x in said[0] if x["method"] == again["method"]] == [x["prediction"] for x in said[1]]


@pytest.mark.parametrize("options", [*ADAPTERS, "live --official", "lora --lambda-align 1 --targets o_proj --rank 1"])
def test_a_run_trains_and_eval_of_it_scores_the_same(options, tmp_path):
    rows = run(tmp_path, "--method", *options.split())
    method = rows[-1]["method"]
    assert method in ADAPTERS and rows[0]["method"] == "zero-shot" and rows[0]["prompt_tokens"] == 9
    assert rows[-1]["prompt_tokens"] == 9 + 20 * (method == "prompt-tuning")        # the zero-shot prompt is untouched
    log = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert len(log) == 6 and all(float(r["grad_norm"]) > 0 for r in log)
    check_again(tmp_path, rows)


def test_the_model_says_how_many_demonstrations_and_epochs_are_the_papers(tiny_idefics1):
    assert of_method("mimic", "--model", str(tiny_idefics1)).shots == 32 and of_method("mimic").shots == 8
    assert of_method("stave", "--model", str(tiny_idefics1)).shots == 1
    assert (Idefics1.epochs, Idefics2.epochs) == (10, 5)


def test_without_a_teacher_nobody_reads_demonstrations():
    for method, kind in ADAPTERS.items():
        args = of_method(method)
        defaults = kind.defaults
        assert (args.lambda_align, args.lambda_ce) == (defaults.get("lambda_align", 0), defaults["lambda_ce"])
        assert args.lr == kind.toy_lr and args.shots == {"mimic": 8, "live": 8, "stave": 1}.get(method, 0)
    assert of_method("lora", "--dataset", "okvqa", "--model", "checkpoints/tiny").lr == 5e-4
    assert of_method("mimic", "--lambda-align", "0").shots == 0 and of_method("lora", "--lambda-align", "1").shots == 8


def test_lora_everywhere_trains_the_vision_tower_through_the_pictures(tiny):
    model, processor, queries, icds = tiny
    lora = random_lora(model, scope="all")
    losses(model, lora, collate(queries, icds, processor, TEMPLATES["toy"]), {}, lambda_align=0)[1].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora.parameters())
    assert any("vision_model" in name for name in lora.A) and all(p.grad is None for p in model.parameters())


def test_the_answers_of_the_base_model_do_not_change_with_an_adapter_in_between(tiny):
    """No state is switched on or off: features of the base model are not those of a model with another vision tower."""
    model, processor, queries, _ = tiny
    lora, features = random_lora(model, scope="all").eval(), {}

    def said(model, features, shifts=None):
        return answer(model, processor, "toy", queries, [[]] * 4, shifts, features)

    before = said(model, features)
    with_lora = said(model, features, lora)
    assert said(model, features) == before != with_lora
    assert said(lora.student(model), {}) == with_lora
    assert said(model, features, Shifts()) == before


@pytest.mark.parametrize("method", ADAPTERS)
def test_every_method_runs_on_real_pictures_and_questions(method, tiny_idefics1, shared, tmp_path):
    words = ["--dataset", "okvqa", "--model", str(tiny_idefics1), "--data", str(shared / "data"), "--out", str(tmp_path)]
    row, = train.main([*words, "--method", method, "--samples", "6", "--epochs", "1", "--limit", "2", "--num-beams", "2",
                       "--shots", "2"])
    assert row["method"] == method and row["n"] == 2 and row["score_of"] == "stemmed"
    assert list(csv.DictReader(open(tmp_path / "log.csv")))[-1]["dev"]
