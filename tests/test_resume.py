"""A run that is killed, at any moment and however often, ends with the files of one that was not."""

import csv
import json
import random
import signal
import time
from pathlib import Path

import pytest

import ablate
import eval as evaluation
import resume
import train
from model import InputError

SMALL = ["--samples", "24", "--dev-samples", "4", "--limit", "20", "--eval-batch-size", "4", "--num-beams", "1"]
# LoRA has dropout, so its bits depend on random numbers; two batches a step, the last step of an epoch is a smaller one
LORA = [*SMALL, "--method", "lora", "--samples", "22", "--batch-size", "2", "--accumulate", "2", "--epochs", "4", "--limit", "4",
        "--compare", "--test-every-epoch"]


def outcome(folder):
    """All that a run has written, but for clock times → {name: content}."""
    timed = ("seconds", "started", "finished", "ms_per_query", "train_seconds", "out", "resume")

    def without(record):
        return {k: v for k, v in record.items() if k not in timed}

    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        name, text = str(path.relative_to(folder)), path.read_bytes()
        if path.suffix == ".csv":
            text = [without(row) for row in csv.DictReader(open(path))]
        elif path.name in ("args.json", "results.json"):
            content = json.loads(text)
            text = [without(r) for r in content] if isinstance(content, list) else without(content)
        elif path.parent.name == "answers":                    # named after the settings, --out among them
            name, text = name.split("_seed")[0], [without(json.loads(line)) for line in text.splitlines()]
        elif path.suffix == ".safetensors":                    # the names in its header stand in an order of chance
            length = int.from_bytes(text[:8], "little")
            text = json.loads(text[8:8 + length]), text[8 + length:]
        found[name] = text
    return found


def killed_often(command, script, words, folder, expected, least, moments):
    """Kills and resumes until it is through, and again in another folder until there were `least` kills → the kills of each."""
    kills = [0]
    while True:
        moment = moments() * 1.05 ** kills[-1]                 # a machine that has become slow gets more time, and then more
        status, errors = command(script, [*words, "--resume", "--out", folder / str(len(kills))], moment)
        assert status in (0, -9), errors
        kills[-1] += status != 0
        if status == 0:
            assert outcome(folder / str(len(kills))) == expected
            if sum(kills) >= least:
                return kills
            kills.append(0)
        assert kills[-1] < 100, "it does not get on"


def test_training_killed_at_random_moments_ends_with_the_same_bytes(command, tmp_path):
    """Adapter, log, predictions and results; dropout's random numbers and an epoch's order are those of the run without kills."""
    began, r = time.perf_counter(), random.Random(0)
    assert command("train.py", [*LORA, "--out", tmp_path / "whole"])[0] == 0
    seconds, expected = time.perf_counter() - began, outcome(tmp_path / "whole")
    assert len(expected["log.csv"]) == 4 * 6 and "state.safetensors" not in expected and not [n for n in expected if "tmp" in n]
    kills = killed_often(command, "train.py", LORA, tmp_path, expected, 20, lambda: r.uniform(0.02, 0.45 * seconds))
    print(f"training of {seconds:.1f} s: {sum(kills)} kills, each time the same {len(expected['lora.safetensors'][1])} bytes")


def test_evaluation_killed_at_random_moments_ends_with_the_same_predictions(command, tmp_path):
    words, r = [*SMALL, "--limit", "60", "--shots", "2"], random.Random(1)
    began = time.perf_counter()
    assert command("eval.py", [*words, "--out", tmp_path / "whole"])[0] == 0
    seconds, expected = time.perf_counter() - began, outcome(tmp_path / "whole")
    assert len(expected["predictions.jsonl"].splitlines()) == 60
    kills = killed_often(command, "eval.py", words, tmp_path, expected, 20, lambda: r.uniform(0.02, 0.4 * seconds))
    print(f"evaluation of {seconds:.1f} s: {sum(kills)} kills, each time the same {len(expected['predictions.jsonl'])} bytes")


def test_a_layer_wise_fit_and_the_training_behind_it_go_on_too(command, tmp_path):
    words, r = [*SMALL, "--init", "layerwise", "--samples", "8", "--epochs", "2", "--shots", "2", "--compare"], random.Random(2)
    words += ["--limit", "4", "--draws", "2"]
    began = time.perf_counter()
    assert command("train.py", [*words, "--out", tmp_path / "whole"])[0] == 0
    seconds, expected = time.perf_counter() - began, outcome(tmp_path / "whole")
    killed_often(command, "train.py", words, tmp_path, expected, 5, lambda: r.uniform(0.1, 0.6 * seconds))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(command, tmp_path, number):
    words = [*LORA, "--epochs", "2", "--compare", "--out", tmp_path / "run"]
    assert command("train.py", words, 0.0, signal=number, rows=4, save_seconds=1e9)[0] == 130
    errors = command("train.py", words)[1]
    assert errors.splitlines()[-1].startswith(f"error: {tmp_path}/run: expected no unfinished run, found one; ")
    steps = len((tmp_path / "run/log.csv").read_text().splitlines()) - 1
    assert resume.read_state(tmp_path / "run/state.safetensors")[2]["step"] == steps >= 3


def test_the_command_that_goes_on_is_the_same_with_resume(command, tmp_path):
    words = [*LORA, "--epochs", "2", "--compare", "--out", tmp_path / "a run"]
    status, errors = command("train.py", words, 0.0, signal=signal.SIGINT, rows=4)
    printed = errors.splitlines()[-1].strip()
    assert status == 130 and printed.startswith("python train.py --samples 24") and printed.endswith("/a run' --resume")
    assert command("train.py", [*words[:-2], "--resume", *words[-2:]])[0] == 0
    assert command("train.py", [*words[:-1], tmp_path / "whole"])[0] == 0
    assert outcome(tmp_path / "a run") == outcome(tmp_path / "whole")


# ---- what is refused, what is finished


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run stopped after its first epoch → its arguments."""
    words = [*SMALL, "--batch-size", "2", "--epochs", "2", "--shots", "1", "--compare", "--out", str(tmp_path / "run")]

    def save_and_stop(*arguments, **numbers):
        resume.save_state(*arguments, **numbers)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_state", save_and_stop)
        train.main(words)
    return words


def test_an_unfinished_run_is_neither_overwritten_nor_taken_for_one_of_other_arguments(interrupted, tmp_path):
    before = outcome(tmp_path / "run")
    with pytest.raises(InputError, match="expected no unfinished run, found one; .* --resume"):
        train.main(interrupted)
    for more in ([], ["--resume"]):
        with pytest.raises(InputError, match="expected no run or one of the same arguments, found other lr, seed"):
            train.main([*interrupted, "--seed", "1", "--lr", "0.1", *more])
    assert outcome(tmp_path / "run") == before


def test_a_finished_run_says_so_and_leaves_everything_as_it_is(interrupted, tmp_path, capsys):
    rows = train.main([*interrupted, "--resume"])
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    capsys.readouterr()
    assert train.main([*interrupted, "--resume"]) == rows and "run: already finished" in capsys.readouterr().out
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    train.main(interrupted)                                    # without --resume it is made again, as ever
    assert files != {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


@pytest.mark.parametrize("harm", [
    lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.write_bytes(b""),
    lambda path: (path.parent / "mimic.safetensors").rename(path)])
def test_a_state_that_is_no_state_is_named(interrupted, tmp_path, harm):
    harm(tmp_path / "run/state.safetensors")
    with pytest.raises(InputError, match="state.safetensors: expected a state to go on from.*, found"):
        train.main([*interrupted, "--resume", "--epochs", "2"])


def test_eval_takes_the_answers_that_are_there_and_without_resume_none(tmp_path, monkeypatch, capsys):
    words, batches = [*SMALL, "--out", str(tmp_path)], []
    generate = evaluation.Idefics2.generate

    def counted(self, *arguments, **options):
        batches.append(len(arguments[0]))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return generate(self, *arguments, **options)
    monkeypatch.setattr(evaluation.Idefics2, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(words)
    row = evaluation.main([*words, "--resume"])
    assert len(batches) == 4 + 2 and row["n"] == 20                       # five batches, the fourth twice
    assert evaluation.main([*words, "--resume"]) == row and len(batches) == 6
    assert "zero-shot: all 20 answers are there already" in capsys.readouterr().out
    evaluation.main([*words, "--resume", "--eval-batch-size", "5"])        # other settings: other answers
    assert len(batches) == 6 + 4
    evaluation.main(words)
    assert len(batches) == 10 + 5
    for option, value, name in ("--num-beams", "2", "num_beams"), ("--task", "3", "task"):       # what would be another result
        with pytest.raises(InputError, match=f"expected no results of zero-shot or those of the same arguments.*other {name};"):
            evaluation.main([*words, option, value])
    with pytest.raises(InputError, match="expected no results of zero-shot.*other num_beams"):        # before the training
        train.main([*SMALL, "--shots", "1", "--compare", "0", "--num-beams", "2", "--out", str(tmp_path)])
    assert not (tmp_path / "args.json").exists()
    assert len(batches) == 15 and evaluation.read_rows(tmp_path / "results.json")[0]["num_beams"] == 1


def test_a_line_that_was_being_written_is_lost_alone(tmp_path):
    words = [*SMALL, "--out", str(tmp_path)]
    row = evaluation.main(words)
    path, = (tmp_path / "answers").iterdir()
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 30, 5, 0):
        path.write_bytes(whole[:length])
        assert evaluation.main([*words, "--resume"])["score"] == row["score"]
        assert [json.loads(x)["answers"] for x in path.read_text().splitlines()] == [
            json.loads(x)["answers"] for x in whole.splitlines()]
    path.write_bytes(b"[1]\n" + whole)
    with pytest.raises(InputError, match="expected answers to go on from, found something else; delete it"):
        evaluation.main([*words, "--resume"])


def test_a_run_of_a_table_that_was_killed_goes_on(tmp_path, monkeypatch):
    saves, options = [], [*SMALL, "--batch-size", "2", "--epochs", "2", "--shots", "1"]

    def save_and_stop(*arguments, **numbers):
        resume.save_state(*arguments, **numbers)
        saves.append(numbers["step"])
        if len(saves) == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        ablate.run("toy", options, 0, 0, tmp_path / "killed")
    assert ablate.run("toy", options, 0, 0, tmp_path / "killed")["score"] is not None
    assert saves == [12, 24]
    ablate.run("toy", options, 0, 0, tmp_path / "whole")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
