"""The second judge, on pictures that ship, on new ones, and on what is none."""

import json

import numpy as np
import pytest
from conftest import ROOT

import metrics
import render
import sample
from dataset import ICLEVRDataset, load_objects
from metrics import find_objects, shows_colours


def pixels(picture) -> np.ndarray:
    return np.asarray(picture).transpose(2, 0, 1)


def test_the_second_judge_is_right_on_renders():
    """At least 97 % of the pictures, whose labels it does not know."""
    data = ICLEVRDataset(ROOT / "iclevr.npz", ROOT / "train.json", load_objects())
    chosen = range(0, len(data), 61)  # 296 pictures, of all three steps
    right = shows_colours(data.images[chosen], [data.conditions[i] for i in chosen])
    assert right.float().mean() >= 0.97
    assert not shows_colours(data.images[2:3], [data.conditions[2][:2]]).item()  # one object too many


@pytest.fixture(scope="module")
def renderer():
    return render.Renderer("64x64", samples=8, seed=0)


def test_it_counts_copies_and_finds_places(renderer):
    """Two objects of one name are nothing that the evaluator could tell from one."""
    names, distances = ["red cube", "red cube", "gray sphere"], []
    for scene in ("a", "b", "c"):
        placed, _, _ = renderer.layout(scene, names)
        found = find_objects(pixels(renderer.pictures(scene, names, [3])[0]))
        assert sorted(colour for colour, _, _ in found) == ["gray", "red", "red"]
        for name, x, y, _ in placed[:3]:
            distances.append(min(np.hypot(x - a, y - b) for c, a, b in found if c == name.split()[0]))
    assert np.median(distances) < 0.4  # of some 1.2 that an object is wide


def test_pictures_without_objects_have_none(renderer):
    assert find_objects(pixels(renderer.pictures("empty", ["red cube"], [0])[0])) == []
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
    for picture in (noise, np.zeros_like(noise), np.full_like(noise, 255)):
        find_objects(picture)  # whatever it finds, it ends


def test_both_judges_on_samples(tmp_path, capsys, run, refused):
    conditions = tmp_path / "four.json"
    conditions.write_text('[["red cube"], ["cyan sphere"], ["gray cylinder", "red cube"], ["blue cube"]]')
    shipped = str(ROOT / "weights" / "small")
    argv = ["--weights", shipped, "--out", str(tmp_path / "out")]
    sample.main(["--mode", str(conditions), "--seeds", "2", *argv])
    report = json.loads((tmp_path / "out" / "four.json").read_text())
    capsys.readouterr()
    metrics.main([str(tmp_path / "out" / "four")])
    line = capsys.readouterr().out
    assert line.startswith(f"{tmp_path / 'out' / 'four'}: 8 pictures, accuracy {report['accuracy']:.4f}, ")
    assert f"exact set {report['exact_set']:.4f}; number and colours right " in line
    assert float(line.split()[-1]) >= 0.5
    sheet = tmp_path / "sheet.png"
    process = run(ROOT, "benchmarks/failures.py", tmp_path / "out" / "four", "--out", sheet)
    assert process.returncode == 0, process.stderr
    assert "of 4 pictures of four.json, seed 0" in process.stdout
    refused(metrics.main, [tmp_path / "nowhere"], "nowhere.json: no such file")
    (tmp_path / "four").mkdir()
    refused(metrics.main, [tmp_path / "four"], "four.json: expected the report that sample.py writes")
