"""Options are read, and mistakes in them told, before PyTorch is loaded."""

import pytest
from conftest import ROOT

SCRIPTS = ("train", "sample", "evaluator", "metrics", "report", "checkpoint", "render")
CODE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_mistakes_come_before_torch(run, script):
    told = run(ROOT, "-c", CODE, f"{script}.py", "--help")
    assert told.returncode == 0 and told.stdout.startswith(f"usage: {script}.py")
    assert told.stdout.endswith("False\n")
    wrong = run(ROOT, "-c", CODE, f"{script}.py", "--no-such-option")
    assert wrong.returncode == 2 and wrong.stdout == "False\n"
    [line] = wrong.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(f"{script}.py --help lists all options")
