"""The scripts that make the figures, at a size that shows they work."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the dry run of all stages leaves, unpacked: stage -> folder."""
    folder = tmp_path_factory.mktemp("gpu")
    env = {"DRY_RUN": "1", "WORK": str(folder / "work"), "OUT": str(folder / "out")}
    process = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "all"], cwd=folder, capture_output=True, text=True, timeout=600,
        env=os.environ | env | {"PYTHON": sys.executable},
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    (folder / "results").mkdir()
    pieces = sorted((folder / "out").iterdir())
    assert len(pieces) <= 8 and all(p.stat().st_size <= 16 * 2**20 for p in pieces)
    for stage in ("bench", "small", "reference", "longer"):
        data = b"".join(p.read_bytes() for p in pieces if p.name.startswith(stage))
        subprocess.run(["tar", "x"], input=data, cwd=folder / "results", check=True)  # as gpu.sh says
    return folder / "results"


def test_the_dry_run_leaves_every_result(results):
    reports = {str(p.relative_to(results)) for p in results.rglob("*test.json")}
    lists = ("test", "new_test")
    expected = {f"small/small/{x}.json" for x in lists} | {f"longer/small-longer/{x}.json" for x in lists}
    for kind in ("few", "all"):
        expected |= {f"reference/{kind}-40/{x}.json" for x in lists}
        expected |= {f"longer/{kind}-150/{x}.json" for x in lists}
    assert reports == expected
    for name in expected:
        report = json.loads((results / name).read_text())
        assert report["seconds"] > 0 and (results / name).with_suffix(".png").stat().st_size > 1000
    assert (results / "small" / "small" / "unseen.json").exists()
    for strip in ("small/small/process.png", "reference/few-40/process.png"):
        assert (results / strip).stat().st_size > 5000
    assert (results / "small" / "small" / "weights" / "metadata.json").exists()
    for curve in ("small/small.png", "reference/reference.png", "longer/small-longer.png"):
        assert (results / curve).stat().st_size > 5000


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
