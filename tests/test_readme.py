"""README.md says what is true: its names exist, its links lead somewhere, its commands run."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
SMALL = {"train.py": ["--limit", "2", "--samples", "40", "--epochs", "1"], "eval.py": ["--limit", "2"], "data.py": []}


def test_two_commands_do_all_set_up():
    assert [c for c in COMMANDS if "pip" in c] == ["pip install -r requirements.txt && python train.py",
                                                   "pip install -r requirements-dev.txt && pytest"]


def test_runtime_dependencies_are_the_six():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert [re.match(r"\w+", line)[0] for line in lines] == ["torch", "pillow", "numpy", "tokenizers", "safetensors", "tqdm"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:model|mimic|train|data|eval|fit)\.\w+)`", README)) - {
    f"{m}.py" for m in ("model", "mimic", "train", "data", "eval", "fit")}))
def test_every_name_in_the_equation_table_exists(name):
    module, attribute = name.split(".")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_every_file_named_exists():
    named = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"`((?:tests/)?[\w/]+\.(?:py|md|txt|png))`", README)
    assert named and [n for n in named if not (REPOSITORY / n).exists()] == []


def test_every_command_of_the_readme_runs(tiny_folder, tiny_idefics1, shared, tmp_path, monkeypatch):
    """In the order of the page, with tiny models for the large ones, the data samples for the whole, and few items."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "idefics2-8b-base").symlink_to(tiny_folder)
    (tmp_path / "idefics-9b").symlink_to(tiny_idefics1)
    (tmp_path / "data").symlink_to(shared / "data")
    (tmp_path / "checkpoints").symlink_to(REPOSITORY / "checkpoints")
    ran = 0
    for line in COMMANDS:
        script, *words = shlex.split(line.split("&& python ")[-1].removeprefix("python "), comments=True)
        if script in SMALL:
            few = ["--shots", "2"] if "idefics-9b" in words else []                    # not the 32 of its default
            importlib.import_module(script.removesuffix(".py")).main([*words, *SMALL[script], *few])
            ran += 1
    assert ran >= 5 and (tmp_path / "runs/toy/results.json").exists() and (tmp_path / "runs/okvqa/mimic.safetensors").exists()
