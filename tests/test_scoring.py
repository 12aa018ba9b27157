"""The scripts with the lab's own evaluator.py in place of ours; on CUDA in test_cuda.py."""

import json
import shutil
import sys

import pytest
import torch

import lab
from conftest import METADATA, ROOT, TINY
from evaluator import evaluation_model
from infra.commands import InputError

# In one process, as PyTorch takes long to load: each script's exit code is printed after what it said.
ALL = """
import json, sys
import sample, train
from report import __main__ as report
from report import metrics

scripts = {"metrics": metrics, "report": report, "sample": sample, "train": train}
for script, *argv in json.loads(sys.argv[1]):
    code = 0
    try:
        scripts[script].main(argv)
    except SystemExit as stop:
        code = stop.code
    print(f"{script}: exit {code}", file=sys.stderr)
"""


@pytest.mark.slow
def test_without_cuda_the_labs_evaluator_is_refused_in_one_line(clone, pictures, run):
    shutil.copy(ROOT / "tests" / "lab_evaluator.py", clone / "evaluator.py")
    torch.save({"model": {}}, clone / "checkpoint.pth")
    (clone / "images" / "test").mkdir(parents=True)
    shutil.copy(next(pictures.glob("*.png")), clone / "images" / "test" / "0.png")
    painted = {
        **METADATA["sampling"],
        "conditions": [["red cube"]],
        "num_images": 1,
        "seed": 0,
        "accuracies": [1.0],
        "precision": "no",
        "weights": "weights",
        "evaluator": "checkpoint.pth",
    }
    (clone / "images" / "test.json").write_text(json.dumps(painted))
    calls = [
        ["sample", "--mode", "test"],
        ["sample", "--mode", "test", "--evaluator", "weights/evaluator.pth"],
        ["metrics", "images/test"],
        ["report"],
        ["train", *TINY, "--data", str(pictures), "--max-steps", "1"],
    ]
    done = run(clone, "-c", ALL, json.dumps(calls), CUDA_VISIBLE_DEVICES="")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:") or ": exit " in line]
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    exits = [line for line in lines if ": exit " in line]
    assert exits == ["sample: exit 2", "sample: exit 2", "metrics: exit 2", "report: exit 2", "train: exit 0"]
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 4
    needs = "error: evaluator.py: the lab's own file needs CUDA, and there is none here"
    assert all(line.startswith(needs) for line in (errors[0], *errors[2:])), errors
    assert errors[1].startswith("error: weights/evaluator.pth: the lab's evaluator.py loads checkpoint.pth")


def test_our_evaluator_is_told_from_the_labs():
    weights = ROOT / "weights" / "evaluator.pth"
    ours = lab.load_evaluator(weights, "cpu")
    assert isinstance(ours, evaluation_model) and ours.path == weights and ours.threshold != 0.5
    assert lab.load_evaluator(device="cpu").path.is_absolute()  # its own default


@pytest.mark.parametrize(
    ("content", "reason"),
    [("import nothing_of_this_name", "ModuleNotFoundError: No module"), ("x = 1", "ImportError"), ("x =", "Syn")],
)
def test_an_evaluator_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, content, reason):
    (tmp_path / "evaluator.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evaluator")
    with pytest.raises(InputError, match=rf"^evaluator.py: cannot be imported \({reason}.*\)$"):
        lab.load_evaluator()
