"""What the tests share: a few rendered pictures, a folder with one of everything, ways to run a command, and
the table of faults in docs/faults.md.

`python -m pytest -m "not slow"` is the quick set; without `-m` all tests run.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each, and before PyTorch counts them
    os.environ["OMP_NUM_THREADS"] = "1"

import filelock
import pytest
import torch

import children
import sample
import train
from checkpoint import write_weights
from data import render
from model import build
from network import ConditionalUNet

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "weights" / "small"
# Two processes, joined by gloo.
LAUNCH = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0),  # 0: a free one
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
OFFICIAL = ROOT.parent / "shared" / "official"  # the lab's label files, on the founders' machines alone
# For runs of a few steps; in fp32, which some processors would not choose.
TINY = ["--model", "small", "--batch-size", "4", "--sample-every", "0", "--mixed-precision", "no"]

METADATA = {  # the least that weights want
    "model": "small",
    "recipe": {},
    "data": {"labelled": 4},
    "unseen": [],
    "step": 2,
    "pictures_seen": 8,
    "sampling": {"sampler": "ddim", "steps": 3, "guidance_scale": 1.0},
}
NAMES = list(json.loads((ROOT / "train.json").read_text()))[:12]  # those of the fixture `pictures`
TINY_NETWORK = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "patch_size": 4,
}
# Options of train.py and sample.py for the folder of the fixture `there`.
TRAIN = "--model small --labels labels.json --data pictures --init weights --out run --batch-size 4 --sample-every 0"
SAMPLE = "--weights weights --evaluator evaluator.pth --mode"


def listing(folder: Path) -> dict[str, tuple]:
    """All that is in a folder, without following links: name -> what it is and when it was changed."""
    found = {}
    for base, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(base, name)  # noqa: PTH118 - a string, as the names of os.walk
            stat = os.lstat(path)
            found[path] = (stat.st_mode, name in files and (stat.st_size, stat.st_mtime_ns))
    return found


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, once for all of pytest's workers: the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers
    with filelock.FileLock(base / f"{name}.lock"):
        if not (base / f"{name}.made").exists():
            make(base / name)
            (base / f"{name}.made").touch()
    return base / name


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """The first four scenes of train.json: twelve pictures, rendered for real."""
    argv = ["--limit", "4", "--workers", "1", "--out"]
    return made_once(tmp_path_factory, "pictures", lambda folder: render.main([*argv, str(folder)]))


@pytest.fixture(scope="session")
def good(pictures, tmp_path_factory) -> Path:
    """A folder with all that the scripts take: labels, pictures like the lab's, conditions, weights, a run,
    an evaluator, a pack, a painted list."""

    def make(folder: Path):
        (folder / "pictures").mkdir(parents=True)
        for name in NAMES:
            shutil.copy(pictures / name, folder / "pictures")
        labels = json.loads((ROOT / "train.json").read_text())
        (folder / "labels.json").write_text(json.dumps({name: labels[name] for name in NAMES}))
        (folder / "list.json").write_text(json.dumps([["red cube"], ["cyan sphere", "gray cube"]]))
        torch.manual_seed(0)
        write_weights(folder / "weights", ConditionalUNet(**TINY_NETWORK), build("small")[1], METADATA)
        shutil.copy(ROOT / "weights" / "evaluator.pth", folder)
        shutil.copy(ROOT / "data" / "held_out.npz", folder / "pack.npz")
        with contextlib.chdir(folder):
            train.main([*TRAIN.split(), "--max-steps", "2"])
            sample.main(["--mode", "list.json", "--weights", "weights"])

    return made_once(tmp_path_factory, "good", make)


@pytest.fixture
def there(good, tmp_path, monkeypatch) -> Path:
    """A copy of it, to be in and to spoil."""
    folder = shutil.copytree(good, tmp_path / "there", symlinks=True)
    for name in NAMES:  # copies have the times of the originals, which the cache of pictures goes by
        os.utime(folder / "pictures" / name, ns=(0, (good / "pictures" / name).stat().st_mtime_ns))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def seedling(tmp_path_factory) -> Path:
    """Weights of a network with attention and dropout that is trained at ten steps a second and more."""
    torch.manual_seed(0)
    model = ConditionalUNet(
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        layers_per_block=1,
        patch_size=8,
        dropout=0.1,
    )
    folder = tmp_path_factory.mktemp("seedling") / "w"
    write_weights(folder, model, build("small")[1], METADATA)
    return folder


@pytest.fixture(scope="session")
def argv(pictures, seedling):
    """Options of train.py for a run with all that has a state: EMA, warm-up, decay, both dropouts,
    accumulation. argv(out, "--max-steps", 2) -> a list of strings."""

    def make(out: Path, *more) -> list[str]:
        recipe = ["--warmup-steps", 4, "--label-dropout", 0.3, "--grad-accum", 2, "--batch-size", 4]
        argv = ["--model", "small", "--data", pictures, "--init", seedling, "--out", out, "--sample-every", 0]
        return list(map(str, [*argv, *recipe, *more]))

    return make


@pytest.fixture
def six(tmp_path, seedling) -> list[str]:
    """Six conditions in six.json, and the options of sample.py that paint them in batches of two into out."""
    chosen = json.loads((ROOT / "validation.json").read_text())[::11]
    (tmp_path / "six.json").write_text(json.dumps(chosen))
    argv = ["--mode", tmp_path / "six.json", "--weights", seedling, "--steps", 3, "--batch-size", 2]
    return list(map(str, [*argv, "--out", tmp_path / "out"]))


@pytest.fixture
def clone(tmp_path) -> Path:
    """The project as a new user has it: scripts, label files, pictures, weights."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.json")]:
        shutil.copy(path, folder)
    for package in ROOT.glob("*/__init__.py"):
        name = package.parent.name
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.npz", "__pycache__"))
    shutil.copytree(ROOT / "weights", folder / "weights")
    (folder / "data" / "iclevr.npz").symlink_to(ROOT / "data" / "iclevr.npz")
    return folder


def run_with(python: str | Path) -> Callable[..., subprocess.CompletedProcess]:
    """A function for the next two fixtures, with one of two commands in the place of `python`."""

    def call(folder: Path, *command, **more) -> subprocess.CompletedProcess:
        line = [python, *map(str, command)]
        return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=600, env=os.environ | more)

    return call


@pytest.fixture
def run():
    """Run a script as a command: run(folder, "train.py", "--max-steps", 2) -> the finished process.

    Its named arguments are variables of the environment.
    """
    return run_with(sys.executable)


@pytest.fixture
def run_warm():
    """As `run`, but the process has PyTorch and the scripts imported already, which saves up to ten seconds. For
    tests of what a script does, not of how it starts."""
    return run_with(children.warm_python())


FAULTS = ROOT / "docs" / "faults.md"
MARK = "| fault | what happened |\n|---|---|\n"
_faults: list[tuple[str, str, str]] = []  # file of the test, fault, what happened


@pytest.fixture
def tried(record_property):
    """Note a fault and what happened, for the table in docs/faults.md, which has to name it.

    `FAULTS=1 python -m pytest` makes the table anew.
    """

    def note(fault: str, happened: str):
        record_property("fault", (fault, happened))
        assert "FAULTS" in os.environ or f"| {fault} |" in FAULTS.read_text(), f"{FAULTS} lacks {fault!r}"

    return note


# Two minutes and more each. First, so that at the end no worker waits long for the other one.
LONG = ["test_sample.py", "test_checkpoint.py", "test_train.py", "test_benchmarks.py", "test_cuda.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_runtest_logreport(report):
    """Called in pytest's own process also for what its workers ran."""
    if report.when == "call":
        found = [value for name, value in report.user_properties if name == "fault"]
        _faults.extend((report.location[0], *value) for value in found)


def pytest_sessionfinish():
    if "FAULTS" in os.environ and _faults and "PYTEST_XDIST_WORKER" not in os.environ:
        head, _, _ = FAULTS.read_text().partition(MARK)
        in_order = sorted(_faults, key=lambda fault: fault[0])  # workers take files in any order
        rows = dict.fromkeys(f"| {fault} | {happened} |\n" for _, fault, happened in in_order)
        FAULTS.write_text(head + MARK + "".join(rows))


@pytest.fixture
def refused(capsys):
    """Check that a call ends in exit code 2 and one line on stderr, beside bars, that holds all the words."""

    def check(call, argv, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call([str(a) for a in argv])
        lines = capsys.readouterr().err.splitlines()
        lines = [line for line in lines if line.strip() and "%|" not in line]
        assert stop.value.code == 2
        assert len(lines) == 1, lines
        for word in words:
            assert str(word) in lines[0], lines[0]

    return check
