"""Pictures and labels, and every way in which they can be wrong."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import OFFICIAL, ROOT
from PIL import Image

import dataset
import train
from data import render
from data.pack import PACK
from dataset import CACHE_NAME, ICLEVRDataset, InputError
from labels import load_labels, load_objects, mistaken_labels, multi_hot, twin_labels

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


def test_unseen_triples():
    """In scenes of four objects each three of them count as seen."""
    unseen = dataset.unseen_triples(LABELS, OBJECTS, count=10**6)
    triples = {frozenset(c) for c in LABELS.values() if len(c) == 3}
    assert len(unseen) + len(triples) == 2024 and not triples & set(map(frozenset, unseen))
    assert dataset.unseen_triples(LABELS, OBJECTS)[0] in unseen
    four = unseen[0] + [next(n for n in OBJECTS if n not in unseen[0])]
    left = dataset.unseen_triples(LABELS | {"CLEVR_train_999999_3.png": four}, OBJECTS, count=10**6)
    assert unseen[0] in unseen and not any(set(c) <= set(four) for c in left)


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


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with labels.json of two scenes, their pictures in set/ and those packed in set.npz."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "labels.json").write_text(json.dumps({n: LABELS[n] for n in NAMES[:6]}))
    for more in ([], ["--pack"]):
        render.main(["--labels", str(folder / "labels.json"), "--out", str(folder / "set"), *more])
    return folder


def test_a_pack_holds_the_pictures_byte_for_byte(packed, tmp_path):
    data = ICLEVRDataset(packed / "set.npz", packed / "labels.json", OBJECTS)
    source = ICLEVRDataset(packed / "set", packed / "labels.json", OBJECTS)
    assert torch.equal(data.images, source.images) and torch.equal(data.labels, source.labels)
    assert data.filenames == source.filenames and data.total == 6
    assert all(torch.equal(a, b) for a, b in zip(data[4], source[4], strict=True))
    assert data[4][0].is_contiguous()
    with np.load(packed / "set.npz") as file:  # as the README tells those without our code
        images = file["differences"].cumsum(1, np.uint8).cumsum(3, np.uint8).reshape(-1, 64, 64, 3)
        assert [file["objects"][row.astype(bool)].tolist() for row in file["labels"]] == [
            sorted(LABELS[n], key=OBJECTS.get) for n in file["filenames"]
        ]
        assert json.loads(str(file["manifest"])) == json.loads((packed / "set" / "manifest.json").read_text())
    for name, image in zip(NAMES[:6], images, strict=True):
        assert np.array_equal(np.array(Image.open(packed / "set" / name)), image)
    shutil.copytree(packed / "set", tmp_path / "set")  # the same pictures make the same bytes
    render.main(["--labels", str(packed / "labels.json"), "--out", str(tmp_path / "set"), "--pack"])
    assert (tmp_path / "set.npz").read_bytes() == (packed / "set.npz").read_bytes()


def test_verify_renders_again_and_finds_a_changed_picture(packed, tmp_path, capsys):
    def verify(folder):
        capsys.readouterr()
        argv = ["--labels", packed / "labels.json", "--out", folder / "set", "--verify", "--limit", 2]
        render.main(list(map(str, argv)))
        return capsys.readouterr().out

    assert "6 of 6 pictures rendered again\n0.0000% of their pixels differ, by 0 grey" in verify(packed)
    shutil.copytree(packed / "set", tmp_path / "set")
    image = np.array(Image.open(tmp_path / "set" / NAMES[4]))
    image[0, 0, 0] += 3
    Image.fromarray(image).save(tmp_path / "set" / NAMES[4])
    render.main(["--labels", str(packed / "labels.json"), "--out", str(tmp_path / "set"), "--pack"])
    assert "0.0041% of their pixels differ, by 3 grey" in verify(tmp_path)  # one of 6 x 4096


def test_what_is_no_whole_rendered_set_is_not_packed(packed, pictures, folder, tmp_path, refused):
    part = shutil.copytree(pictures, tmp_path / "part")
    refused(render.main, ["--out", part, "--pack"], "12 of 18,009 pictures")
    refused(render.main, ["--out", folder, "--labels", folder / "labels.json", "--pack"], "did not make")
    refused(render.main, ["--out", tmp_path / "none", "--pack"], "no pictures there")
    refused(render.main, ["--out", tmp_path / "none", "--verify"], "none.npz: no such file")
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("content", [b"", b"PK not really", "cut", "arrays", "shape", "flipped"])
def test_broken_packs_are_refused(packed, tmp_path, content):
    path = tmp_path / "bad.npz"
    whole = (packed / "set.npz").read_bytes()
    if content == "arrays":
        np.savez(path, images=np.zeros(3))
    elif content == "shape":
        np.savez(path, differences=np.zeros((2, 3, 32, 32, 3), np.uint8), manifest=np.array("{}"))
    elif content == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "flipped":
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:])
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="bad.npz: "):
        ICLEVRDataset(path, packed / "labels.json", OBJECTS)


def test_packs_of_other_labels_are_refused(packed):
    with pytest.raises(InputError, match="set.npz: .*another label file"):
        ICLEVRDataset(packed / "set.npz", ROOT / "train.json", OBJECTS)


def test_the_pack_that_ships(pictures, clone, run):
    """It is whole, what render.py makes (but for the last bit of other processors), and lean to read."""
    data = ICLEVRDataset(PACK, ROOT / "train.json", OBJECTS)
    assert data.filenames == list(LABELS) and data.images.shape == (18009, 3, 64, 64)
    assert os.path.getsize(PACK) <= 32e6
    rendered = ICLEVRDataset(pictures, ROOT / "train.json", OBJECTS).images
    assert (data.images[:12] != rendered).float().mean() < 0.01
    code = (
        "from resource import *; from dataset import *; peak = lambda: getrusage(RUSAGE_SELF).ru_maxrss; "
        "before = peak(); ICLEVRDataset(PACK, ROOT / 'train.json', load_objects()); print(peak() - before)"
    )
    process = run(clone, "-c", code)
    assert int(process.stdout) < 400e3, process.stderr  # KiB


def test_links_are_followed(pictures, tmp_path):
    (tmp_path / "iclevr").symlink_to(pictures, target_is_directory=True)
    assert len(ICLEVRDataset(tmp_path / "iclevr", ROOT / "train.json", OBJECTS)) == 12


def test_split_keeps_scenes_whole():
    names = list(LABELS)
    kept, held = dataset.split_by_scene(names, 0.1, seed=3)
    assert sorted(kept + held) == list(range(len(names))) and len(held) == 3 * 600
    assert not {dataset.scene_of(names[i]) for i in kept} & {dataset.scene_of(names[i]) for i in held}


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the lab's label files are not here")
def test_official_files_drop_in(clone, pictures, run):
    """With our pictures they are refused; pictures rendered for them, as 320x240 RGBA, work."""
    for path in OFFICIAL.glob("*.json"):
        shutil.copy(path, clone)
    train_two = ["train.py", "--model", "small", "--max-steps", 2, "--batch-size", 4, "--sample-every", 0]
    for source in ("iclevr.npz", "iclevr"):
        process = run(clone, *train_two)
        assert process.returncode == 2 and f"{source}" in process.stderr
        assert "another label file" in process.stderr
        if source == "iclevr.npz":
            shutil.copytree(pictures, clone / "iclevr")
    assert run(clone, "-m", "data.render", "--limit", 2, "--size", "320x240", "--out", "lab").returncode == 0
    for path in (clone / "lab").glob("*.png"):
        Image.open(path).convert("RGBA").save(path)
    process = run(clone, *train_two, "--data", "lab")
    assert process.returncode == 0, process.stderr
    assert "6 of 18,009 pictures" in process.stdout


def test_twin_labels_give_an_object_the_shape_of_another_of_its_colour():
    objects = load_objects()
    assert twin_labels(["red cube", "blue cube"], objects).shape == (0, 24)
    cubes, spheres = twin_labels(["red sphere", "gray cube", "red cube"], objects)
    assert cubes.sum() == spheres.sum() == 3
    assert cubes[objects["red cube"]] == spheres[objects["red sphere"]] == 2
    assert cubes[objects["gray cube"]] == spheres[objects["gray cube"]] == 1
    assert len(twin_labels(["red cube", "red sphere", "red cylinder"], objects)) == 6


def test_mistaken_labels_have_one_mistake_each():
    """Per object: both other shapes, and one more of it."""
    mistakes = mistaken_labels(["red sphere", "red cube", "gray cube"], OBJECTS)
    right = multi_hot([["red sphere", "red cube", "gray cube"]], OBJECTS)
    changes = mistakes - right
    assert len(mistakes) == 9 and len(mistakes.unique(dim=0)) == 9 and mistakes.min() >= 0
    assert sorted(changes.sum(1).tolist()) == [0] * 6 + [1] * 3
    red_twice = right.clone()
    red_twice[0, OBJECTS["red cube"]], red_twice[0, OBJECTS["red sphere"]] = 2, 0
    assert (mistakes == red_twice).all(1).any()
