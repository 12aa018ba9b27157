"""What a fresh machine installs: pyproject.toml, the oldest versions that requirements.txt admits."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sample
from conftest import ROOT

# torch and torchvision take gigabytes, so they stay as they are here.
LEFT = ("torch", "torchvision")


def requirements() -> list[str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return [line for line in lines if line]


def oldest() -> list[str]:
    """The lower bound of each requirement: diffusers==0.35."""
    bounds = [re.fullmatch(r"([\w-]+)>=([\d.]+)(,.*)?", line) for line in requirements()]
    assert all(bounds), requirements()
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound[1] not in LEFT]


def test_pip_install_and_uv_install_what_the_scripts_need(tmp_path):
    """`pip install .` installs the requirements and nothing else; it used to install nothing at all."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert config["tool"]["uv"]["package"] is False
    assert config["tool"]["setuptools"]["packages"] == config["tool"]["setuptools"]["py-modules"] == []
    code = "import sys; from setuptools.build_meta import prepare_metadata_for_build_wheel as p; p(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [metadata] = tmp_path.glob("*.dist-info/METADATA")
    found = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(), re.MULTILINE)
    names = [re.match(r"[\w-]+", line)[0] for line in requirements()]
    assert [re.match(r"[\w-]+", line)[0] for line in found] == names


@pytest.fixture(scope="session")
def old_libraries(tmp_path_factory) -> Path:
    """A folder with the oldest versions that requirements.txt admits."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the oldest versions have wheels for Python 3.11")
    folder = tmp_path_factory.mktemp("old")
    # Theirs too where a newer one is refused: diffusers 0.35 and its generation want huggingface_hub below 1.
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *oldest()]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_oldest_versions_train_sample_export_and_load(old_libraries, argv, six, tmp_path, run):
    environment = {"PYTHONPATH": str(old_libraries), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    versions = "import importlib.metadata as m, sys; print(*(f'{n}=={m.version(n)}' for n in sys.argv[1:]))"
    names = [line.split("==")[0] for line in oldest()]
    shown = run(tmp_path, "-c", versions, *names, **environment)
    for line, found in zip(oldest(), shown.stdout.split(), strict=True):
        assert found.startswith(line), shown.stdout

    load = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True)
pipe("red cube", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].save("red_cube.png")
"""
    commands = [
        [ROOT / "train.py", *argv(tmp_path / "run", "--max-steps", 2, "--eval-every", 2)],
        [ROOT / "checkpoint.py", tmp_path / "run", tmp_path / "exported"],
        [ROOT / "sample.py", *six, "--weights", tmp_path / "exported"],
        ["-c", load, tmp_path / "exported"],
    ]
    for command in commands:
        done = run(tmp_path, *command, **environment)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "red_cube.png").exists()

    old = [path.read_bytes() for path in sorted((tmp_path / "out" / "six").glob("*.png"))]
    sample.main([*six, "--weights", str(tmp_path / "exported"), "--overwrite"])
    assert [path.read_bytes() for path in sorted((tmp_path / "out" / "six").glob("*.png"))] == old != []


def test_the_workflow_runs_ci_on_all_pythons_admitted():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert 'python: ["3.11", "3.12", "3.13"]' in text
    assert "run: .ci/run" in text
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11,<3.14"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
