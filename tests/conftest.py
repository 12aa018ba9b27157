import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import render

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # two processes, joined by gloo
OFFICIAL = ROOT.parent / "shared" / "official"  # the lab's label files, on the founders' machines alone
TINY = ["--model", "small", "--batch-size", "4", "--sample-every", "0"]  # for runs of a few steps


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """The first four scenes of train.json: twelve pictures, rendered for real."""
    folder = tmp_path_factory.mktemp("data") / "iclevr"
    render.main(["--limit", "4", "--out", str(folder)])
    return folder


@pytest.fixture
def clone(tmp_path) -> Path:
    """The project as a new user has it: scripts, label files, pictures, weights."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.json"), ROOT / "report.jinja"]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "weights", folder / "weights")
    (folder / "iclevr.npz").symlink_to(ROOT / "iclevr.npz")
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


@pytest.fixture
def refused(capsys):
    """Check that a call ends in exit code 2 and one line on stderr that holds all the words given."""

    def check(call, argv, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call([str(a) for a in argv])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert stop.value.code == 2
        assert len(lines) == 1, lines
        for word in words:
            assert str(word) in lines[0], lines[0]

    return check
