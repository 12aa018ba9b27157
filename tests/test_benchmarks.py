"""The scripts in benchmarks/ that make the figures: each starts, and gpu.sh runs to its end at a small size."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers.models.attention_processor import Attention

import children
from checkpoint import load_weights, write_weights
from conftest import ROOT
from label_files import load_conditions, load_objects
from labels import pairs_of_one_colour
from model import build

sys.path.insert(0, str(ROOT / "benchmarks"))
from checks import check_lift
from studies import composition, guidance, negatives, steps

pytestmark = pytest.mark.slow
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in BENCHMARKS.rglob("*.py"))
PARTS_OF_STUDY = [f"benchmarks/studies/{name}.py" for name in ("rows", "measure_row", "study_page")]
NOT_COMMANDS = ["benchmarks/baselines.py", *PARTS_OF_STUDY]
STAGES = ("reference", "small", "bench", "study", "longer")
LISTS = ("test", "new_test")


def run_script(*line, python=sys.executable) -> str:
    """What a script prints, run from the root of the repository."""
    command = [python, *map(str, line)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=env)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


# ---------------------------------------------------------------------------------------------- every script


def test_every_command_is_in_the_readme():
    text = (BENCHMARKS / "README.md").read_text()
    assert [script for script in SCRIPTS if script not in NOT_COMMANDS and f"python {script}" not in text] == []


@pytest.mark.parametrize("check", ["check_render", "check_evaluator"])  # the other is run below
def test_a_check_starts_by_its_path(check):
    assert run_script(f"benchmarks/checks/{check}.py", "--help").startswith("usage: ")


@pytest.mark.parametrize("study", ["steps", "negatives"])  # guidance is like the latter
def test_a_study_prints_the_table_in_the_docs(study, tmp_path):
    stored = (ROOT / "docs" / f"{study}.json").read_text()
    (tmp_path / f"{study}.json").write_text(stored)
    # They are of weights that do not ship any more.
    line = [f"benchmarks/studies/{study}.py", "--out", tmp_path / study, "--figures"]
    table = run_script(*line, python=children.warm_python())
    assert (tmp_path / f"{study}.json").read_text() == stored
    assert (tmp_path / f"{study}.png").stat().st_size > 5000
    assert table in (ROOT / "docs" / "speed.md").read_text() + (ROOT / "weights" / "README.md").read_text()


@pytest.mark.parametrize("study", [steps, guidance, negatives])
def test_a_study_without_its_file_tells_so_in_one_line(study, tmp_path, refused):
    refused(study.main, ["--out", tmp_path / "none", "--figures"], "none.json: no such file")


def test_grown_weights_have_attention_that_compares_and_train_on(seedling, argv, tmp_path):
    """With queries and keys 100 times as large, as after long training, each place sees one other place alone."""
    model, noise_scheduler, metadata = load_weights(seedling)
    old = [module for module in model.modules() if isinstance(module, Attention)]
    with torch.no_grad():
        for attention in old:
            attention.to_q.weight.mul_(100)
            attention.to_k.weight.mul_(100)
    write_weights(tmp_path / "saturated", model, noise_scheduler, metadata)
    python = children.warm_python()
    run_script("benchmarks/grow.py", tmp_path / "saturated", tmp_path / "grown", "--layers", 2, python=python)
    seen = {}
    for name in ("saturated", "grown"):
        table = run_script("benchmarks/checks/check_attention.py", tmp_path / name, python=python).split("\n")[5:]
        seen[name] = [[float(cell) for cell in line.split("|")[2:-1]] for line in table if line]
    assert len(seen["saturated"]) == len(old) and len(seen["grown"]) == len(old) + 2
    assert min(logit for _, _, logit, _ in seen["saturated"]) > 100
    assert max(logit for _, _, logit, _ in seen["grown"]) < 12.1
    assert max(keys for *_, keys in seen["saturated"]) < 3 < max(keys for *_, keys in seen["grown"])
    grown, _, _ = load_weights(tmp_path / "grown")
    untouched = [name for name, weight in model.state_dict().items() if torch.equal(weight, grown.state_dict()[name])]
    changed = set(model.state_dict()) - set(untouched)
    assert all(name.startswith("unet.mid_block.attentions.") for name in changed)
    refused = [python, "benchmarks/grow.py", tmp_path / "grown", tmp_path / "again"]
    process = subprocess.run(refused, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    run = argv(tmp_path / "run", "--max-steps", 1, "--init", tmp_path / "grown")
    assert children.finish(children.start("train", run, tmp_path)) == 0, children.output(tmp_path)


def test_right_pictures_with_little_noise_stay_right():
    script = ["benchmarks/checks/check_noised.py", "weights/small", "--num-images", 6]
    rows = {}
    for name, options in {"plain": [], "guided": ["--guidance-scale", 2, "--negative-scale", 2]}.items():
        lines = run_script(*script, *options, python=children.warm_python()).strip().split("\n")[4:]
        rows[name] = [[float(cell) for cell in line.split("|")[1:-1]] for line in lines]
        assert [row[0] for row in rows[name]] == [928, 728, 528, 328]
        assert rows[name][-1][1] > 0.9  # accuracy
    assert rows["plain"] != rows["guided"]


def test_the_area_under_the_curve_of_the_lift():
    is_right = torch.tensor([True, True, False, False])
    assert check_lift.area_under_curve(torch.tensor([3.0, 2.0, 1.0, 0.0]), is_right) == 1
    assert check_lift.area_under_curve(torch.tensor([3.0, 1.0, 2.0, 0.0]), is_right) == 0.75
    assert check_lift.area_under_curve(torch.tensor([0.0, 1.0, 2.0, 3.0]), is_right) == 0


def test_the_lift_is_checked_on_conditions_of_no_list():
    objects = load_objects()
    drawn = check_lift.draw_conditions(objects, 40, seed=0)
    lists = [load_conditions(ROOT / f"{name}.json", objects) for name in (*LISTS, "validation")]
    taken = {frozenset(condition) for conditions in lists for condition in conditions}
    assert not any(frozenset(condition) in taken for condition in drawn)
    assert [bool(pairs_of_one_colour(condition)) for condition in drawn] == [True] * 20 + [False] * 20


def test_every_lift_has_a_row():
    line = ["benchmarks/checks/check_lift.py", "weights/small", "--num-images", 4, "--painted-by", "weights/small"]
    head, _, *table = run_script(*line, python=children.warm_python()).strip().split("\n")
    assert "of 4 pictures are right for both judges" in head
    timesteps = [tuple(map(int, row.split("|")[1].split(", "))) for row in table[2:]]
    assert timesteps == list(check_lift.ROWS)


def test_composition_adds_up_what_each_object_changes():
    network, _ = build("small")
    network.eval()
    images = torch.randn(3, 3, 64, 64)
    timesteps = torch.full((3,), 500)
    none = torch.zeros(3, 24)
    one = torch.eye(24)[:3]
    other = torch.eye(24)[3:6]
    add_up = composition.composed(network)
    with torch.no_grad():
        unconditional, of_one, of_other = (network(images, timesteps, labels) for labels in (none, one, other))
        close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-4)
        close(add_up(images, timesteps, none), unconditional)
        close(add_up(images, timesteps, one), of_one)
        close(add_up(images, timesteps, one + other), of_one + of_other - unconditional)


def test_composition_prints_the_table_in_the_docs_and_samples_only_what_is_missing(seedling, tmp_path):
    script = ["benchmarks/studies/composition.py", "--out", tmp_path / "found.json"]
    shutil.copy(ROOT / "docs" / "composition.json", tmp_path / "found.json")
    table = run_script(*script, "--figures", python=children.warm_python())
    assert table in (ROOT / "weights" / "README.md").read_text()
    options = ["--weights", seedling, "--seeds", 1, "--num-images", 2]  # other weights: all of it is missing
    assert "| composed | new_test |" in run_script(*script, *options, python=children.warm_python())
    found = (tmp_path / "found.json").read_text()
    assert len(json.loads(found)["results"]) == 6
    run_script(*script, *options, python=children.warm_python())
    assert (tmp_path / "found.json").read_text() == found


# ---------------------------------------------------------------------------------------------------- gpu.sh


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the dry run of all stages leaves, unpacked: stage -> folder."""
    folder = tmp_path_factory.mktemp("gpu")
    options = {
        "DRY_RUN": "1",
        "WORK": str(folder / "work"),
        "OUT": str(folder / "out"),
        "PYTHON": str(children.warm_python()),
    }
    process = subprocess.run(
        [BENCHMARKS / "gpu.sh", "all"],
        cwd=folder,
        env={**os.environ, **options},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    (folder / "results").mkdir()
    pieces = sorted((folder / "out").iterdir())
    assert len(pieces) <= 8 and all(piece.stat().st_size <= 16 * 2**20 for piece in pieces)
    for stage in STAGES:
        data = b"".join(piece.read_bytes() for piece in pieces if piece.name.startswith(stage))
        subprocess.run(["tar", "x"], input=data, cwd=folder / "results", check=True)  # as gpu.sh says
    return folder / "results"


def test_the_dry_run_scores_every_list(results):
    folders = [
        "small/small",
        "longer/small-longer",
        "reference/few-40",
        "reference/all-40",
        "longer/few-150",
        "longer/all-150",
    ]
    expected = {f"{folder}/{name}.json" for folder in folders for name in LISTS}
    assert {path.relative_to(results).as_posix() for path in results.rglob("*test.json")} == expected
    for name in expected:
        report = json.loads((results / name).read_text())
        assert report["seconds"] > 0 and (results / name).with_suffix(".png").stat().st_size > 1000
    assert (results / "small" / "small" / "unseen.json").exists()


def test_the_dry_run_leaves_strips_curves_and_weights(results):
    for strip in ("small/small/process.png", "reference/few-40/process.png"):
        assert (results / strip).stat().st_size > 5000
    for curve in ("small/small.png", "reference/reference.png", "longer/small-longer.png"):
        assert (results / curve).stat().st_size > 5000
    assert (results / "small" / "small" / "weights" / "metadata.json").exists()


def test_the_study_leaves_a_row_of_the_full_budget(results):
    (row,) = json.loads((results / "study" / "results.json").read_text())["rows"]
    assert (row["row"], row["budget"]) == ("no EMA", "full") and row["points"][-1]["accuracy"]
    assert (results / "study" / "grids" / "no-ema-full.png").stat().st_size > 1000


def test_the_bench_prints_every_ratio(results):
    speed = json.loads((results / "bench" / "speed.json").read_text())
    parts = speed["models"]["small"]
    assert list(parts) == ["training", "sampling, 1000 steps"]
    for part in parts.values():
        assert all(rate > 0 for rates in part["pictures_per_second"].values() for rate in rates)
        assert part["flop_per_picture"] > 1e9
    assert set(parts["training"]["pictures_per_second"]) == {"ours", "plain", "bare"}
    text = (results / "bench" / "speed.md").read_text()
    assert "| `small` | training | 4 |" in text and "Extrapolated from turns of 2 steps" in text
