"""Exercises: a student's functions in the place of ours, and an equality whose failure names the usual mistake.

    pytest tests/test_[1-5]* --of exercises

Each step of the derivation has functions of its own. While its test file runs, they are the student's; all others are ours, so
that a mistake stays in its own step, and steps can be done in any order.
"""

import functools
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

STEPS = {
    1: ("model.attention",),
    2: ("mimic.mixing_weight", "mimic.icl_attention"),
    3: ("mimic.MimIC.f", "mimic.MimIC.mu", "mimic.MimIC.after_attention"),
    4: ("mimic.align_loss",),
    5: ("layerwise.start_f", "layerwise.best_v", "layerwise.unexplained"),
}
HOMES = {"layerwise": "experiments.layerwise"}        # our module, where it is not at the root


class Now:
    step = None                      # of the test that runs


def step_of(path):
    """The number in a test file's name, or None: tests/test_3_mimic.py → 3."""
    found = re.fullmatch(r"test_(\d)_\w+\.py", Path(path).name)
    return int(found[1]) if found else None


def either(step, ours, theirs):
    """The student's function in the tests of its own step, ours everywhere else."""
    @functools.wraps(ours)
    def chosen(*args, **kwargs):
        return (theirs if Now.step == step else ours)(*args, **kwargs)
    return chosen


def path_of(folder, room):
    """mimic.py of a folder; layerwise.py may stand where ours does."""
    plain, ours = (Path(folder) / f"{name.replace('.', '/')}.py" for name in (room, HOMES.get(room, room)))
    return ours if ours.exists() else plain


def read_all(folder):
    """→ {name in STEPS: the student's function}, and the student's modules {room: module}.

    Raises pytest.UsageError, one line, for a folder, a file or a function that is missing, and for a file that is no Python."""
    functions, modules = {}, {}
    for room in sorted({name.split(".")[0] for names in STEPS.values() for name in names}):
        path = path_of(folder, room)
        spec = importlib.util.spec_from_file_location(f"of_{room}", path)
        modules[room] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(modules[room])
        except FileNotFoundError:
            raise pytest.UsageError(f"--of {folder}: expected {path}, found nothing") from None
        except Exception as e:                                                          # it is not our file: anything can happen
            raise pytest.UsageError(f"--of {folder}: expected {path} to be imported, found {type(e).__name__}: {e}") from None
    for name in (name for names in STEPS.values() for name in names):
        module = modules[name.split(".")[0]]
        holder, last = holder_of(module, name)
        functions[name] = getattr(holder, last, None)
        if not callable(functions[name]):
            raise pytest.UsageError(f"--of {folder}: expected {name.split('.', 1)[1]} in {module.__file__}, found none")
    return functions, modules


def holder_of(module, name):
    """`mimic.MimIC.f` in that module → the class MimIC, None if there is none, and "f"; `mimic.align_loss` → the module."""
    _, *classes, last = name.split(".")
    return (getattr(module, classes[0], None) if classes else module), last


def put_in_place(folder):
    """Every function of STEPS, in our modules and in the student's own, becomes `either`. Before the tests import them."""
    functions, modules = read_all(folder)
    for step, names in STEPS.items():
        for name in names:
            room = name.split(".")[0]
            home = importlib.import_module(HOMES.get(room, room))
            (ours, last), (theirs, _) = (holder_of(m, name) for m in (home, modules[room]))
            chosen = either(step, getattr(ours, last), functions[name])
            setattr(ours, last, chosen)
            setattr(theirs, last, chosen)


def same(found, expected, mistakes=None, atol=1e-12):
    """Fails unless the two are equal within atol (float64 has 16 digits; sums of some ten terms).

    found: tensor; expected: tensor or nested lists. mistakes {what is usually done wrong: function that computes it}: if one of
    them gives just what was found, the message says which."""
    __tracebackhide__ = True

    def equal(a, b):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol, equal_nan=True)

    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    assert not expected.isnan().any()
    if equal(found, expected):
        return
    if found.shape != expected.shape:
        lines = [f"expected a tensor of shape {tuple(expected.shape)}, found {tuple(found.shape)}"]
    else:
        difference = (found - expected).abs().nan_to_num(torch.inf, torch.inf).masked_fill(found == expected, 0)
        at = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        lines = [f"expected {expected[at]:.6f}, found {found[at]:.6f}" + (f" at {list(at)} of {list(found.shape)}" if at else "")]
    for what, wrong in (mistakes or {}).items():
        if equal(found, torch.as_tensor(wrong(), dtype=torch.float64).detach()):
            lines.append(f"the usual mistake: {what}")
    raise AssertionError("\n".join(lines))
