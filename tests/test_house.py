"""The house: imports point downwards, lazy ones included, and whoever imports train.py loads no more than it needs."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BELOW = "data eval mimic model train support/* metrics/* models/* baselines/* toy/*"
ROOMS = {               # file → files that it may import; of two lines the first
    "support/*": "support/files support/kernels support/parallel", "metrics/*": "metrics/*", "toy/*": "", "model": "support/*",
    "mimic": "model support/*", "data": "model metrics/stem toy/* support/*", "models/__init__": "models/* model data support/*",
    "models/*": "model data support/*", "baselines/__init__": "baselines/* mimic support/*",
    "baselines/*": "baselines/task_vector mimic model data support/*", "tools/*": f"tools/* {BELOW}",
    "eval": "mimic model data metrics/* support/* baselines/__init__ models/__init__", "experiments/*": f"experiments/* {BELOW}",
    "train": "mimic model data eval support/* baselines/__init__ models/__init__"}
FILES = {str(p.relative_to(REPOSITORY).with_suffix("")): p for room in ROOMS for p in REPOSITORY.glob(f"{room}.py")}


def imported(path):
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
    found = {f"{getattr(n, 'module', '')}.{a.name}".lstrip(".") for n in nodes for a in n.names}
    found |= {getattr(n, "module", None) for n in nodes}
    return {file for file in FILES if file.removesuffix("/__init__").replace("/", ".") in found}


def test_imports_point_downwards_and_five_files_stand_at_the_root():
    for file, path in FILES.items():
        may = next(rooms for room, rooms in ROOMS.items() if fnmatch(file, room)).split()
        assert all(any(fnmatch(other, room) for room in may) for other in imported(path)), (file, imported(path))
    TopologicalSorter({file: imported(path) for file, path in FILES.items()}).prepare()      # raises for a circle
    assert sorted(p.stem for p in REPOSITORY.glob("*.py")) == BELOW.split()[:5]


def test_train_loads_a_dozen_of_our_modules_and_no_method_model_or_metric_that_nobody_asked_for():
    code = "import sys, train; print(*(m.__file__ for m in [*sys.modules.values()] if getattr(m, '__file__', None)))"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True).split()
    inside = [p.removeprefix(f"{REPOSITORY}/") for p in loaded if p.startswith(f"{REPOSITORY}/") and "site-packages" not in p]
    ours = [p for p in inside if "__init__" not in p and p != "train.py"]
    assert len(ours) <= 12 and not [p for p in ours if p.startswith(("baselines/", "models/", "metrics/ptb"))], ours
