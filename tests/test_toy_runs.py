"""What a trained model has to show, on the tiny checkpoint: short runs of the commands on rules it has never seen."""

import json
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from experiments import ablate, bench, layerwise, table
from support.files import InputError

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
    (["--method", "live"], "found --method"), (["--official"], "--official: expected the paper's MimIC")])
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


def test_the_table_is_written_and_not_made_twice_and_says_why_a_method_has_no_score(tmp_path, monkeypatch):
    """Four rows, one seed, few samples: the others are made alike."""
    monkeypatch.setattr(table, "METHODS", {"zero-shot": "eval", "MimIC": "train --epochs 1 --shots 2",
                                           "fit": "fit --shots 2 --draws 1",
                                           "Function Vector": "eval --method function-vector --shots 20"})
    words = ["--seeds", "0", "--workers", "1", "--out", str(tmp_path), "--samples", "12", "--limit", "10", "--dev-samples", "4"]
    rows = table.main(words)
    assert [(r["method"], r["parameters"]) for r in rows[:3]] == [("zero-shot", 0), ("MimIC", 1584), ("fit", 1584)]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2].startswith(f"| zero-shot | 0 | {rows[0]['vqa_accuracy']:.1f} ± 0.0 | ") and len(lines) == 9
    assert lines[5].startswith("| Function Vector | – | – |")
    assert lines[7].startswith("Function Vector: expected at least 20 training samples")
    done = [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("results.json"))]
    assert table.main(words) == rows
    assert len(done) == 6 and done == [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("results.json"))]
    with pytest.raises(InputError, match="expected options that --help names, found --shots"):
        table.main([*words, "--shots", "5"])


def test_ablate_draws_the_curves_of_its_table(tmp_path, monkeypatch):
    for name, value in ("N", (6, 8)), ("CURVES", {"fit": ""}):
        monkeypatch.setattr(ablate, name, value)
    monkeypatch.setitem(ablate.GROUPS, "samples", {"8-shot ICL": "eval --shots 8", "fit, 6": "fit", "fit, 8": "eval"})
    ablate.main(["samples", "--task", "0", "--seed", "0", "--samples", "12", "--limit", "5", "--dev-samples", "2",
                 "--out", str(tmp_path), "--figure", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 5000 and (tmp_path / "samples/table.md").exists()


def test_bench_measures_steps_answers_and_latency(tmp_path):
    """The peer, transformers around the same tensors, says the same answers, and its step moves the same adapter."""
    rows = bench.main(["--size", "toy", "--repeats", "0", "--out", str(tmp_path / "bench.json")])
    assert json.loads((tmp_path / "bench.json").read_text()) == rows
    assert {r["what"] for r in rows} == {"train_step", "train_step_shared", "generate", "encode", "mimic_prefill", "mimic_decode",
                                         "live_prefill", "live_decode"}
    for r in rows:
        assert r["ours_s"] > 0 and r["ratio"] == pytest.approx(r["peer_s"] / r["ours_s"]) and r["device"] == bench.DEVICE.type
    assert all(f"{r['batch']} of {r['batch']} answers equal" in r["about"] for r in rows if r["what"] == "generate")


def test_the_official_step_of_the_bench_is_the_official_step():
    """transformers with hooks and a second q·k, on random weights, makes the gradients that --official makes here."""
    model = bench.random_model(bench.TOY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.ndim > 1 else None
    batch, made = bench.random_batch(model.config, 2, shots=2), []
    images = [torch.randn(3, 40, 40) for _ in range(6)]
    features = bench.encoded(model, images)
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
            step.optimiser = bench.SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
            step(batch, images)
        made.append([p.grad for p in mimic.parameters()])
    for ours, peer in zip(*made, strict=True):
        torch.testing.assert_close(ours, peer, rtol=1e-3, atol=1e-5)
