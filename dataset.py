"""i-CLEVR labels and pictures: from files to one multi-hot tensor and one uint8 tensor.

Pictures are squashed to 64x64 without crop or padding: both would lose objects that the label names.
"""

import hashlib
import itertools
import json
import os
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from commands import ROOT, InputError, did_you_mean, shown
from files import load_json, parse_json, temporary_beside, text_sha256

IMAGE_SIZE = 64
NUM_OBJECTS = 24
MAX_OBJECTS = 5  # a CLEVR scene of this kind holds no more
MAX_PIXELS = 4096 * 4096  # of a picture: one of more is a mistake or a decompression bomb
Image.MAX_IMAGE_PIXELS = None  # instead of Pillow's own limit, up to twice of which it only warns
CACHE_NAME = f".pictures-{IMAGE_SIZE}.safetensors"
MANIFEST_NAME = "manifest.json"
PACK = ROOT / "iclevr.npz"  # the pictures that ship
HELD_OUT = ROOT / "held_out.npz"  # others of the first 700 scenes of the same labels, to compare samples with


# ------------------------------------------------------------------------------------------------ label files


def load_objects(path: Path | str = ROOT / "objects.json") -> dict[str, int]:
    """Read `objects.json`: 24 names like "red cube", each with its own index in 0..23. Raises InputError."""
    objects = load_json(path)
    indices = sorted(map(str, objects.values())) if isinstance(objects, dict) else []
    if indices != sorted(map(str, range(NUM_OBJECTS))):
        raise InputError(
            f"{path}: expected {NUM_OBJECTS} names with the indices 0 to {NUM_OBJECTS - 1}, each once"
        )
    for name in objects:
        if len(name.split()) != 2:
            raise InputError(f"{path}, entry {shown(name)}: expected a colour and a shape")
    return {name: int(index) for name, index in objects.items()}


def check_condition(condition, objects: dict[str, int], where: str) -> list[str]:
    """Return `condition` if it lists 1 to 5 different known names, else raise InputError with `where`."""
    if not isinstance(condition, list) or not 1 <= len(condition) <= MAX_OBJECTS:
        raise InputError(f"{where}: expected a list of 1 to {MAX_OBJECTS} objects, got {shown(condition)}")
    for name in condition:
        if not isinstance(name, str) or name not in objects:
            nearest = did_you_mean(str(name), objects)
            raise InputError(f"{where}: unknown object {shown(name)}{nearest}")
        if condition.count(name) > 1:
            raise InputError(f"{where}: {shown(name)} stands there twice, expected different objects")
    return condition


def load_conditions(path: Path | str, objects: dict[str, int]) -> list[list[str]]:
    """Read conditions: a JSON list of lists of names, like `test.json`, or those of labelled pictures, like
    `train.json`, in their order. Raises InputError."""
    conditions = load_json(path)
    if isinstance(conditions, dict) and conditions:
        return list(load_labels(path, objects).values())
    if not isinstance(conditions, list) or not conditions:
        raise InputError(f"{path}: expected a list of lists of object names, like test.json")
    return [check_condition(c, objects, f"{path}, entry {i}") for i, c in enumerate(conditions)]


def load_labels(path: Path | str, objects: dict[str, int]) -> dict[str, list[str]]:
    """Read labels of pictures (the format of `train.json`): file name -> list of names. Raises InputError."""
    labels = load_json(path)
    if not isinstance(labels, dict) or not labels:
        raise InputError(
            f"{path}: expected a mapping of file names to lists of object names, like train.json"
        )
    for filename, condition in labels.items():
        scene_of(filename, path)
        check_condition(condition, objects, f"{path}, entry {shown(filename)}")
    return labels


def multi_hot(conditions: list[list[str]], objects: dict[str, int]) -> torch.Tensor:
    """Turn N lists of names into a float32 tensor [N, 24] of zeros and ones."""
    labels = torch.zeros(len(conditions), NUM_OBJECTS)
    for i, condition in enumerate(conditions):
        labels[i, [objects[name] for name in condition]] = 1
    return labels


def twin_labels(condition: list[str], objects: dict[str, int]) -> torch.Tensor:
    """The labels [K, 24] in which an object took the shape of another of its colour: a red cube and a red
    sphere as two cubes, with a 2 in their place, or as two spheres. n objects of a colour make n (n - 1)."""
    labels = multi_hot([condition], objects)
    pairs = [(a, b) for a, b in itertools.permutations(condition, 2) if a.split()[0] == b.split()[0]]
    twins = labels.repeat(len(pairs), 1)
    for twin, (lost, doubled) in zip(twins, pairs, strict=True):
        twin[objects[lost]], twin[objects[doubled]] = 0, 2
    return twins


def mistaken_labels(condition: list[str], objects: dict[str, int]) -> torch.Tensor:
    """The labels [3 K, 24] of a condition of K objects with one mistake in it: an object in another of the
    three shapes, or painted twice."""
    labels = multi_hot([condition], objects).repeat(3 * len(condition), 1)
    pairs = [(a, b) for a in condition for b in objects if a.split()[0] == b.split()[0]]
    for label, (name, painted) in zip(labels, pairs, strict=True):
        if painted != name:
            label[objects[name]] -= 1
        label[objects[painted]] += 1
    return labels


def unseen_triples(
    labels: dict[str, list[str]], objects: dict[str, int], count: int = 100
) -> list[list[str]]:
    """Up to `count` sets of three objects that appear together in no picture of `labels`, drawn evenly."""
    seen = {frozenset(triple) for c in labels.values() for triple in itertools.combinations(c, 3)}
    names = sorted(objects, key=objects.get)
    unseen = [list(triple) for triple in itertools.combinations(names, 3) if frozenset(triple) not in seen]
    chosen = np.random.default_rng(0).permutation(len(unseen))[:count]
    return [unseen[i] for i in sorted(chosen)]


def scene_of(filename: str, path: Path | str = "labels") -> str:
    """The scene of a picture: `CLEVR_train_002066_1.png` -> `CLEVR_train_002066`. Raises InputError."""
    match = re.fullmatch(r"([\w-]+)_(\d+)\.png", filename, re.ASCII)
    if not match or len(filename) > 255:  # bytes that a file system takes
        raise InputError(
            f"{path}, entry {shown(filename)}: expected a file name like CLEVR_train_002066_1.png"
        )
    return match[1]


def split_by_scene(filenames: list[str], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Split picture indices into (train, held out) so that no scene has pictures in both."""
    scenes = sorted({scene_of(f) for f in filenames})
    order = np.random.default_rng(seed).permutation(len(scenes))
    chosen = {scenes[i] for i in order[: max(1, round(held_out * len(scenes)))]}
    is_held = [scene_of(f) in chosen for f in filenames]
    return [i for i, h in enumerate(is_held) if not h], [i for i, h in enumerate(is_held) if h]


# --------------------------------------------------------------------------------------------------- pictures


def read_picture(path: Path) -> torch.Tensor:
    """Decode an RGB or RGBA PNG of any size, squashed to uint8 [3, 64, 64]. Raises InputError.

    16 bits a channel become 8, and alpha is dropped, as the official pictures are opaque. Palettes, greys and
    moving pictures are refused: they are none of this data set's.
    """
    if not path.is_file():  # nor a pipe, which would wait for ever
        raise InputError(f"{path}: no such picture")
    try:
        with Image.open(path, formats=["PNG"]) as image:  # reads the header alone
            unfit = None
            if image.mode not in ("RGB", "RGBA"):
                unfit = f"mode {image.mode}"
            elif image.is_animated:
                unfit = f"one that moves, of {image.n_frames} frames"
            elif image.width * image.height > MAX_PIXELS:
                unfit = f"one of {image.width} x {image.height} pixels"
            else:
                image = image.convert("RGB")
    except Exception as error:  # of many kinds, by what is broken
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not a readable picture ({reason})") from None
    if unfit:
        raise InputError(f"{path}: expected an RGB or RGBA PNG, got {unfit}")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_pictures(folder: Path, count: int) -> torch.Tensor:
    """`0.png` to `count - 1.png` of a folder as uint8 [N, 3, 64, 64]. Raises InputError."""
    for i in (0, count - 1):  # first, so that a count without measure costs nothing
        read_picture(folder / f"{i}.png")
    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(lambda i: read_picture(folder / f"{i}.png"), range(count))))


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], contiguous however the bytes lie in memory."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float in [-1, 1] (clamped) -> uint8 in 0..255, the inverse of `to_float`."""
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def check_manifest(manifest, where: Path, labels_path: Path) -> int:
    """How many scenes were rendered. Raises InputError if it was from another label file than this.

    File names are the same in every i-CLEVR set, so only the manifest that render.py leaves can tell whether
    pictures and labels belong together.
    """
    try:
        made_from, done = manifest["labels_sha256"], int(manifest["scenes_done"])
    except (TypeError, KeyError, ValueError, OverflowError):
        made_from, done = None, -1
    if done < 0:
        raise InputError(f"{where}: not a manifest of render.py; render into another folder")
    if made_from != text_sha256(labels_path):
        raise InputError(
            f"{where}: these pictures were rendered from another label file than {labels_path} (SHA-256 "
            f"differs); render its own with `python render.py --labels {labels_path} --out DIR` and give "
            f"--data DIR, or link the lab's pictures to iclevr/"
        )
    return done


def first_scenes(labels: dict[str, list[str]], count: int) -> dict[str, list[str]]:
    """The part of `labels` that its first `count` scenes make up."""
    scenes = set(list(dict.fromkeys(map(scene_of, labels)))[:count])
    return {f: c for f, c in labels.items() if scene_of(f) in scenes}


def load_pictures(folder: Path, filenames: list[str]) -> torch.Tensor:
    """Decode all pictures into uint8 [N, 3, 64, 64], kept in one file beside them for the next time.

    The cache's key holds name, size and modification time of each file, so a changed file is noticed.
    A folder that cannot be written to is decoded each time.
    """
    key = hashlib.sha256()
    for filename in filenames:
        try:
            stat = (folder / filename).stat()  # follows links
        except OSError:
            raise InputError(
                f"{folder / filename}: no such picture, though the label file names it"
            ) from None
        key.update(f"{filename} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    cache = folder / CACHE_NAME
    try:
        with safe_open(cache, "pt") as file:
            if file.metadata() == {"key": key.hexdigest()}:
                images = file.get_tensor("images")
                if images.shape == (len(filenames), 3, IMAGE_SIZE, IMAGE_SIZE):
                    return images
    except (OSError, SafetensorError):
        pass  # none yet, or cut off: it is made anew
    with ThreadPoolExecutor() as pool:
        pictures = pool.map(lambda f: read_picture(folder / f), filenames)
        bar = tqdm(pictures, f"reading {folder}", len(filenames), unit="picture", delay=1, leave=False)
        images = torch.stack(list(bar))
    temporary = temporary_beside(cache)
    try:
        save_file({"images": images}, temporary, metadata={"key": key.hexdigest()})
        os.replace(temporary, cache)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        print(f"{folder}: decoded pictures are not kept for the next time ({error})", file=sys.stderr)
    return images


def save_pack(path: Path, data: "ICLEVRDataset", manifest: dict):
    """Write a whole rendered set into one .npz that `np.load` opens, lossless; `manifest` is the folder's.

    `differences` is uint8 [scenes, steps, 64, 64, 3]: each picture less the one a step before, then each
    pixel less its left neighbour, modulo 256, because LZMA makes 30 MB of those and 33 MB of the pictures.
    `filenames` [N] and `labels` [N, 24] go through scenes and steps in that order; `objects` [24] names the
    labels. Raises InputError if not every scene has the same number of steps, next to each other.
    """
    scenes = [scene_of(f) for f in data.filenames]
    count = len(set(scenes))
    steps = len(scenes) // count
    if scenes != [scene for scene in scenes[::steps] for _ in range(steps)]:
        raise InputError(f"{path}: expected scenes of {steps} pictures each, next to each other")
    images = data.images.permute(0, 2, 3, 1).reshape(count, steps, IMAGE_SIZE, IMAGE_SIZE, 3).numpy()
    images = np.diff(images, axis=1, prepend=np.uint8(0))
    arrays = {
        "differences": np.diff(images, axis=3, prepend=np.uint8(0)),
        "labels": data.labels.numpy().astype(np.uint8),
        "filenames": np.array(data.filenames),
        "objects": np.array(sorted(data.objects, key=data.objects.get)),
        "manifest": np.array(json.dumps(manifest)),
    }
    temporary = temporary_beside(path)
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as file:  # np.savez knows deflate alone
            for name, array in arrays.items():
                with file.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_pack(path: Path) -> bool:
    """Whether a file is one that `save_pack` wrote."""
    try:
        with zipfile.ZipFile(path) as file:
            return {"differences.npy", "manifest.npy"} <= set(file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def load_pack(
    path: Path, labels_path: Path, labels: dict[str, list[str]]
) -> tuple[torch.Tensor, dict, dict[str, list[str]]]:
    """Pictures, uint8 [N, 3, 64, 64], manifest, and the part of `labels` that they belong to, of a file made
    by `save_pack`. Raises InputError if it is broken, of other labels, or unpacks to more than it should."""
    try:
        with np.load(path, allow_pickle=False) as file:
            sizes = {member.filename: member.file_size for member in file.zip.infolist()}
            if sizes["manifest.npy"] > 100_000:
                raise ValueError(f"a manifest of {sizes['manifest.npy']:,} bytes")
            manifest = parse_json(str(file["manifest"]), path)
            present = first_scenes(labels, check_manifest(manifest, path, labels_path))
            if sizes["differences.npy"] > len(present) * 3 * IMAGE_SIZE**2 + 1000:
                raise ValueError(f"{sizes['differences.npy']:,} bytes for {len(present):,} pictures")
            images = file["differences"]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a pack made by `python render.py --pack`") from None
    except InputError:
        raise
    except Exception as error:  # of many kinds, by what is broken
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a pack made by `python render.py --pack` ({reason})") from None
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        got = f"{images.dtype} {images.shape}"
        raise InputError(f"{path}: expected differences of uint8 [scenes, steps, 64, 64, 3], got {got}")
    for step in range(1, images.shape[1]):  # in place, so that the set is held once
        images[:, step] += images[:, step - 1]
    for scene in images:
        np.cumsum(scene, axis=2, dtype=np.uint8, out=scene)
    return torch.from_numpy(images).flatten(0, 1).permute(0, 3, 1, 2), manifest, present


class ICLEVRDataset(Dataset):
    """A folder of pictures, or an .npz made by `render.py --pack`, with its label file.

    `images` is uint8 [N, 3, 64, 64] and `labels` float32 [N, 24], both whole in memory; an item is a pair
    of the picture as float32 [3, 64, 64] in [-1, 1] and its multi-hot label [24]. `manifest` says how
    render.py made the pictures, None if it did not. Raises InputError if pictures are missing or broken, or
    if they and the label file do not belong together.
    """

    def __init__(self, source: Path | str, labels_path: Path | str, objects: dict[str, int]):
        source, labels_path = Path(source), Path(labels_path)
        present = labels = load_labels(labels_path, objects)
        if source.suffix == ".npz":
            self.images, self.manifest, present = load_pack(source, labels_path, labels)  # [N, 3, 64, 64]
            if len(self.images) != len(present):
                raise InputError(f"{source}: {len(self.images)} pictures for {len(present)} of {labels_path}")
        elif source.is_dir():
            path = source / MANIFEST_NAME
            self.manifest = None  # of the lab's own folder
            if path.exists():
                self.manifest = load_json(path)
                present = first_scenes(labels, check_manifest(self.manifest, path, labels_path))
            if not present:
                raise InputError(f"{source}: no whole scene yet; run `python render.py --out {source}` on")
            self.images = load_pictures(source, list(present))
        else:
            raise InputError(
                f"{source}: no pictures there; make them with `python render.py --out {source}`, or link the "
                f"lab's own folder to that name and put its label files in place of these"
            )
        self.total, self.objects = len(labels), objects
        self.filenames = list(present)
        self.conditions = list(present.values())
        self.labels = multi_hot(self.conditions, objects)  # [N, 24]

    def sha256(self) -> str:
        """A hash of all pictures: file names and label file may stay as they are while these change."""
        digest = hashlib.sha256()
        for part in self.images.split(1000):
            digest.update(part.contiguous().numpy())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return to_float(self.images[index]), self.labels[index]


def load_data(source: Path | None, labels_path: Path, objects: dict[str, int]) -> tuple[ICLEVRDataset, Path]:
    """The pictures to train on, and where they are: `source`, or without one `iclevr/` of the working
    directory, or where there is none the pack that ships.

    Raises InputError as `ICLEVRDataset` does, and if without `source` only a part of iclevr/ is rendered.
    """
    found = source
    if not found:
        found = Path("iclevr") if os.path.lexists("iclevr") else PACK
    data = ICLEVRDataset(found, labels_path, objects)
    if not source and found != PACK and len(data) < data.total:
        raise InputError(
            f"{found}: only {len(data):,} of {data.total:,} pictures are rendered; render the rest by "
            f"`python render.py`, or give --data {found} for those there are, or --data {PACK} for the pack"
        )
    return data, found
