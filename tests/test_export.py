"""The pictures in the format of Hugging Face datasets."""

import json

import numpy as np
import pytest
from PIL import Image

from conftest import NAMES, ROOT, listing
from data import render
from label_files import load_objects

datasets = pytest.importorskip("datasets")


@pytest.mark.slow
def test_load_dataset_opens_the_export_with_names_for_its_labels(pictures, tmp_path, refused):
    folder = tmp_path / "exported"
    argv = ["--out", str(pictures), "--export", str(folder)]
    render.main(argv)
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    labels = json.loads((ROOT / "train.json").read_text())
    names = rows.features["objects"].feature.names
    assert {name: index for index, name in enumerate(names)} == load_objects()
    assert rows["file_name"] == NAMES
    for row in rows:
        assert [names[i] for i in row["objects"]] == labels[row["file_name"]]
        assert row["file_name"].startswith(row["scene"])
        expected = np.asarray(Image.open(pictures / row["file_name"]).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(row["image"]), expected)
    assert "load_dataset" in (folder / "README.md").read_text()

    before = listing(folder)
    refused(render.main, argv, folder, "not empty")
    assert listing(folder) == before
