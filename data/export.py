"""Exports pictures with their labels in the format of Hugging Face datasets."""

import shutil
from pathlib import Path

from dataset import ICLEVRDataset, to_png
from infra.commands import InputError
from infra.files import contents, temporary_beside
from label_files import names_of, scene_of

CARD = """---
license: mit
pretty_name: i-CLEVR, rendered anew
task_categories:
- text-to-image
tags:
- i-clevr
- clevr
size_categories:
- {size}
---

# i-CLEVR, rendered anew

{count:,} pictures of 64x64 pixels with 1 to {most} objects each, rendered by iclevr-ddpm in the way of i-CLEVR
(El-Nouby et al., [arXiv 1811.09845](https://arxiv.org/abs/1811.09845)). They are not the original pictures.

```python
from datasets import load_dataset
pictures = load_dataset("{name}", split="train")
names = pictures.features["objects"].feature.names
print(pictures[0]["image"], [names[i] for i in pictures[0]["objects"]])
```

| column | content |
|---|---|
| `image` | the picture |
| `objects` | the objects that it shows: indices of the 24 names, such as "red cube" |
| `scene` | the pictures of a scene show the same objects in the same places, one more in each |
| `file_name` | the name in `train.json` |
"""


def export(data: ICLEVRDataset, folder: Path):
    """Write a data set as a folder that `datasets.load_dataset` opens: a Parquet file and a card. Raises InputError."""
    try:
        import datasets  # not in requirements.txt
    except ImportError:
        raise InputError("--export: wants the library datasets; pip install datasets") from None
    if contents(folder):
        raise InputError(f"{folder}: not empty; choose another folder")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": datasets.Sequence(datasets.ClassLabel(names=names_of(data.objects))),
            "scene": datasets.Value("string"),
            "file_name": datasets.Value("string"),
        }
    )
    images = [{"bytes": to_png(image), "path": name} for image, name in zip(data.images, data.filenames, strict=True)]
    columns = {
        "image": images,
        "objects": [[data.objects[name] for name in condition] for condition in data.conditions],
        "scene": [scene_of(name) for name in data.filenames],
        "file_name": data.filenames,
    }
    count = len(data)
    size = "n<1K" if count < 1000 else "1K<n<10K" if count < 10_000 else "10K<n<100K"
    most = max(len(condition) for condition in data.conditions)
    temporary = temporary_beside(folder.resolve())
    try:
        (temporary / "data").mkdir(parents=True)
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(temporary / "data" / "train-00000-of-00001.parquet")
        card = CARD.format(size=size, count=count, most=most, name=folder.resolve().name)
        (temporary / "README.md").write_text(card)
        if folder.exists():
            folder.rmdir()  # it is empty
        temporary.replace(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{folder}: {count:,} pictures; datasets.load_dataset({str(folder)!r})")
