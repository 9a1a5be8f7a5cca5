"""The house: imports point downwards, lazy ones included, and whoever imports train.py loads no more than it needs."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FIVE = ["data", "eval", "mimic", "model", "train"]
BY_NAME = ["baselines/__init__", "models/__init__"]           # which look a method or a model up when somebody asks for it
ROOMS = {                                                     # file → files that it may import; the first line that fits counts
    "support/*": ["support/files", "support/parallel"], "metrics/*": ["metrics/*"], "toy/*": [],
    "model": ["support/*"], "mimic": ["model", "support/*"], "data": ["model", "metrics/stem", "toy/*", "support/*"],
    "models/__init__": ["models/*", "model", "data", "support/*"], "models/*": ["model", "data", "support/*"],
    "baselines/__init__": ["baselines/*", "mimic", "support/*"], "baselines/*": ["mimic", "model", "data", "support/*"],
    "eval": ["mimic", "model", "data", "metrics/*", "support/*", *BY_NAME],
    "train": ["mimic", "model", "data", "eval", "support/*", *BY_NAME],
    "tools/*": ["tools/*", *FIVE, "support/*", "metrics/*", "models/*", "baselines/*", "toy/*"],
    "experiments/*": ["experiments/*", "tools/*", *FIVE, "support/*", "metrics/*", "models/*", "baselines/*", "toy/*"]}
FILES = {str(p.relative_to(REPOSITORY).with_suffix("")): p for room in ROOMS for p in REPOSITORY.glob(f"{room}.py")}


def imported(path):
    """Our files that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    found = {name.replace(".", "/") for name in names}
    return {file for file in FILES if file.removesuffix("/__init__") in found}


def test_imports_point_downwards():
    for file, path in FILES.items():
        may = next(rooms for room, rooms in ROOMS.items() if fnmatch(file, room))
        wrong = [other for other in imported(path) if not any(fnmatch(other, room) for room in may)]
        assert not wrong, f"{file} imports {wrong}"
    TopologicalSorter({file: imported(path) - {file} for file, path in FILES.items()}).prepare()      # raises for a circle


def test_five_files_stand_at_the_root():
    assert sorted(p.stem for p in REPOSITORY.glob("*.py")) == FIVE


def test_importing_train_loads_a_dozen_of_our_modules_and_no_method_model_or_metric_that_nobody_asked_for():
    code = "import sys, train; print(*(n for n, m in sys.modules.items() if (getattr(m, '__file__', 0) or '').startswith(sys.argv[1])))"
    loaded = subprocess.run([sys.executable, "-c", code, str(REPOSITORY)], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    ours = [n for n in loaded.stdout.split() if not (REPOSITORY / n.replace(".", "/") / "__init__.py").exists()]
    assert len(ours) <= 12 and not [n for n in ours if n.startswith(("baselines.", "models.idefics1", "metrics.ptb"))], ours
