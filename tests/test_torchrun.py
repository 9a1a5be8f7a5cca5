"""Several processes take the steps and give the answers of one: gloo on this machine's CPU."""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[1]
# 7 batches an epoch, two a step: the last step leaves a process without work; 13 queries in batches of 4, 4, 4 and 1
SMALL = ["--samples", "19", "--dev-samples", "5", "--limit", "13", "--eval-batch-size", "4", "--num-beams", "2"]
TRAIN = [*SMALL, "--batch-size", "3", "--accumulate", "2", "--epochs", "2"]
VARIANTS = {"mimic": ["--shots", "2", "--compare", "0", "2"],
            "uneven shares": ["--shots", "1", "--accumulate", "3", "--compare"],
            "kl": ["--method", "live", "--shots", "1", "--compare"],
            "both prompts": ["--method", "stave", "--ce-on", "sequence", "--compare"]}


def read(folder):
    """→ log's numbers, rows of results, predictions."""
    log = [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in csv.DictReader(open(folder / "log.csv"))]
    rows = [{k: v for k, v in r.items() if k not in ("ms_per_query", "train_seconds", "made_with")}
            for r in json.loads((folder / "results.json").read_text())]
    return log, rows, (folder / "predictions.jsonl").read_text()


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_take_the_steps_of_one(command, tmp_path, name):
    """The gradient is the whole step's, whoever has which batches: losses, adapter and scores agree up to fp32 rounding."""
    words = [*TRAIN, *VARIANTS[name], "--out"]
    for n in 1, 2:
        status, errors = command("train.py", [*words, tmp_path / str(n)], processes=n)
        assert status == ([0, 0] if n == 2 else 0), errors
    (log, rows, predictions), (log2, rows2, predictions2) = read(tmp_path / "1"), read(tmp_path / "2")
    assert len(log) == len(log2) and rows == rows2 and predictions == predictions2
    for one, two in zip(log, log2, strict=True):
        assert one == pytest.approx(two, rel=2e-4), (one, two)
    path, = (p.name for p in (tmp_path / "1").glob("*.safetensors"))
    one, two = load_file(tmp_path / "1" / path), load_file(tmp_path / "2" / path)
    lr = json.loads((tmp_path / "1/args.json").read_text())["lr"]
    distance = max((one[k] - two[k]).abs().max().item() for k in one)
    print(f"{name}: {len(log)} steps of up to {lr:g}, distance of the adapters {distance:.1e}")
    assert distance < 1e-3 * lr


@pytest.mark.parametrize("n, method", [(3, ["--shots", "2"]), (2, ["--method", "rices", "--shots", "2"]),
                                       (2, ["--method", "task-vector"])])
def test_the_answers_of_several_processes_are_those_of_one_in_its_order(command, tmp_path, method, n):
    words = [*SMALL, *method, "--samples", "16", "--out"]
    for processes in 1, n:
        status, errors = command("eval.py", [*words, tmp_path / str(processes)], processes=processes)
        assert status in (0, [0] * n), errors
    assert (tmp_path / "1/predictions.jsonl").read_bytes() == (tmp_path / str(n) / "predictions.jsonl").read_bytes()
    assert len((tmp_path / "1/predictions.jsonl").read_text().splitlines()) == 13


def test_what_two_processes_began_one_finishes_and_the_other_way_round(command, tmp_path):
    words = [*TRAIN, "--shots", "1", "--compare", "--out"]
    assert command("train.py", [*words, tmp_path / "whole"])[0] == 0
    for first, then in ((2, 1), (1, 2)):
        statuses, errors = command("train.py", [*words, tmp_path / str(first)], 0.0, rows=7, processes=first)
        assert -9 in (statuses if first > 1 else [statuses]), errors
        statuses, errors = command("train.py", [*words[:-1], "--resume", "--out", tmp_path / str(first)], processes=then)
        assert statuses in (0, [0, 0]), errors
        assert read(tmp_path / str(first))[1:] == read(tmp_path / "whole")[1:]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_with_a_line(command, tmp_path, victim):
    words, began = [*TRAIN, "--shots", "1", "--compare", "--out", tmp_path / "run"], time.perf_counter()
    statuses, errors = command("train.py", words, 0.0, rows=3, processes=2, victim=victim)
    assert statuses[victim] == -9 and statuses[1 - victim] == 2 and time.perf_counter() - began < 60
    line, = errors.split("error: ")[1:]                                   # behind the progress bar of the one that died
    assert line.startswith("torchrun: expected 2 processes at work, found that one has ended") and line.count("\n") == 1, errors


def test_torchrun_itself_with_the_commands_of_the_documents(tmp_path):
    (tmp_path / "checkpoints").symlink_to(REPOSITORY / "checkpoints")
    pages = "".join(p.read_text() for p in (REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))))
    lines = re.findall(r"^    torchrun (--nproc-per-node 2 --) (\w+\.py) (.*)$", pages, re.M)
    assert [script for _, script, _ in lines] == ["train.py", "eval.py"]
    n, script, words = lines[0]
    found = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", *n.split(), REPOSITORY / script,
                            *words.split(), "--limit", "5", "--samples", "6", "--dev-samples", "2", "--epochs", "1", "--compare"],
                           cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("toy: VQA accuracy") == 1                       # one process speaks
    found, = tmp_path.glob("runs/*/results.json")
    assert [r["n"] for r in json.loads(found.read_text())] == [5]
