"""What a trained model has to show, on the tiny checkpoint: short runs of the commands on rules it has never seen."""

import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import train
from data import TEMPLATES, collate, encode_images
from experiments import ablate, bench, layerwise, table
from model import Config, PerceiverConfig, TextConfig, VisionConfig
from support.files import InputError
from support.results import read_rows

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def run(out, *options, main=train.main):
    return main(["--limit", "100", "--out", str(out), "--eval-batch-size", "50", *options])


def test_mimic_trained_for_half_a_minute_beats_zero_shot_and_eight_demonstrations(tmp_path):
    zero, icl, mimic = run(tmp_path, "--samples", "200", "--compare", "0", "8", "--dev-samples", "20")
    assert zero["score"] <= 20 < 75 <= icl["score"] <= mimic["score"] and mimic["train_seconds"] < 120
    assert (mimic["prompt_tokens"], mimic["shots"], mimic["parameters"]) == (zero["prompt_tokens"], 0, 1584)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The folder of a layer-wise fit on fifty samples, and its row."""
    folder = tmp_path_factory.mktemp("fit")
    return folder, *run(folder, "--samples", "50", main=layerwise.main)


def test_fifty_samples_fitted_layer_by_layer_do_as_well_as_eight_demonstrations(fitted):
    folder, row = fitted
    assert row["score"] >= 85 and json.loads((folder / "args.json").read_text())["finished"]


def test_a_constant_shift_fitted_alike_does_not(tmp_path):
    constant, = run(tmp_path, "--samples", "50", "--mu", "one", "--draws", "2", main=layerwise.main)
    assert constant["score"] <= 50 and constant["parameters"] == 768


def test_training_goes_on_from_the_layer_wise_fit(fitted, tmp_path):
    words = ["--samples", "20", "--dev-samples", "20", "--epochs", "1", "--compare"]
    polished, = run(tmp_path, "--init", str(fitted[0]), *words)
    random, = run(tmp_path / "random", *words)
    assert polished["score"] > random["score"] + 30


def test_captions_too(tmp_path):
    row, = run(tmp_path, "--dataset", "toy-caption", "--samples", "20", main=layerwise.main)
    assert row["metric"] == "cider" and row["score"] > 900


@pytest.mark.parametrize("words, message", [
    (["--method", "live"], "found --method"), (["--official"], "--official: a fit needs the paper's MimIC")])
def test_a_layer_wise_fit_of_anything_else_is_refused(words, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(tmp_path, *words, main=layerwise.main)


def test_a_fit_that_was_interrupted_is_made_again_and_a_finished_one_is_not(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    words = ["--samples", "8", "--shots", "2", "--draws", "1", "--resume"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layerwise, "fit_layer", interrupted)
        run(tmp_path, *words, main=layerwise.main)
    rows = run(tmp_path, *words, main=layerwise.main)
    monkeypatch.setattr(layerwise, "fit", None)                  # nobody calls it
    assert run(tmp_path, *words, main=layerwise.main) == rows


def test_every_row_of_the_tables_is_a_command_that_is_understood(monkeypatch):
    monkeypatch.setattr(layerwise, "choose_samples", lambda args: {}["understood"])
    parsers = {"train": train.parse, "eval": evaluation.parse,
               "fit": lambda words: pytest.raises(KeyError, layerwise.main, words)}
    for rows in (table.METHODS, *ablate.GROUPS.values()):
        for name, *words in map(str.split, rows.values()):
            parsers[name](words)


def test_the_table_is_written_and_not_made_twice(tmp_path, monkeypatch):
    """Three rows, one seed, few samples: the others are made alike."""
    monkeypatch.setattr(table, "METHODS", {"zero-shot": "eval", "MimIC": "train --epochs 1 --shots 2", "fit": "fit --shots 2"})
    words = ["--seeds", "0", "--out", str(tmp_path), "--samples", "12", "--limit", "10", "--dev-samples", "4"]
    rows = table.main(words)
    assert [row[:2] for row in rows[2:]] == [["zero-shot", "0"], ["MimIC", "1,584"], ["fit", "1,584"]]
    lines = (tmp_path / "table.md").read_text().splitlines()
    accuracy = read_rows(tmp_path / "toy/zero-shot/task0-seed0/results.json")[0]["score"]
    assert lines[2].startswith(f"| zero-shot | 0 | {accuracy:.1f} ± 0.0 | ") and len(lines) == 5
    done = [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("results.json"))]
    assert table.main(words) == rows
    assert len(done) == 6 and done == [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("results.json"))]
    with pytest.raises(InputError, match="expected options that --help names, found --shots"):
        table.main([*words, "--shots", "5"])


def test_a_cell_is_the_mean_over_tasks_and_seeds_and_a_row_without_a_score_has_its_reason(tmp_path, monkeypatch):
    rows = {"8-shot ICL": "eval --shots 8", "fit": "fit", "none": "train --method hificl --official"}
    monkeypatch.setitem(ablate.GROUPS, "samples", rows)
    table = ablate.main(["samples", "--tasks", "0", "1", "--seeds", "0", "1", "--samples", "12", "--limit", "5", "--dev-samples",
                         "2", "--out", str(tmp_path)])
    scores = [read_rows(p)[0]["score"] for p in tmp_path.glob("samples/toy/8-shot-ICL/*/results.json")]
    assert len(scores) == 4
    assert table[2][2] == f"{statistics.fmean(scores):.1f} ± {statistics.pstdev(scores):.1f}"
    assert table[4] == ["none", "–", "–", "–", "–", "–"]
    assert (tmp_path / "samples/table.md").read_text().splitlines()[-1].startswith("none: --official: expected a method")


@pytest.fixture(scope="module")
def small():
    """A tiny model of random weights, for the bench."""
    return Config(VisionConfig(96, 192, 3, 4, 40, 8), PerceiverConfig(4, 1, 4, 32, 2),
                  TextConfig(128, 352, 6, 8, 4, vocab_size=130))


def test_bench_measures_steps_answers_and_latency(small, monkeypatch, shared, capsys):
    monkeypatch.setitem(bench.SIZES, "mid", (small, torch.float32))
    bench.main(["--repeats", "1", "--pictures", str(shared / "data")])
    lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["5 steps", "pictures", *(f"10 tokens, beams: {n}" for n in (1, 3, 1, 3)),
                                           *(f"{n} tokens, MimIC" for n in (1, 10, 1, 10, 1, 10))]
    for _, _, ours, peer, ratio in lines:
        assert float(ours) > 0 and float(ratio) == pytest.approx(float(peer) / float(ours), rel=0.05, abs=0.01)
    with pytest.raises(InputError, match="--pictures .*: expected JPEGs, found none"):
        bench.main(["--pictures", str(REPOSITORY / "tests")])


def test_the_peer_of_the_bench_says_the_same_answers(small):
    """transformers around the same tensors."""
    generate = list(bench.bench_generate(*bench.random_model(small), None))[1:]
    assert [batch for _, batch, *_ in generate] == [1, 1, 16, 16]
    for _, _, ours, peer in generate:
        assert torch.equal(ours(), peer()[:, -10:])


def test_the_official_step_of_the_bench_is_the_official_step(small):
    """transformers with hooks and a second q·k, on random weights, makes the gradients that --official makes here."""
    model, processor = bench.random_model(small)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.ndim > 1 else None
    samples, made = bench.some_samples(None, 6), []
    batch = collate(samples[:2], [samples[2:4], samples[4:]], processor, TEMPLATES["toy"])
    features = encode_images(model, processor, samples, {})
    for side in "ours", "peer":
        torch.manual_seed(1)
        mimic = bench.MimIC.for_model(model, z2="unmasked")
        torch.nn.init.normal_(mimic.vector)
        if side == "ours":
            align, ce = train.losses(model, mimic, batch, features, align_on="ffn", align_norm=False, ce_on="sequence")
            (align + 0.5 * ce).backward()
            torch.nn.utils.clip_grad_norm_(mimic.parameters(), 1.0)
        else:
            step = bench.OfficialStep(model, mimic)
            step.optimiser = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
            step(batch, *(bench.pixels(processor, rows.samples, 2) for rows in (batch.teacher, batch.student)))
        made.append([p.grad for p in mimic.parameters()])
    for ours, peer in zip(*made, strict=True):
        torch.testing.assert_close(ours, peer, rtol=1e-3, atol=1e-5)
