"""Label files and pictures."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from conftest import OFFICIAL, ROOT
from data import render
from infra.files import file_sha256
from label_files import load_conditions, load_labels, load_objects


def kinds(path):
    """How many conditions have n objects of c colours: (n, c) -> count."""
    conditions = load_conditions(path, load_objects())
    return Counter((len(c), len({name.split()[0] for name in c})) for c in conditions)


def sets(path):
    return [frozenset(c) for c in load_conditions(path, load_objects())]


def pixels(path):
    """The numbers [H, W, 3] of a picture, which may be subtracted."""
    return np.array(Image.open(path)).astype(int)


@pytest.mark.slow
def test_label_files_are_what_the_command_makes(tmp_path):
    render.main(["--make-labels", "--seed", "0", "--out", str(tmp_path)])
    made = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(made) == ["new_test.json", "objects.json", "test.json", "train.json", "validation.json"]
    for name, content in made.items():
        assert (ROOT / name).read_bytes() == content, name


def test_train_labels_have_the_official_statistics():
    labels = load_labels(ROOT / "train.json", load_objects())
    assert len(labels) == 18009
    names = list(labels)
    scenes = [names[i : i + 3] for i in range(0, len(names), 3)]
    for files in scenes:  # nested, adjacent
        assert [f[-6:] for f in files] == ["_0.png", "_1.png", "_2.png"] and len({f[:-6] for f in files}) == 1
        assert labels[files[0]] == labels[files[1]][:1] and labels[files[1]] == labels[files[2]][:2]
    order = [int(files[0][12:18]) for files in scenes]
    assert sorted(order) == list(range(6003)) != order
    shows = Counter(name for condition in labels.values() for name in condition)
    assert len(shows) == 24 and min(shows.values()) > 1350 and max(shows.values()) < 1650
    triples = [c for c in labels.values() if len(c) == 3]
    shared = sum(len({n.split()[0] for n in c}) < 3 for c in triples) / len(triples)
    assert 0.22 < shared < 0.27
    assert 100 < math.comb(24, 3) - len({frozenset(c) for c in triples}) < 180  # never shown


def test_the_test_lists_have_the_official_numbers_of_objects_and_colors():
    in_train = {frozenset(c) for c in load_labels(ROOT / "train.json", load_objects()).values()}
    test = sets(ROOT / "test.json")
    new_test = sets(ROOT / "new_test.json")
    validation = sets(ROOT / "validation.json")
    assert kinds(ROOT / "test.json") == {(1, 1): 6, (2, 2): 12, (3, 3): 11, (3, 2): 3}
    assert kinds(ROOT / "new_test.json") == {(2, 1): 9, (2, 2): 3, (3, 1): 3, (3, 2): 16, (3, 3): 1}
    assert sum(s in in_train for s in test) == 31 and all(s in in_train for s in new_test)
    assert len(set().union(*test)) == len(set().union(*new_test)) == 24
    assert len(validation) == 64 and all(s in in_train for s in validation)  # so none of the unseen triples
    assert len({*test, *new_test, *validation}) == 128


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the lab's label files are not here")
def test_our_lists_have_the_make_up_of_the_official_ones():
    for name in ("test.json", "new_test.json"):
        assert kinds(OFFICIAL / name) == kinds(ROOT / name)
        assert not set(sets(OFFICIAL / name)) >= set(sets(ROOT / name))  # the project's own draws
    assert load_objects(OFFICIAL / "objects.json") == load_objects()


@pytest.mark.slow
def test_labels_are_never_overwritten(tmp_path, refused):
    (tmp_path / "train.json").write_text("{}")
    refused(render.main, ["--make-labels", "--out", tmp_path], tmp_path / "train.json")
    assert [p.name for p in tmp_path.iterdir()] == ["train.json"]


@pytest.mark.slow
def test_bytes_are_the_same_for_any_number_of_workers_and_after_a_stop(pictures, tmp_path):
    render.main(["--limit", "2", "--workers", "2", "--out", str(tmp_path / "a")])
    files = sorted(p.name for p in (tmp_path / "a").glob("*.png"))
    assert len(files) == 6
    command = [sys.executable, "-m", "data.render", "--limit", "4", "--workers", "1", "--out", tmp_path / "a"]
    # One worker takes a second for the last scene: time to be stopped in. As `nohup ... &` starts it: a shell
    # has such a process ignore Ctrl-C, but SIGTERM must stop it.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "a").glob("*.png"))) == 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "the same command goes on" in errors and process.returncode == 130
    render.main(["--limit", "4", "--out", str(tmp_path / "a")])
    for path in pictures.glob("*.png"):
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "a" / "manifest.json").read_text() == (pictures / "manifest.json").read_text()


def test_manifest_says_what_was_made(pictures):
    manifest = json.loads((pictures / "manifest.json").read_text())
    assert manifest["scenes_done"] == 4 and manifest["options"]["seed"] == 0
    assert manifest["labels_sha256"] == file_sha256(ROOT / "train.json")


def test_folders_of_others_are_left_alone(pictures, tmp_path, refused):
    (tmp_path / "mine").mkdir()
    shutil.copy(next(pictures.glob("*.png")), tmp_path / "mine" / "holiday.png")
    refused(render.main, ["--limit", "1", "--out", tmp_path / "mine"], tmp_path / "mine", "did not make")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["holiday.png"]
    shutil.copytree(pictures, tmp_path / "ours")
    refused(render.main, ["--limit", "5", "--seed", "1", "--out", tmp_path / "ours"], "manifest.json", "options")
    all_labels = load_labels(ROOT / "train.json", load_objects())
    labels = {filename: condition for filename, condition in all_labels.items() if filename.endswith("_0.png")}
    (tmp_path / "singles.json").write_text(json.dumps(labels))
    argv = ["--labels", tmp_path / "singles.json", "--out", tmp_path / "ours"]
    refused(render.main, argv, "manifest.json", "labels_sha256")


def test_labels_that_are_not_nested_are_refused(tmp_path, refused):
    labels = {"CLEVR_train_000000_0.png": ["red cube"], "CLEVR_train_000000_1.png": ["blue cube", "red cube"]}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    argv = ["--labels", tmp_path / "labels.json", "--out", tmp_path / "out"]
    refused(render.main, argv, "CLEVR_train_000000_0.png")
    assert not (tmp_path / "out").exists()


def test_steps_of_a_scene_share_ground_and_add_one_object(pictures):
    labels = load_labels(ROOT / "train.json", load_objects())
    names = list(labels)[:12]
    for i in range(0, 12, 3):
        one = pixels(pictures / names[i])
        two = pixels(pictures / names[i + 1])
        three = pixels(pictures / names[i + 2])
        assert one.shape == (64, 64, 3)
        for before, after in ((one, two), (two, three)):
            changed = np.abs(after - before).max(-1) > 12
            assert 20 < changed.sum() < 700  # one object and its shadow
            far = np.abs(after - before)[:8]  # the same ground, but for faint shadows
            assert far.mean() < 0.5 and far.max() <= 6


def test_colors_are_those_of_the_label(pictures):
    """The first object stands in the middle: its colour must be nearest to its name's."""
    labels = load_labels(ROOT / "train.json", load_objects())
    for name in [n for n in list(labels)[:12] if n.endswith("_0.png")]:
        image = np.array(Image.open(pictures / name)).astype(float)
        center = image[25:30, 30:34].reshape(-1, 3).mean(0)
        hue = {c: np.array(rgb) / np.linalg.norm(rgb) for c, rgb in render.COLORS.items()}
        # CLEVR's colours are linear, pictures are not.
        linear = (center / 255) ** 2.2
        nearest = max(hue, key=lambda c: hue[c] @ linear / np.linalg.norm(linear))
        assert nearest == labels[name][0].split()[0], (name, center)


@pytest.mark.slow
def test_placement_keeps_the_rules():
    renderer = render.Renderer("64x64", 1, 0)
    for i in range(12):
        placed, lamps, _ = renderer.layout(f"scene_{i}", ["red cube", "blue sphere", "red sphere"])
        points = np.array([p[1:3] for p in placed])
        assert [p[0] for p in placed[:3]] == ["red cube", "blue sphere", "red sphere"] and len(placed) == 5
        assert (points[0] == 0).all() and np.abs(points).max() <= 3
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)[~np.eye(5, dtype=bool)]
        assert gaps.min() >= 2.45
        jitter = [lamps[n] - render.LAMPS[n][0] for n in lamps]
        assert 0 < np.abs(jitter).max() <= 1
    _, lamps, _ = renderer.layout("scene_3", ["red cube"])
    _, lamps_of_others, _ = renderer.layout("scene_3", ["blue cube"])
    assert lamps["key"] == pytest.approx(lamps_of_others["key"])


@pytest.mark.slow
def test_visibility_tells_objects_of_one_colour_apart():
    """Mitsuba merges meshes that share a material unless it is told not to: then none of them is counted."""
    renderer = render.Renderer("64x64", 1, 0)
    placed = renderer.place(np.random.default_rng(0), ["brown cube", "brown cylinder", "red cube"])
    names = {shape.id() for shape in renderer.scene(placed, {}, (320, 240)).shapes()}
    assert names == {"ground", *(f"object{i}" for i in range(5))}


@pytest.mark.slow
def test_ground_is_free_of_noise():
    """The default's light paths against 400: the goals of the project, in grey levels."""
    few = render.Renderer("64x64", render.SAMPLES, 0)
    many = render.Renderer("64x64", 400, 0)

    def picture(renderer, count):
        objects = ["red cube", "gray sphere", "yellow cylinder"]
        [image] = renderer.pictures("CLEVR_train_000000", objects, [count])
        return np.array(image).astype(float)

    ours = picture(few, 3)
    exact = picture(many, 3)
    empty = picture(few, 0)  # which is enough to tell what lies where
    is_object = np.abs(exact - empty).max(-1) > 25
    is_ground = np.abs(exact - empty).max(-1) < 4
    assert is_object.sum() > 150 and is_ground.sum() > 2500
    assert (ours - exact)[is_ground].std() < 0.7
    assert (ours - exact)[is_object].std() < 2


@pytest.mark.slow
def test_five_objects_are_rendered_in_the_original_size(tmp_path):
    labels = {"CLEVR_x_000000_4.png": ["red cube", "blue cube", "cyan sphere", "gray cylinder", "red sphere"]}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    out = tmp_path / "out"
    render.main(["--labels", str(tmp_path / "labels.json"), "--size", "320x240", "--out", str(out)])
    assert Image.open(out / "CLEVR_x_000000_4.png").size == (320, 240)


@pytest.mark.slow
def test_random_scenes_come_with_their_labels(tmp_path):
    render.main(["--random-scenes", "2", "--seed", "5", "--workers", "1", "--out", str(tmp_path)])
    labels = load_labels(tmp_path / "labels.json", load_objects())
    assert sorted(p.name for p in tmp_path.glob("*.png")) == sorted(labels)
    drawn = render.random_labels(1000, 5)
    assert list(drawn.items())[: len(labels)] == list(labels.items())
    scenes = render.group_scenes(drawn, tmp_path)  # each with all its steps
    assert all([len(drawn[f]) for f in of] == list(range(1, len(of) + 1)) for of in scenes.values())
    counts = Counter(map(len, scenes.values()))
    assert len(scenes) == 1000 and sorted(counts) == [1, 2, 3, 4, 5] and min(counts.values()) > 150
