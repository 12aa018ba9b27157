"""Packs and manifests: a rendered set in one file, and whether it belongs to a label file."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import train
from conftest import NAMES, ROOT
from data import render
from data.pack import PACK
from dataset import ICLEVRDataset
from infra.commands import InputError
from label_files import load_labels, load_objects

OBJECTS = load_objects()
LABELS = load_labels(ROOT / "train.json", OBJECTS)
MEMORY = """
from resource import RUSAGE_SELF, getrusage
from data.pack import PACK
from dataset import ICLEVRDataset
from infra.commands import ROOT
from label_files import load_objects

before = getrusage(RUSAGE_SELF).ru_maxrss
ICLEVRDataset(PACK, ROOT / "train.json", load_objects())
print(getrusage(RUSAGE_SELF).ru_maxrss - before)
"""  # in KiB, how much more memory the process needed at its peak to read the pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with labels.json of two scenes, their pictures in set/ and those packed in set.npz."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "labels.json").write_text(json.dumps({n: LABELS[n] for n in NAMES[:6]}))
    argv = ["--labels", str(folder / "labels.json"), "--out", str(folder / "set")]
    render.main([*argv, "--workers", "1"])
    render.main([*argv, "--pack"])
    return folder


@pytest.mark.slow
def test_a_pack_holds_the_pictures_byte_for_byte(packed, tmp_path):
    data = ICLEVRDataset(packed / "set.npz", packed / "labels.json", OBJECTS)
    source = ICLEVRDataset(packed / "set", packed / "labels.json", OBJECTS)
    assert torch.equal(data.images, source.images) and torch.equal(data.labels, source.labels)
    assert data.filenames == source.filenames and len(data.label_file) == 6
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


@pytest.mark.slow
def test_verify_renders_again_and_finds_a_changed_picture(packed, tmp_path, capsys):
    def verify(folder):
        capsys.readouterr()
        argv = ["--labels", packed / "labels.json", "--out", folder / "set", "--verify", "--limit", 2, "--workers", 1]
        render.main(list(map(str, argv)))
        return capsys.readouterr().out

    assert "6 of 6 pictures rendered again\n0.0000% of their pixels differ, by 0 grey" in verify(packed)
    shutil.copytree(packed / "set", tmp_path / "set")
    image = np.array(Image.open(tmp_path / "set" / NAMES[4]))
    image[0, 0, 0] += 3
    Image.fromarray(image).save(tmp_path / "set" / NAMES[4])
    render.main(["--labels", str(packed / "labels.json"), "--out", str(tmp_path / "set"), "--pack"])
    assert "0.0041% of their pixels differ, by 3 grey" in verify(tmp_path)  # one of 6 x 4096


@pytest.mark.slow
def test_verify_checks_the_pack_that_ships_unless_a_folder_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "iclevr.npz").write_bytes(b"not looked at")
    render.main(["--verify", "--limit", "1", "--workers", "1"])
    assert f"{PACK}: 3 of 18,009 pictures rendered again" in capsys.readouterr().out


def test_what_is_no_whole_rendered_set_is_not_packed(pictures, tmp_path, refused):
    part = shutil.copytree(pictures, tmp_path / "part")
    refused(render.main, ["--out", part, "--pack"], "12 of 18,009 pictures")
    mine = tmp_path / "mine"  # without manifest, like the lab's own
    shutil.copytree(pictures, mine, ignore=shutil.ignore_patterns("manifest.json"))
    (mine / "labels.json").write_text(json.dumps({n: LABELS[n] for n in NAMES}))
    refused(render.main, ["--out", mine, "--labels", mine / "labels.json", "--pack"], "did not make")
    refused(render.main, ["--out", tmp_path / "none", "--pack"], "no pictures there")
    refused(render.main, ["--out", tmp_path / "none", "--verify"], "none.npz: no such file")
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.slow
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


@pytest.mark.slow
def test_packs_of_other_labels_are_refused(packed):
    with pytest.raises(InputError, match="set.npz: .*another label file"):
        ICLEVRDataset(packed / "set.npz", ROOT / "train.json", OBJECTS)


@pytest.mark.slow
def test_the_pack_that_ships_is_whole_and_lean_to_read(pictures, clone, run):
    """It is whole, what render.py makes (but for the last bit of other processors), and lean to read."""
    data = ICLEVRDataset(PACK, ROOT / "train.json", OBJECTS)
    assert data.filenames == list(LABELS) and data.images.shape == (18009, 3, 64, 64)
    assert PACK.stat().st_size <= 32e6
    rendered = ICLEVRDataset(pictures, ROOT / "train.json", OBJECTS).images
    assert (data.images[:12] != rendered).float().mean() < 0.01
    process = run(clone, "-c", MEMORY)
    assert int(process.stdout) < 400e3, process.stderr


@pytest.mark.slow
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
    with pytest.raises(InputError, match="another label file.*data.render --labels .*--out DIR"):
        ICLEVRDataset(pictures, other, OBJECTS)
