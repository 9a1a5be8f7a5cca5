"""A run that is killed, at any moment and however often, ends with the files of one that was not."""

import csv
import json
import random
import signal
import time
from pathlib import Path

import pytest

import eval as evaluation
import model
import train
from support.files import InputError

SMALL = ["--samples", "24", "--dev-samples", "4", "--limit", "20", "--eval-batch-size", "4", "--num-beams", "1"]
# LoRA has dropout, so its bits depend on random numbers; two batches a step, the last step of an epoch is a smaller one
LORA = [*SMALL, "--method", "lora", "--samples", "22", "--batch-size", "2", "--accumulate", "2", "--epochs", "4", "--limit", "4",
        "--compare"]


def outcome(folder):
    """All that a run has written, but for clock times → {name: content}."""
    timed = ("seconds", "started", "finished", "ms_per_query", "train_seconds", "out")

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
    kills = killed_often(command, "train.py", LORA, tmp_path, expected, 6, lambda: r.uniform(0.02, 0.6 * seconds))
    print(f"training of {seconds:.1f} s: {sum(kills)} kills, each time the same {len(expected['lora.safetensors'])} bytes")


def test_evaluation_killed_at_random_moments_ends_with_the_same_predictions(command, tmp_path):
    words, r = [*SMALL, "--limit", "60", "--shots", "2"], random.Random(1)
    began = time.perf_counter()
    assert command("eval.py", [*words, "--out", tmp_path / "whole"])[0] == 0
    seconds, expected = time.perf_counter() - began, outcome(tmp_path / "whole")
    assert len(expected["predictions.jsonl"].splitlines()) == 60
    kills = killed_often(command, "eval.py", words, tmp_path, expected, 6, lambda: r.uniform(0.02, 0.4 * seconds))
    print(f"evaluation of {seconds:.1f} s: {sum(kills)} kills, each time the same {len(expected['predictions.jsonl'])} bytes")


def test_ctrl_c_ends_at_once_and_the_same_command_with_resume_goes_on(command, tmp_path):
    words = [*LORA, "--epochs", "4", "--out", tmp_path / "run"]
    status, errors = command("train.py", words, 0.0, signal=signal.SIGINT, rows=9)             # in the second epoch
    assert status == 130 and errors.splitlines()[-1] == "interrupted; a command that has --resume goes on with it", errors
    assert command("train.py", [*words[:-2], "--resume", *words[-2:]])[0] == 0
    assert command("train.py", [*words[:-1], tmp_path / "whole"])[0] == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


# ---- what is refused, what is finished


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run stopped after its first epoch → its arguments."""
    words = [*SMALL, "--batch-size", "2", "--epochs", "2", "--shots", "1", "--compare", "--out", str(tmp_path / "run")]
    save_state = train.save_state

    def save_and_stop(*arguments):
        save_state(*arguments)
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


def test_a_state_that_is_no_state_is_named(interrupted, tmp_path):
    (tmp_path / "run/mimic.safetensors").rename(tmp_path / "run/state.safetensors")
    with pytest.raises(InputError, match="state.safetensors: expected the state of this run.*, found"):
        train.main([*interrupted, "--resume", "--epochs", "2"])


@pytest.fixture
def batches(monkeypatch):
    """Sizes of the batches that are asked. One of None interrupts the next."""
    sizes, generate = [], model.Idefics2.generate

    def counted(self, **options):
        if sizes[-1:] == [None]:
            sizes.pop()
            raise KeyboardInterrupt
        sizes.append(len(options["input_ids"]))
        if len(sizes) == 3:
            sizes.append(None)
        return generate(self, **options)
    monkeypatch.setattr(model.Idefics2, "generate", counted)
    return sizes


def test_eval_takes_the_answers_that_are_there_and_without_resume_none(tmp_path, batches, capsys):
    words = [*SMALL, "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(words)
    row = evaluation.main([*words, "--resume"])
    assert batches == [4] * 5 and row["n"] == 20
    assert evaluation.main([*words, "--resume"]) == row and len(batches) == 5
    assert "zero-shot: all 20 answers are there already" in capsys.readouterr().out
    evaluation.main([*words, "--resume", "--eval-batch-size", "5"])        # other settings: other answers
    assert len(batches) == 5 + 4
    evaluation.main(words)
    assert len(batches) == 9 + 5
    for option, value, name in ("--num-beams", "2", "num_beams"), ("--task", "3", "task"):       # what would be another result
        with pytest.raises(InputError, match=f"expected no results of zero-shot or those of the same arguments.*other {name};"):
            evaluation.main([*words, option, value])
    assert len(batches) == 14 and evaluation.read_rows(tmp_path / "results.json")[0]["num_beams"] == 1


def test_a_line_that_was_being_written_is_lost_alone(tmp_path, batches):
    words, path = [*SMALL, "--out", str(tmp_path)], tmp_path / "predictions.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(words)
    whole, expected = path.read_bytes(), None
    for length in (len(whole), len(whole) - 1, len(whole) - 30, 5, 0):
        path.write_bytes(whole[:length])
        (tmp_path / "results.json").unlink(missing_ok=True)
        before = len(batches)
        row = evaluation.main([*words, "--resume"])
        assert len(batches) == before + 5 - whole[:length].count(b"\n") // 4
        expected = expected or (row["score"], path.read_bytes())
        assert (row["score"], path.read_bytes()) == expected
    path.write_bytes(b"[1]\n" + whole)
    with pytest.raises(InputError, match="predictions.jsonl: expected a prediction, a JSON object, in every line, found"):
        evaluation.main([*words, "--resume", "--limit", "19"])
