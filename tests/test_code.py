"""The code itself: style and types are checked, and functions, files and dense code stay within limits."""

import ast
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from conftest import ROOT

FOLDERS = [".", "benchmarks/checks", "benchmarks/studies", "benchmarks", "tests"]
PACKAGES = [path.parent.name for path in sorted(ROOT.glob("*/__init__.py"))]
FILES = [path for folder in [*FOLDERS, *PACKAGES] for path in sorted((ROOT / folder).glob("*.py"))]
SCRIPTS = [path for path in FILES if path.parent.name != "tests"]
MOST_LINES_OF_A_FILE = 400
LONG_FILES = ["data/render.py"]  # which may have more
MOST_LINES_OF_A_FUNCTION = 60
LONG_FUNCTIONS = {"train.py: train": 90}
MOST_DENSE = 9  # of each kind, in all scripts
FEWEST_COMMENTS = 12  # per 100 lines


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def said_by(*command: str) -> str:
    """What a tool prints if it finds something, else nothing."""
    process = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    return process.stdout + process.stderr if process.returncode else ""


# ------------------------------------------------------------------------------------------------------ tools


def test_ruff_finds_nothing():
    assert said_by("ruff", "check") == ""


def test_the_format_is_that_of_ruff():
    assert said_by("ruff", "format", "--check") == ""


@pytest.mark.slow
def test_mypy_finds_nothing():
    assert said_by("mypy") == ""


# ----------------------------------------------------------------------------------------------------- limits


def test_no_file_is_too_long():
    lengths = {name_of(path): count_lines(path) for path in FILES if name_of(path) not in LONG_FILES}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FILE} == {}


def test_no_function_is_too_long():
    too_long = {}
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{name_of(path)}: {node.name}"
                length = node.end_lineno - node.lineno + 1
                if length > LONG_FUNCTIONS.get(name, MOST_LINES_OF_A_FUNCTION):
                    too_long[name] = length
    assert too_long == {}


def is_assignment_of_several(node: ast.AST) -> bool:
    """As in a, b = x, y."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def is_merging_assignment(node: ast.AST) -> bool:
    """As in a |= b."""
    return isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitOr)


def is_walrus(node: ast.AST) -> bool:
    """As in (a := b)."""
    return isinstance(node, ast.NamedExpr)


@pytest.mark.parametrize("is_dense", [is_assignment_of_several, is_merging_assignment, is_walrus])
def test_dense_constructs_are_few_in_all_scripts(is_dense):
    places = []
    for path in SCRIPTS:
        places += [f"{name_of(path)}:{node.lineno}" for node in ast.walk(parsed(path)) if is_dense(node)]
    assert len(places) <= MOST_DENSE, places


def count_comments(path: Path) -> int:
    """Lines with a comment, behind code or alone."""
    with tokenize.open(path) as file:
        return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(file.readline))


@pytest.mark.parametrize("name", ["train.py", "diffusion.py"])
def test_the_algorithm_has_enough_comments(name):
    assert 100 * count_comments(ROOT / name) / count_lines(ROOT / name) >= FEWEST_COMMENTS
