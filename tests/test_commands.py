"""The command lines as a researcher types them: real pictures and questions, the real tokenizer, a tiny random Idefics2."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

import eval as evaluation
import models
import train
from data import Sample, load
from experiments import layerwise
from support.files import InputError
from support.options import MOVED, read_run
from support.results import ALSO, SAME, Unfinished, read_predictions

REPOSITORY = Path(__file__).resolve().parents[1]


def run_train(dataset, folder, shared, out, *more):
    """One set of demonstrations a query and a high rate, so that a handful of steps on random weights can be seen to work."""
    return train.main(["--dataset", dataset, "--model", str(folder), "--data", str(shared / "data"), "--out", str(out),
                       "--shots", "4", "--epochs", "8", "--lr", "0.05", "--draws", "1", "--num-beams", "2", *more])


@pytest.fixture(scope="module")
def okvqa_run(either_folder, shared, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "okvqa"
    run_train("okvqa", either_folder, shared, out, "--compare", "0", "2")
    return out


def epoch_means(folder, column):
    rows = list(csv.DictReader(open(folder / "log.csv")))
    epochs = sorted({int(r["epoch"]) for r in rows})
    values = [[float(r[column]) for r in rows if int(r["epoch"]) == e] for e in epochs]
    return [sum(v) / len(v) for v in values]


def check_run(folder, dataset, split, methods):
    for column in ("loss", "align", "ce"):
        means = epoch_means(folder, column)
        assert means[-1] < means[0], (column, means)
    rows = json.loads((folder / "results.json").read_text())
    assert [(r["dataset"], r["split"], r["method"], r["shots"]) for r in rows] == [(dataset, split, *m) for m in methods]
    lines = [json.loads(x) for x in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == sum(r["n"] for r in rows) and all(isinstance(x["prediction"], str) for x in lines)
    for r in rows:
        assert 0 <= r["score"] <= 1000 and r["n"] > 0 and r["ms_per_query"] > 0 and r["prompt_tokens"] > 4
    assert rows[-1]["parameters"] == 3 * 4 * (16 + 16 + 1) and rows[-1]["train_seconds"] > 0
    args = json.loads((folder / "args.json").read_text())
    assert args["dataset"] == dataset and args["torch"] and "commit" in args
    with safe_open(folder / "mimic.safetensors", "pt") as file:
        about = file.metadata()
    assert about["method"] == "mimic" and about["dataset"] == dataset and about["z2"] == "masked"


def test_train_okvqa_lowers_the_loss_evaluates_and_writes_its_files(okvqa_run):
    check_run(okvqa_run, "okvqa", "val", [("zero-shot", 0), ("icl", 2), ("mimic", 0)])


def test_train_coco_lowers_the_loss_evaluates_and_writes_its_files(tiny_folder, shared, tmp_path):
    run_train("coco", tiny_folder, shared, tmp_path / "coco", "--samples", "8")
    check_run(tmp_path / "coco", "coco", "val", [("mimic", 0)])


def test_train_vqav2_without_val_annotations_evaluates_on_dev(tiny_folder, shared, tmp_path, capsys):
    run_train("vqav2", tiny_folder, shared, tmp_path / "vqav2", "--samples", "8")
    check_run(tmp_path / "vqav2", "vqav2", "dev", [("mimic", 0)])
    assert "no annotations" in capsys.readouterr().out
    with pytest.raises(InputError, match="expected annotations of vqav2 or dev samples, found neither"):
        run_train("vqav2", tiny_folder, shared, tmp_path / "undecided", "--dev-samples", "0")
    assert not (tmp_path / "undecided").exists()


def test_without_model_real_data_want_the_published_one(shared, tmp_path, monkeypatch):
    """Not the toy's, whose answers would be worth nothing."""
    monkeypatch.chdir(tmp_path)
    for main in train.main, evaluation.main:
        with pytest.raises(InputError, match="^idefics2-8b-base: expected a model folder"):
            main(["--dataset", "okvqa", "--data", str(shared / "data")])


def test_too_many_shots_to_compare_with_are_refused_before_the_training(tmp_path):
    words = ["--samples", "12", "--dev-samples", "2", "--limit", "2", "--out", str(tmp_path / "run")]
    for shots, message in ("13", "expected at least 13 training samples"), ("-1", "--compare: expected at least 0, found -1"):
        with pytest.raises(InputError, match=message):
            train.main([*words, "--compare", "0", shots])
    assert not (tmp_path / "run").exists()


def test_a_score_of_an_unfinished_run_says_so(tmp_path, capsys):
    for about in {"finished": "today"}, {}:
        (tmp_path / "args.json").write_text(json.dumps({"method": "mimic", **about}))
        read_run(tmp_path, ["mimic"])
        said = capsys.readouterr().err
        assert ("an unfinished run; what follows is of its best epoch so far" in said) == (not about)


def test_accumulated_batches_take_the_same_steps_as_one_large_batch(tiny_folder, shared, tmp_path):
    """Equal but for rounding where the parts are equal: 12 samples, 4 x 1 or 2 x 2 (captions of one length each count alike)."""
    for name, sizes in (("one", ("4", "1")), ("two", ("2", "2"))):
        run_train("okvqa", tiny_folder, shared, tmp_path / name, "--samples", "12", "--batch-size", sizes[0], "--accumulate",
                  sizes[1], "--epochs", "1", "--limit", "1", "--lambda-ce", "0")
    one, two = (epoch_means(tmp_path / name, "align") for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


def test_eval_answers_a_split_without_annotations_unscored(tiny_folder, shared, tmp_path, capsys):
    row = evaluation.main(["--dataset", "vqav2", "--model", str(tiny_folder), "--data", str(shared / "data"),
                           "--out", str(tmp_path)])
    assert row["score"] is None and row["n"] == 5 and "not scored" in capsys.readouterr().out


def test_batch_size_and_order_change_no_answer(either_folder, shared):
    model, processor = models.load_model(either_folder)
    queries = load("okvqa", shared / "data", "val")[:6]
    said = [evaluation.answer(model, processor, "okvqa", order, [[]] * 6, batch_size=size)
            for order, size in ((queries, 1), (queries, 4), (queries[::-1], 6))]
    assert said[0] == said[1] == said[2][::-1]


def command(*words):
    return subprocess.run([sys.executable, *map(str, words)], cwd=REPOSITORY, capture_output=True, text=True)


def test_a_users_mistake_is_one_line_and_exit_status_2(shared, tiny_folder, tmp_path):
    okvqa = ("train.py", "--dataset", "okvqa", "--out", tmp_path / "run", "--data")
    for words, said in (
            ((*okvqa, shared / "data", "--model", tiny_folder, "--shots", "20"), "20 shots"),
            (("eval.py", "--run", tmp_path), "args.json")):
        found = command(*words)
        assert found.returncode == 2 and found.stderr.startswith("error: ") and found.stderr.count("\n") == 1, found.stderr
        assert said in found.stderr and "expected" in found.stderr and "found" in found.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_is_documentation_of_two_screens(script):
    text = command(script, "--help").stdout
    assert "--dataset" in text and "default" in text and f"python {script}" in text and len(text.splitlines()) <= 100


def test_an_old_command_line_says_the_new_one_in_one_line():
    for option, new in MOVED.items():
        with pytest.raises(InputError, match=f"{option} is gone; now {new}$"):
            evaluation.main([option])
    found = command("data.py", "fetch", "okvqa")
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and "now " in found.stderr, found


@pytest.mark.parametrize("main", [train.main, evaluation.main])
def test_a_device_that_cannot_be_is_refused_before_any_work(main, tmp_path):
    with pytest.raises(InputError, match="--device gpu: expected a device of this machine, found"):
        main(["--device", "gpu", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_shots_mean_in_context_learning_and_of_a_run_demonstrations_back_in_its_prompts(tiny_folder, shared, okvqa_run, tmp_path):
    words = ["--shots", "2", "--limit", "1", "--data", str(shared / "data"), "--out", str(tmp_path)]
    rows = [evaluation.main([*words, "--dataset", "okvqa", "--model", str(tiny_folder)])]
    rows += [evaluation.main([*words, "--run", str(okvqa_run)])]
    assert [(row["method"], row["shots"]) for row in rows] == [("icl", 2), ("mimic", 2)]
    assert rows[1]["prompt_tokens"] > json.loads((okvqa_run / "results.json").read_text())[-1]["prompt_tokens"]
    with pytest.raises(InputError, match="--run: expected no --method beside it, found icl"):
        evaluation.main(["--run", str(okvqa_run), "--method", "icl"])


def test_odd_line_separators_in_a_prediction_do_not_break_the_files(tmp_path):
    for shots in (1, 2):
        row = dict.fromkeys((*SAME, *ALSO, "made_with"), "") | {"method": "icl", "shots": shots}
        begun = Unfinished(tmp_path, row, resume=False)
        begun.keep([(0, "\u2029", 9, 1.0)])
        begun.finish(row, [Sample(1, None, "a\u2028b\x85?", ["x"])], ["\u2029"], [0.0], ())
    assert [x["prediction"] for x in read_predictions(tmp_path / "predictions.jsonl")] == ["\u2029"] * 2


def test_a_layer_wise_fit_runs_on_real_pictures_and_its_run_is_evaluated_again(either_folder, shared, tmp_path):
    """Questions of different lengths, an instruction before the demonstrations, rows padded on the left."""
    rows = layerwise.main(["--dataset", "okvqa", "--model", str(either_folder), "--data", str(shared / "data"), "--shots", "2",
                           "--limit", "3", "--samples", "6", "--num-beams", "2", "--out", str(tmp_path / "fit")])
    again = evaluation.main(["--run", str(tmp_path / "fit"), "--limit", "3", "--out", str(tmp_path / "again")])
    assert again["score"] == rows[-1]["score"] and rows[-1]["train_seconds"] > 0
