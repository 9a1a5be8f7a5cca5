"""exercises/: blank files fail, right ones pass, one right step turns its own tests green, and wrong formulas are named."""

import ast
import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grading
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
LADDER = sorted(f"tests/{p.name}" for p in (REPOSITORY / "tests").glob("test_[1-5]_*.py"))


def grade(folder, which="not idefics1", files=LADDER):
    """`pytest files --of folder -k which` → exit status, {test: passed}, what it printed. One of the two models will do."""
    words = [*files, "--of", str(folder), "-k", which, "-rpf", "-p", "no:cacheprovider"]
    run = subprocess.run([sys.executable, "-m", "pytest", *words],
                         cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    results = re.findall(r"^(PASSED|FAILED) (\S+)", run.stdout, re.M)
    return run.returncode, {test: result == "PASSED" for result, test in results}, run.stdout + run.stderr


def functions(source):
    """{dotted name: (first line, one behind the last)} of the functions and methods of a file, lines from 0."""
    found = {}
    for node in ast.parse(source).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                found[part.name if part is node else f"{node.name}.{part.name}"] = part.lineno - 1, part.end_lineno
    return found


def solved(folder, steps, changes=()):
    """A copy of exercises/ with our own functions in these steps; changes: (ours, theirs) pieces of source."""
    shutil.copytree(REPOSITORY / "exercises", folder)
    for room in "model", "mimic", "layerwise":
        ours, lines = grading.path_of(REPOSITORY, room).read_text(), (folder / f"{room}.py").read_text().splitlines()
        right, names = functions(ours), [n for s in steps for n in grading.STEPS[s] if n.startswith(f"{room}.")]
        for name in sorted((n.split(".", 1)[1] for n in names), key=lambda n: -functions("\n".join(lines))[n][0]):
            start, end = functions("\n".join(lines))[name]
            lines[start:end] = ours.splitlines()[slice(*right[name])]
        if room == "layerwise":
            lines += ours.splitlines()[slice(*right["covariance"])]                      # our start_f uses it
        text = "\n".join([*lines, ""])
        for piece, wrong in changes:
            text = text.replace(piece, wrong)
        (folder / f"{room}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def blank():
    status, results, text = grade("exercises")
    assert status == 1
    return results, text


def test_no_solution_is_in_the_exercises():
    for room in "model", "mimic", "layerwise":
        for node in ast.walk(ast.parse((REPOSITORY / f"exercises/{room}.py").read_text())):
            if isinstance(node, ast.FunctionDef):
                documentation, body = node.body
                assert isinstance(documentation, ast.Expr) and body.exc.func.id == "NotImplementedError"


def test_signatures_are_those_of_our_functions():
    for room in "model", "mimic", "layerwise":
        ours, theirs = (ast.parse(grading.path_of(folder, room).read_text()) for folder in (REPOSITORY, REPOSITORY / "exercises"))
        signatures = [{node.name: ast.unparse(node.args) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
                      for tree in (ours, theirs)]
        assert signatures[1].items() <= signatures[0].items() and signatures[1]


def test_every_test_that_names_a_blank_function_fails_and_says_what_to_do(blank):
    results, text = blank
    for path in LADDER:
        step, source = grading.step_of(path), (REPOSITORY / path).read_text()
        names = "|".join(name.rsplit(".", 1)[1] for name in grading.STEPS[step])
        for name, (start, end) in functions(source).items():
            body = "\n".join(source.splitlines()[start + 1:end])
            passed = [p for test, p in results.items() if test.split("[")[0] == f"{path}::{name}"]
            assert not (re.search(rf"(?<!def )\b({names})\(", body) and any(passed)), name
        assert f"NotImplementedError: step {step}: " in text and f"tests pass; read exercises/step_{step}.md" in text


@pytest.mark.parametrize("steps, files", [((1, 3, 5), LADDER), ((2, 4), LADDER[:2] + LADDER[3:4])])
def test_a_right_step_turns_its_own_tests_green_and_no_others(blank, steps, files, tmp_path):
    """Both together: our own functions pass every test of the ladder."""
    _, results, text = grade(solved(tmp_path / "mine", steps), files=files)
    expected = {test: passed or grading.step_of(test.split("::")[0]) in steps for test, passed in blank[0].items()}
    assert results == {test: passed for test, passed in expected.items() if test.split("::")[0] in files}
    for step in map(grading.step_of, files):
        assert (re.search(rf"step {step}, .*: (\d+) of \1 tests pass; done", text) is not None) == (step in steps)


WRONG = [                                                       # ours, a student's, what the message says
    ("D ** -0.5", "1", "q·k is not divided by √D"),
    ("torch.sigmoid(log_z1 - log_z2", "torch.sigmoid(-log_z1 + log_z2", "Z2 stands in the numerator"),
    ("if self.z2 == \"unmasked\"", "if True", "log Z2 over all keys, future and padding included, though z2 is masked"),
    ("if norm:", "if False:", "norm divides by the teacher's mean square"),
    ("ridge * q.shape[1]", "ridge", "the ridge is not multiplied by N"),
    ("return (total - 2 *", "return 1 - (total - 2 *", "the explained share"),
]


def test_a_wrong_formula_is_named(tmp_path):
    status, _, text = grade(solved(tmp_path / "mine", (1, 2, 3, 4, 5), [w[:2] for w in WRONG]),
                            "loops_say or sigmoid_of or weight_of or mean_over or ridge or unexplained_is or every_head")
    assert status == 1 and "expected " in text
    for _, _, message in WRONG:
        assert f"the usual mistake: {message}" in text, message


def test_same_says_what_was_expected_and_found_and_accepts_what_is_equal():
    grading.same(torch.tensor([1.0, -torch.inf]), [1, -torch.inf])
    with pytest.raises(AssertionError, match=r"expected 2.000000, found 3.000000 at \[1\] of \[2\]\nthe usual mistake: doubled"):
        grading.same(torch.tensor([0.0, 3.0]), [0, 2], {"halved": lambda: [0, 1], "doubled": lambda: [0, 3]})
    with pytest.raises(AssertionError, match=r"expected a tensor of shape \(2,\), found \(2, 1\)"):
        grading.same(torch.zeros(2, 1), [0, 0])


@pytest.mark.parametrize("room, content, message", [
    ("mimic", None, "expected .*mimic.py, found nothing"),
    ("mimic", "def mixing_weight(:", "expected .*mimic.py to be imported, found SyntaxError"),
    ("mimic", "import nothing_like_it", "expected .*mimic.py to be imported, found ModuleNotFoundError"),
    ("layerwise", "start_f = None", "expected start_f in .*layerwise.py, found none")])
def test_a_folder_that_cannot_be_graded_is_refused(room, content, message, tmp_path):
    shutil.copytree(REPOSITORY / "exercises", tmp_path / "mine")
    path = tmp_path / "mine" / f"{room}.py"
    path.write_text(content) if content else path.unlink()
    with pytest.raises(pytest.UsageError, match=message):
        grading.read_all(tmp_path / "mine")


@pytest.mark.parametrize("step", grading.STEPS)
def test_a_step_has_a_page_whose_numbers_are_right(step):
    """The examples of the page, with our functions."""
    page = REPOSITORY / f"exercises/step_{step}.md"
    found = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert found.attempted >= 3 and found.failed == 0
    assert f"pytest tests/test_{step}* --of exercises" in page.read_text()
