import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each, and before PyTorch counts them
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import sample
import train
from checkpoint import write_weights
from data import render
from model import ConditionalUNet, build

ROOT = Path(__file__).resolve().parent.parent
# Two processes, joined by gloo.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]  # 0: a free one
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
OFFICIAL = ROOT.parent / "shared" / "official"  # the lab's label files, on the founders' machines alone
# For runs of a few steps; in fp32, which some processors would not choose.
TINY = ["--model", "small", "--batch-size", "4", "--sample-every", "0", "--mixed-precision", "no"]

METADATA = {
    "model": "small",
    "recipe": {},
    "data": {"labelled": 4},
    "unseen": [],
    "step": 2,
    "pictures_seen": 8,
}
METADATA |= {
    "sampling": {"sampler": "ddim", "steps": 3, "guidance_scale": 1.0}
}  # the least that weights want


NAMES = list(json.loads((ROOT / "train.json").read_text()))[:12]  # those of the fixture `pictures`
TINY_NETWORK = {"block_out_channels": (32, 32), "layers_per_block": 1, "patch_size": 4}
TINY_NETWORK |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
TRAIN = "--model small --labels labels.json --data pictures --init weights --out run --batch-size 4"
TRAIN += " --sample-every 0"


def listing(folder: Path) -> dict[str, tuple]:
    """All that is in a folder, without following links: name -> what it is and when it was changed."""
    found = {}
    for base, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            stat = os.lstat(path := os.path.join(base, name))
            found[path] = (stat.st_mode, name in files and (stat.st_size, stat.st_mtime_ns))
    return found


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """The first four scenes of train.json: twelve pictures, rendered for real."""
    folder = tmp_path_factory.mktemp("data") / "iclevr"
    render.main(["--limit", "4", "--out", str(folder)])
    return folder


@pytest.fixture(scope="session")
def good(pictures, tmp_path_factory) -> Path:
    """A folder with all that the scripts take: labels, pictures like the lab's, conditions, weights, a run,
    an evaluator, a pack, a painted list."""
    folder, labels = tmp_path_factory.mktemp("good"), json.loads((ROOT / "train.json").read_text())
    (folder / "labels.json").write_text(json.dumps({name: labels[name] for name in NAMES}))
    (folder / "list.json").write_text(json.dumps([["red cube"], ["cyan sphere", "gray cube"]]))
    (folder / "pictures").mkdir()
    for name in NAMES:
        shutil.copy(pictures / name, folder / "pictures")
    torch.manual_seed(0)
    write_weights(folder / "weights", ConditionalUNet(**TINY_NETWORK), build("small")[1], METADATA)
    shutil.copy(ROOT / "weights" / "evaluator.pth", folder)
    shutil.copy(ROOT / "data" / "held_out.npz", folder / "pack.npz")
    before = Path.cwd()
    os.chdir(folder)
    train.main([*TRAIN.split(), "--max-steps", "2"])
    sample.main(["--mode", "list.json", "--weights", "weights"])
    os.chdir(before)
    return folder


@pytest.fixture
def there(good, tmp_path, monkeypatch) -> Path:
    """A copy of it, to be in and to spoil."""
    folder = shutil.copytree(good, tmp_path / "there", symlinks=True)
    for name in NAMES:  # copies have the times of the originals, which the cache of pictures goes by
        os.utime(folder / "pictures" / name, ns=(0, (good / "pictures" / name).stat().st_mtime_ns))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def clone(tmp_path) -> Path:
    """The project as a new user has it: scripts, label files, pictures, weights."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.json")]:
        shutil.copy(path, folder)
    for name in ("infra", "report"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("*.npz"))
    shutil.copytree(ROOT / "weights", folder / "weights")
    (folder / "data" / "iclevr.npz").symlink_to(ROOT / "data" / "iclevr.npz")
    return folder


@pytest.fixture
def run():
    """Run a script as a command: run(folder, "train.py", "--max-steps", 2) -> the finished process.

    `more` are variables of the environment.
    """

    def call(folder: Path, *command, **more) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, command)]
        env = os.environ | more
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=env)

    return call


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
