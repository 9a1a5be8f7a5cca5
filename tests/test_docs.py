"""docs/lesson.md is true: its commands print what stands below them, its links and names exist, its pictures are made."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import train
from experiments import explain, layerwise
from support.files import InputError

REPOSITORY = Path(__file__).resolve().parents[1]
LESSON = (REPOSITORY / "docs/lesson.md").read_text(encoding="utf-8")
COMMANDS = [(lines[0].removeprefix("$ "), lines[1:]) for lines in
            (block.splitlines() for block in re.findall(r"```console\n(.*?)```", LESSON, re.S))]
SHORT = ["--samples", "12", "--dev-samples", "4", "--epochs", "1", "--limit", "6", "--shots", "2"]
SMALL = {"train.py": SHORT, "experiments.explain": ["--queries", "6", "--draws", "2"],       # whole runs have other numbers
         "experiments.layerwise": ["--limit", "6"]}


def plain(line, numbers):
    """A line with single spaces; numbers=False: every number as #."""
    line = " ".join(line.split())
    return line if numbers else re.sub(r"-?\d[\d.,]*", "#", line)


def missing(quoted, printed, numbers):
    """Quoted lines that are not, in this order, among the printed ones; … stands for any."""
    rest, absent = [plain(line, numbers) for line in printed.splitlines()], []
    for line in (plain(line, numbers) for line in quoted if line.strip() not in ("…", "")):
        if line in rest:
            rest = rest[rest.index(line) + 1:]
        else:
            absent.append(line)
    return absent


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A folder with the checkpoint and short runs of what the lesson asks for before it, to run commands in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(REPOSITORY / "checkpoints")
    train.main(["--method", "live", "--compare", *SHORT])
    layerwise.main([w for w in SHORT if w not in ("--epochs", "1")])
    return tmp_path


def test_every_python_command_prints_what_the_lesson_says_and_every_picture_is_made(scratch, capsys):
    """train.py and experiments.explain on few samples: there the lines have to be right, elsewhere the numbers too."""
    capsys.readouterr()
    for command, quoted in COMMANDS:
        program, script, *words = shlex.split(command.replace("python -m ", "python "))
        if program == "python":
            importlib.import_module(script.removesuffix(".py")).main([*words, *SMALL.get(script, [])])
            assert missing(quoted, capsys.readouterr().out, script not in SMALL) == [], command
    for name in "approximation", "mu", "distance":
        made, kept = (Image.open(folder / f"{name}.png") for folder in (scratch / "figures", REPOSITORY / "docs"))
        assert made.size == kept.size and made.width == 640 and len(made.convert("RGB").getcolors()) > 8, name
        assert 3_000 < (REPOSITORY / f"docs/{name}.png").stat().st_size < 60_000
    with pytest.raises(InputError, match="expected the arguments of a run .*, found: --method 'live'"):
        explain.main(["--run", "runs/toy-live"])


def test_every_test_that_the_lesson_shows_exists_and_is_in_the_files_of_its_command():
    shown = 0
    for command, quoted in COMMANDS:
        if command.startswith("pytest -v"):
            files = {path.name for pattern in command.split()[2:] for path in REPOSITORY.glob(pattern)}
            for line in quoted:
                if line != "…":
                    file, name = re.fullmatch(r"tests/(\w+\.py)::(\w+) PASSED", line).groups()
                    assert file in files and f"def {name}(" in (REPOSITORY / "tests" / file).read_text(), line
                    shown += 1
    assert shown >= 15


def test_the_exercise_command_prints_what_the_lesson_says():
    (command, quoted), = ((c, q) for c, q in COMMANDS if "--of" in c)
    files = sorted(str(p) for p in REPOSITORY.glob(command.split()[1]))
    run = subprocess.run([sys.executable, "-m", "pytest", *files, *command.split()[2:], "-p", "no:cacheprovider"], cwd=REPOSITORY,
                         capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert missing(quoted, run.stdout, True) == []
