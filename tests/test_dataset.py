"""Pictures and labels, and every way in which they can be wrong."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import OFFICIAL, ROOT
from PIL import Image

import dataset
import train
from dataset import CACHE_NAME, ICLEVRDataset, InputError, load_conditions, load_labels, load_objects

OBJECTS = load_objects()
LABELS = load_labels(ROOT / "train.json", OBJECTS)
NAMES = list(LABELS)[:12]  # those of the fixture `pictures`


@pytest.fixture
def folder(pictures, tmp_path):
    """A copy of the pictures without manifest, with a label file that names just them: like the lab's own."""
    for name in NAMES:
        shutil.copy(pictures / name, tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({n: LABELS[n] for n in NAMES}))
    return tmp_path


def load(folder):
    return ICLEVRDataset(folder, folder / "labels.json", OBJECTS)


def test_items(pictures):
    data = ICLEVRDataset(pictures, ROOT / "train.json", OBJECTS)
    assert len(data) == 12 and data.total == 18009 and data.filenames == NAMES
    image, label = data[2]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert -1 <= image.min() < image.max() <= 1
    assert label.shape == (24,) and label.nonzero().flatten().tolist() == sorted(
        OBJECTS[n] for n in LABELS[NAMES[2]]
    )
    pixels = np.array(Image.open(pictures / NAMES[2]))
    assert torch.equal(dataset.to_uint8(image).permute(1, 2, 0), torch.from_numpy(pixels))


def test_a_stopped_render_trains_on_its_whole_scenes_and_says_so(pictures, tmp_path, capsys):
    part = shutil.copytree(pictures, tmp_path / "part")
    manifest = json.loads((part / "manifest.json").read_text()) | {"scenes_done": 3}
    (part / "manifest.json").write_text(json.dumps(manifest))
    assert len(ICLEVRDataset(part, ROOT / "train.json", OBJECTS)) == 9
    train.main(["--model", "small", "--data", str(part), "--out", str(tmp_path / "run"), "--dry-run"])
    assert "9 of 18,009 pictures" in capsys.readouterr().out


def test_labels_of_another_set_are_refused(pictures, tmp_path):
    other = tmp_path / "train.json"
    other.write_text(json.dumps(dict(reversed(LABELS.items()))))
    with pytest.raises(InputError, match="another label file.*render.py --labels .*--out DIR"):
        ICLEVRDataset(pictures, other, OBJECTS)


def test_without_manifest_every_picture_must_be_there(folder):
    assert len(load(folder)) == 12
    (folder / NAMES[4]).unlink()
    with pytest.raises(InputError, match=f"{NAMES[4]}: no such picture"):
        load(folder)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_pictures_of_the_original_size_are_squashed(folder, mode):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)).convert(
        mode
    )
    wide.save(folder / NAMES[0])
    squashed = np.array(wide.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
    assert torch.equal(load(folder).images[0].permute(1, 2, 0), torch.from_numpy(squashed))


def test_cache_is_used_and_notices_a_changed_file(folder):
    first = load(folder).images
    stamp = (folder / CACHE_NAME).stat().st_mtime_ns
    assert torch.equal(load(folder).images, first) and (folder / CACHE_NAME).stat().st_mtime_ns == stamp
    Image.new("RGB", (64, 64), (255, 0, 0)).save(folder / NAMES[0])
    assert load(folder).images[0, 0].min() == 255
    (folder / CACHE_NAME).write_bytes(b"cut off")
    assert load(folder).images[0, 0].min() == 255


def test_links_are_followed(pictures, tmp_path):
    (tmp_path / "iclevr").symlink_to(pictures, target_is_directory=True)
    assert len(ICLEVRDataset(tmp_path / "iclevr", ROOT / "train.json", OBJECTS)) == 12


@pytest.mark.parametrize("content", [b"", b"not a picture", "cut"])
def test_broken_pictures_are_named(folder, content):
    path = folder / NAMES[7]
    path.write_bytes(path.read_bytes()[:700] if content == "cut" else content)
    with pytest.raises(InputError, match=f"{NAMES[7]}: not a readable picture"):
        load(folder)


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "CMYK"])
def test_pictures_of_another_mode_are_refused(folder, mode):
    Image.new(mode, (64, 64)).save(folder / NAMES[0], "tiff")
    with pytest.raises(InputError, match=f"{NAMES[0]}: expected an RGB or RGBA"):
        load(folder)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (["red cube", "mauve cube"], "unknown object 'mauve cube'"),
        (["red cube", "red cube"], "'red cube' stands there twice"),
        ([], "expected a list of 1 to 5 objects"),
        (
            ["red cube", "blue cube", "gray cube", "cyan cube", "green cube", "brown cube"],
            "expected a list of 1 to 5",
        ),
        ("red cube", "expected a list of 1 to 5"),
        ([3], "unknown object 3"),
    ],
)
def test_bad_conditions_are_named(tmp_path, condition, message):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([["red cube"], condition]))
    with pytest.raises(InputError, match=f"list.json, entry 1: .*{message}"):
        load_conditions(path, OBJECTS)
    path.write_text(json.dumps({NAMES[0]: ["red cube"], NAMES[1]: condition}))
    with pytest.raises(InputError, match=f"list.json, entry '{NAMES[1]}': .*{message}"):
        load_labels(path, OBJECTS)


def test_bad_label_files_are_named(tmp_path):
    path = tmp_path / "bad.json"
    cut = (ROOT / "train.json").read_text()[: 1 << 20]  # as seen in the wild
    for text in (
        cut,
        "",
        '{"a_0.png": ["red cube"], "a_0.png": ["red cube"]}',
        "[]",
        "{}",
        '[["red cube"]]',
        "\udc80",
    ):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match="bad.json"):
            load_labels(path, OBJECTS)
    for name in ("../up_0.png", "a.png", "a_0.jpg", "/a_0.png"):
        path.write_text(json.dumps({name: ["red cube"]}))
        with pytest.raises(InputError, match="expected a file name like"):
            load_labels(path, OBJECTS)
    path.write_text(json.dumps({**OBJECTS, "gray cube": 1}))
    with pytest.raises(InputError, match="bad.json"):
        load_objects(path)


def test_split_keeps_scenes_whole():
    names = list(LABELS)
    kept, held = dataset.split_by_scene(names, 0.1, seed=3)
    assert sorted(kept + held) == list(range(len(names))) and len(held) == 3 * 600
    assert not {dataset.scene_of(names[i]) for i in kept} & {dataset.scene_of(names[i]) for i in held}


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the lab's label files are not here")
def test_official_files_drop_in(clone, pictures, run):
    """With our pictures they are refused; pictures rendered for them, as 320x240 RGBA, work."""
    shutil.copytree(pictures, clone / "iclevr")
    for path in OFFICIAL.glob("*.json"):
        shutil.copy(path, clone)
    train_two = ["train.py", "--model", "small", "--max-steps", 2, "--batch-size", 4, "--sample-every", 0]
    process = run(clone, *train_two)
    assert process.returncode == 2 and "another label file" in process.stderr
    assert run(clone, "render.py", "--limit", 2, "--size", "320x240", "--out", "lab").returncode == 0
    for path in (clone / "lab").glob("*.png"):
        Image.open(path).convert("RGBA").save(path)
    process = run(clone, *train_two, "--data", "lab")
    assert process.returncode == 0, process.stderr
    assert "6 of 18,009 pictures" in process.stdout
