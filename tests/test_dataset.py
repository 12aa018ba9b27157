"""Pictures with their labels, from files to tensors."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
from conftest import NAMES, OFFICIAL, ROOT
from dataset import CACHE_NAME, ICLEVRDataset
from infra.commands import InputError
from label_files import load_labels, load_objects

OBJECTS = load_objects()
LABELS = load_labels(ROOT / "train.json", OBJECTS)


@pytest.fixture
def folder(pictures, tmp_path):
    """A copy of the pictures without manifest, with a label file that names just them: like the lab's own."""
    for name in NAMES:
        shutil.copy(pictures / name, tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({n: LABELS[n] for n in NAMES}))
    return tmp_path


def load(folder):
    return ICLEVRDataset(folder, folder / "labels.json", OBJECTS)


def test_an_item_is_a_float_picture_with_its_label(pictures):
    data = ICLEVRDataset(pictures, ROOT / "train.json", OBJECTS)
    assert len(data) == 12 and len(data.label_file) == 18009 and data.filenames == NAMES
    image, label = data[2]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert -1 <= image.min() < image.max() <= 1
    asked = sorted(OBJECTS[n] for n in LABELS[NAMES[2]])
    assert label.shape == (24,) and label.nonzero().flatten().tolist() == asked
    pixels = np.array(Image.open(pictures / NAMES[2]))
    assert torch.equal(dataset.to_uint8(image).permute(1, 2, 0), torch.from_numpy(pixels))


def test_without_manifest_every_picture_must_be_there(folder):
    assert len(load(folder)) == 12
    (folder / NAMES[4]).unlink()
    with pytest.raises(InputError, match=f"{NAMES[4]}: no such picture"):
        load(folder)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_pictures_of_the_original_size_are_squashed(folder, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    wide = Image.fromarray(pixels).convert(mode)
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


def test_a_link_to_a_folder_is_followed(pictures, tmp_path):
    (tmp_path / "iclevr").symlink_to(pictures, target_is_directory=True)
    assert len(ICLEVRDataset(tmp_path / "iclevr", ROOT / "train.json", OBJECTS)) == 12


# One process, since each takes seconds to load PyTorch: on the pack, on our pictures, on those for these labels.
TRAIN_ON_EACH = """
import train
argv = "--model small --max-steps 2 --batch-size 4 --sample-every 0".split()
codes = []
for data in ([], ["--data", "ours"]):
    try:
        train.main([*argv, *data])
    except SystemExit as stop:
        codes.append(stop.code)
print(*codes)
train.main([*argv, "--data", "lab"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the lab's label files are not here")
def test_the_labs_label_files_drop_in(clone, pictures, run):
    """With our pictures they are refused; pictures rendered for them, as 320x240 RGBA, work."""
    for path in OFFICIAL.glob("*.json"):
        shutil.copy(path, clone)
    assert run(clone, "-m", "data.render", "--limit", 2, "--size", "320x240", "--out", "lab").returncode == 0
    for path in (clone / "lab").glob("*.png"):
        Image.open(path).convert("RGBA").save(path)
    shutil.copytree(pictures, clone / "ours")
    process = run(clone, "-c", TRAIN_ON_EACH)
    assert process.returncode == 0, process.stderr
    with_pack, with_folder = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "iclevr.npz" in with_pack and "another label file" in with_pack
    assert "ours" in with_folder and "another label file" in with_folder
    assert "2 2" in process.stdout.splitlines() and "6 of 18,009 pictures" in process.stdout
