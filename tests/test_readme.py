"""README.md and the pages of docs/ say what is true: names exist, links lead somewhere, commands run."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCS = ("methods", "running", "official", "idefics1", "lesson")
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in DOCS),
         "exercises/README.md", *(f"exercises/step_{i}.md" for i in range(1, 6))]
TEXT = {page: (REPOSITORY / page).read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [block for text in TEXT.values() for block in re.findall(r"```bash\n(.*?)```", text, re.S)]
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
SMALL = {"train.py": ["--limit", "2", "--samples", "12", "--dev-samples", "9", "--epochs", "1"],
         "eval.py": ["--limit", "2"], "tools.show": [],
         "experiments.layerwise": ["--limit", "2", "--samples", "9"]}


def test_two_commands_do_all_set_up():
    assert [c for c in COMMANDS if "pip" in c] == ["pip install -r requirements.txt && python train.py",
                                                   "pip install -r requirements-dev.txt && pytest -n auto"]


def test_runtime_dependencies_are_the_six():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert [re.match(r"\w+", line)[0] for line in lines] == ["torch", "pillow", "numpy", "tokenizers", "safetensors", "tqdm"]


def test_it_is_a_page_to_read():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "docs/lesson.md"])
def test_every_function_named_exists(page):
    names = set(re.findall(r"`((?:model|mimic|train|data|eval|baselines)\.\w+)`", TEXT[page]))
    for module, attribute in (name.split(".") for name in names):
        assert attribute == "py" or hasattr(importlib.import_module(module), attribute), (module, attribute)
    assert len(names) > 8


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_or_a_heading_and_every_file_named_is_there(page):
    for target in re.findall(r"\]\(([^):]+)\)", TEXT[page]):
        path, _, heading = target.partition("#")
        there = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert there.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)", there.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target
    named = re.findall(r"`((?:tests|experiments|baselines|tools|toy|metrics|support|models)/\w+\.(?:py|md|json))`", TEXT[page])
    assert [n for n in named if not (REPOSITORY / n).exists()] == []


def test_every_test_that_the_readme_links_stands_in_that_file():
    links = re.findall(r"\[`(test_\w+)`\]\((tests/\w+\.py)\)", README)
    assert len(links) >= 6
    for name, path in links:
        assert f"def {name}(" in (REPOSITORY / path).read_text(encoding="utf-8"), name


def test_every_command_of_the_pages_runs(tiny_folder, tiny_idefics1, shared, tmp_path, monkeypatch):
    """In the order of the pages, with tiny models for the large ones, the data samples for the whole, and few items."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "idefics2-8b-base").symlink_to(tiny_folder)
    (tmp_path / "idefics-9b").symlink_to(tiny_idefics1)
    (tmp_path / "data").symlink_to(shared / "data")
    (tmp_path / "checkpoints").symlink_to(REPOSITORY / "checkpoints")
    ran = 0
    for line in COMMANDS:
        words = shlex.split(line.split("&& python ")[-1].removeprefix("python ").removeprefix("-m "), comments=True)
        if words[0] in SMALL:
            few = ["--shots", "2"] if "idefics-9b" in words else []                    # not the 32 of its default
            module = importlib.import_module(words[0].removesuffix(".py"))
            module.main([*words[1:], *SMALL[words[0]], *few])
            ran += 1
    assert ran >= 7 and (tmp_path / "runs/toy/results.json").exists() and (tmp_path / "runs/okvqa/mimic.safetensors").exists()
