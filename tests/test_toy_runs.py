"""What a trained model has to show, on the tiny checkpoint: short runs of the commands on rules it has never seen."""

import json
from pathlib import Path

import pytest
import torch

import ablate
import bench
import eval as evaluation
import train
from model import InputError, Linear

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def run(out, *options):
    return train.main(["--limit", "100", "--out", str(out), "--eval-batch-size", "50", *options])


def test_mimic_trained_for_half_a_minute_beats_zero_shot_and_eight_demonstrations(tmp_path):
    zero, icl, mimic = run(tmp_path, "--samples", "200", "--compare", "0", "8", "--dev-samples", "50")
    assert zero["score"] <= 20 < 75 <= icl["score"] <= mimic["score"] and mimic["train_seconds"] < 120
    assert (mimic["prompt_tokens"], mimic["shots"], mimic["parameters"]) == (zero["prompt_tokens"], 0, 1584)


def test_fifty_samples_fitted_layer_by_layer_do_as_well_as_eight_demonstrations(tmp_path):
    fitted, = run(tmp_path, "--fit", "layerwise", "--samples", "50", "--compare")
    assert fitted["score"] >= 85
    assert not (tmp_path / "fit.safetensors").exists() and (tmp_path / "mimic.safetensors").exists()


def test_a_constant_shift_fitted_alike_does_not(tmp_path):
    constant, = run(tmp_path, "--fit", "layerwise", "--samples", "50", "--mu", "one", "--compare")
    assert constant["score"] <= 50 and constant["parameters"] == 768


def test_training_goes_on_from_the_layer_wise_fit(tmp_path):
    polished, = run(tmp_path, "--init", "layerwise", "--samples", "40", "--epochs", "1", "--compare")
    random, = run(tmp_path / "random", "--samples", "40", "--epochs", "1", "--compare")
    assert polished["score"] > random["score"] + 30


def test_captions_too(tmp_path):
    zero, fitted = run(tmp_path, "--dataset", "toy-caption", "--fit", "layerwise", "--samples", "40", "--compare", "0")
    assert fitted["metric"] == "cider" and fitted["score"] > 900 > 200 > zero["score"]


@pytest.mark.parametrize("words", [["--method", "live"], ["--official"], ["--shots", "0"]])
def test_a_layer_wise_fit_of_anything_else_is_refused(words, tmp_path):
    with pytest.raises(InputError, match="a layer-wise fit: expected"):
        run(tmp_path, "--fit", "layerwise", *words)


def test_ablate_runs_what_is_missing_prints_its_table_and_draws_its_curves(tmp_path, capsys):
    words = ["samples", "--only", "layer-wise fit, 20", "--tasks", "0", "--seeds", "0", "--workers", "1", "--out", str(tmp_path)]
    ablate.main([*words, "--figure", str(tmp_path / "curves.png")])
    out = tmp_path / "toy/samples/layer-wise-fit-20/task0-seed0"
    score = json.loads((out / "results.json").read_text())[0]["score"]
    before = (out / "results.json").stat().st_mtime_ns
    assert f"| layer-wise fit, 20 | {score:.1f} | 0.0 | {score:.1f} |" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 5000
    ablate.main(words)
    assert (out / "results.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="--only: expected rows of main"):
        ablate.main(["main", "--only", "nothing"])


def test_the_table_of_all_methods_is_written_and_not_made_twice(tmp_path, monkeypatch, capsys):
    """Two methods, one seed, few samples: the rows of the others are made alike."""
    small = ["--samples", "12", "--limit", "10", "--dev-samples", "4"]
    monkeypatch.setitem(ablate.GROUPS, "methods", {"zero-shot": ["eval", *small],
                                                   "MimIC": [*small, "--epochs", "1", "--shots", "2", "--test-every-epoch"]})
    rows = ablate.compare(tmp_path, seeds=[0], workers=1)
    assert [r["method"] for r in rows] == ["zero-shot", "MimIC"] and [r["parameters"] for r in rows] == [0, 1584]
    assert json.loads((tmp_path / "table.json").read_text()) == rows
    assert (tmp_path / "table.md").read_text().splitlines()[2].startswith("| zero-shot | 0 | ")
    done = [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("results.json"))]
    ablate.compare(tmp_path, seeds=[0], workers=1)
    assert len(done) == 4 and done == [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("results.json"))]
    with pytest.raises(InputError, match="--table: expected no option of one method beside it, found --shots"):
        evaluation.main(["--table", "--shots", "5"])


def test_bench_measures_the_fit_beside_training(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ceilings", lambda *_: (1e11, 1e10))
    out = tmp_path / "bench.json"
    row, = bench.main(["--size", "toy", "--only", "fit", "--repeats", "1", "--samples", "8", "--out", str(out)])
    assert json.loads(out.read_text()) == [row] and row["what"] == "fit_layerwise"
    assert row["ours_s"] > 0 and row["peer_s"] > 0 and row["inference_peak_gib"] > 0


def test_bench_measures_steps_answers_latency_and_loading_beside_transformers(tmp_path):
    """The peer is around the same tensors: it says the same answers, and its step moves the same adapter."""
    rows = bench.main(["--size", "toy", "--only", "train", "generate", "latency", "load", "--repeats", "1",
                       "--out", str(tmp_path / "bench.json")])
    assert json.loads((tmp_path / "bench.json").read_text()) == rows
    assert {r["what"] for r in rows} >= {"train_step", "train_step_shared", "generate", "encode", "mimic_prefill", "mimic_decode",
                                         "live_prefill", "live_decode", "mimic_prefill_8", "mimic_prefill_32", "load",
                                         "okvqa_run"}
    for r in rows:
        assert r["ours_s"] > 0 and r["ratio"] == pytest.approx(r["peer_s"] / r["ours_s"]) and r["device"] == "cpu"
    run, step, encode, answers = (next(r for r in reversed(rows) if r["what"] == what)
                                  for what in ("okvqa_run", "train_step", "encode", "generate"))
    assert answers["beams"] == 3 and answers["batch"] == 16
    assert run["ours_s"] == pytest.approx(5000 * step["ours_s"] / 4 + 5046 * (encode["ours_s"] / 9 + answers["ours_s"] / 16))
    assert all(f"{r['batch']} of {r['batch']} answers equal" in r["about"] for r in rows if r["what"] == "generate")


def test_bench_counts_the_flops_of_products_by_onednn():
    linear, found = Linear(512, 300), []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), bench.FlopCounterMode(display=False, custom_mapping=bench.FLOPS) as counter:
            linear(torch.randn(2, 7, 512))
        found.append(counter.get_total_flops())
    assert found == [2 * 14 * 512 * 300] * 2


def test_bench_takes_the_shape_of_a_folder_of_either_model(either_folder, monkeypatch):
    for name, value in ("SIZES", dict(bench.SIZES)), ("COCO_SIZES", ((378, 378),)), ("ceilings", lambda *_: (1e11, 1e10)):
        monkeypatch.setattr(bench, name, value)
    rows = bench.main(["--model", str(either_folder), "--only", "train", "--repeats", "1", "--batch-size", "1"])
    assert [(r["what"], r["size"]) for r in rows] == [(what, either_folder.name) for what in ("train_step", "train_step_shared")]
    assert all(r["ours_s"] > 0 and (r["peer_s"] is None) == ("idefics1" in either_folder.name) for r in rows)


def test_the_official_step_of_the_bench_is_the_official_step():
    """transformers with hooks and a second q·k, on random weights, makes the gradients that --official makes here."""
    model = bench.random_model("toy", "cpu", torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.ndim > 1 else None
    batch, args, made = bench.random_batch(model.config, 6, 2, shots=2), train.parse(["--official"]), []
    images = [torch.randn(3, 40, 40) for _ in range(6)]
    features = dict(enumerate(bench.encoded(model, images)))
    for side in "ours", "peer":
        torch.manual_seed(1)
        mimic = bench.MimIC.for_model(model, z2="unmasked")
        torch.nn.init.normal_(mimic.vector)
        if side == "ours":
            batch.align[:, 0] = True
            align, ce = train.losses(model, mimic, batch, features, args)
            (align + 0.5 * ce).backward()
            torch.nn.utils.clip_grad_norm_(mimic.parameters(), 1.0)
        else:
            step = bench.OfficialStep(model, mimic)
            step.optimiser = bench.SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
            step(batch, images)
        made.append([p.grad for p in mimic.parameters()])
    for ours, peer in zip(*made, strict=True):
        torch.testing.assert_close(ours, peer, rtol=1e-3, atol=1e-5)
