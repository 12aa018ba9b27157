"""Pictures with their multi-hot labels: from files to two tensors.

Pictures are squashed to 64x64 without crop or padding: both would lose objects that the label names.
"""

import functools
import hashlib
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from data.manifest import MANIFEST_NAME, check_manifest
from data.pack import PACK, load_pack
from infra.commands import InputError, announce
from infra.files import load_json, temporary_beside, write_whole
from label_files import LABELS_NAME, first_scenes, load_labels
from labels import colour_of, multi_hot, pairs_of_one_colour
from options import IMAGE_SIZE

MAX_PIXELS = 4096 * 4096  # of a picture: one of more is a mistake or a decompression bomb
Image.MAX_IMAGE_PIXELS = None  # instead of Pillow's own limit, up to twice of which it only warns
CACHE_NAME = f".pictures-{IMAGE_SIZE}.safetensors"


# --------------------------------------------------------------------------------------------------- pictures


def read_picture(path: Path) -> torch.Tensor:
    """Decode an RGB or RGBA PNG of any size, squashed to uint8 [3, 64, 64]. Raises InputError.

    16 bits a channel become 8, and alpha is dropped, as the official pictures are opaque. Palettes, greys and
    moving pictures are refused: they are none of this data set's.
    """
    if not path.is_file():  # nor a pipe, which would wait for ever
        raise InputError(f"{path}: no such picture")
    unfit = ""
    try:
        with Image.open(path, formats=["PNG"]) as file:  # reads the header alone
            frames = getattr(file, "n_frames", 1)
            if file.mode not in ("RGB", "RGBA"):
                unfit = f"mode {file.mode}"
            elif frames > 1:
                unfit = f"one that moves, of {frames} frames"
            elif file.width * file.height > MAX_PIXELS:
                unfit = f"one of {file.width} x {file.height} pixels"
            else:
                image = file.convert("RGB")
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


def to_png(image: torch.Tensor) -> bytes:
    """A picture, uint8 [3, H, W] on the CPU, as the content of a PNG file."""
    content = io.BytesIO()
    to_pil_image(image).save(content, "PNG")
    return content.getvalue()


def write_picture(path: Path, image: torch.Tensor):
    """Write a picture, uint8 [3, H, W] on the CPU, as PNG."""
    write_whole(path, to_png(image))


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], contiguous however the bytes lie in memory."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float in [-1, 1] (clamped) -> uint8 in 0..255, the inverse of `to_float`."""
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------ cache


def cache_key(folder: Path, filenames: list[str]) -> str:
    """A hash of name, size and modification time of each file, so that a changed file is noticed. Raises
    InputError if one is missing."""
    digest = hashlib.sha256()
    for filename in filenames:
        path = folder / filename
        try:
            stat = path.stat()  # follows links
        except OSError:
            raise InputError(f"{path}: no such picture, though the label file names it") from None
        digest.update(f"{filename} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_cache(path: Path, key: str) -> torch.Tensor | None:
    """The pictures that `write_cache` wrote with this key. None without such a file, or if it was cut off."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("images") if file.metadata() == {"key": key} else None
    except (OSError, SafetensorError):
        return None


def write_cache(path: Path, key: str, images: torch.Tensor):
    """Keep pictures for the next time. In a folder that cannot be written to, only say so on stderr."""
    temporary = temporary_beside(path)
    try:
        save_file({"images": images}, temporary, metadata={"key": key})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        print(f"{path.parent}: decoded pictures are not kept for the next time ({error})", file=sys.stderr)


def load_pictures(folder: Path, filenames: list[str]) -> torch.Tensor:
    """Decode all pictures into uint8 [N, 3, 64, 64], kept in one file beside them for the next time."""
    cache = folder / CACHE_NAME
    key = cache_key(folder, filenames)
    images = read_cache(cache, key)
    if images is None or images.shape != (len(filenames), 3, IMAGE_SIZE, IMAGE_SIZE):
        with ThreadPoolExecutor() as pool:
            pictures = pool.map(lambda name: read_picture(folder / name), filenames)
            bar = tqdm(pictures, f"reading {folder}", len(filenames), unit="picture", delay=1, leave=False)
            images = torch.stack(list(bar))
        write_cache(cache, key, images)
    return images


# --------------------------------------------------------------------------------------------------- data set


class ICLEVRDataset(Dataset):
    """A folder of pictures, or a pack made by `python -m data.render --pack`, with its label file.

    `images` is uint8 [N, 3, 64, 64] and `labels` float32 [N, 24], both whole in memory; an item is a pair
    of the picture as float32 [3, 64, 64] in [-1, 1] and its multi-hot label [24]. `manifest` says how
    render.py made the pictures, and is empty if it did not. `label_file` is the whole label file, also where not
    all of its pictures are rendered. With `may_repeat` pictures may show an object twice. Raises InputError if
    pictures are missing or broken, or if they and the label file do not belong together.
    """

    def __init__(self, source: Path | str, labels_path: Path | str, objects: dict[str, int], may_repeat: bool = False):
        source = Path(source)
        labels_path = Path(labels_path)
        labels = load_labels(labels_path, objects, may_repeat)
        self.manifest: dict = {}
        if source.suffix == ".npz":
            self.images, self.manifest, present = load_pack(source, labels_path, labels)
        elif source.is_dir():
            present = labels  # all of them, in a folder without manifest like the lab's own
            path = source / MANIFEST_NAME
            if path.exists():
                self.manifest = load_json(path)
                present = first_scenes(labels, check_manifest(self.manifest, path, labels_path))
            if not present:
                again = f"`python -m data.render --out {source}`"
                raise InputError(f"{source}: no whole scene yet; run {again} on")
            self.images = load_pictures(source, list(present))
        else:
            raise InputError(
                f"{source}: no pictures there; make them with `python -m data.render --out {source}`, or "
                f"link the lab's own folder to that name and put its label files in place of these"
            )
        self.label_file = labels
        self.objects = objects
        self.filenames = list(present)
        self.conditions = list(present.values())
        self.labels = multi_hot(self.conditions, objects)  # [N, 24]

    def extend(self, other: "ICLEVRDataset"):
        """Add the pictures of another data set behind those of this one."""
        self.images = torch.cat([self.images, other.images])
        self.labels = torch.cat([self.labels, other.labels])
        self.filenames = self.filenames + other.filenames
        self.conditions = self.conditions + other.conditions
        self.label_file = self.label_file | other.label_file

    @functools.cached_property
    def hard(self) -> torch.Tensor:
        """Indices of the pictures that are hardest to paint: of three objects or more, or of two in one colour."""
        is_hard = [len(condition) >= 3 or bool(pairs_of_one_colour(condition)) for condition in self.conditions]
        return torch.tensor(is_hard).nonzero().flatten()

    @functools.cached_property
    def confusable(self) -> list[list[int]]:
        """For each picture the indices of others that it might be by a mistake, one for each such condition: one of
        its objects in another shape, or one object less."""
        # Sorted lists, not sets: an extra picture may show an object twice.
        picture_of = {tuple(sorted(condition)): i for i, condition in enumerate(self.conditions)}
        found: list[list[int]] = []
        for condition in self.conditions:
            changed: list[list[str]] = []
            for position, name in enumerate(condition):
                others = condition[:position] + condition[position + 1 :]
                changed.append(others)
                shapes = [other for other in self.objects if colour_of(other) == colour_of(name) and other != name]
                changed += [[*others, other] for other in shapes]
            keys = [tuple(sorted(objects)) for objects in changed]
            found.append([picture_of[key] for key in keys if key in picture_of])
        return found

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


def load_data(
    source: Path | None, labels_path: Path, objects: dict[str, int], extra: Path | None = None
) -> tuple[ICLEVRDataset, Path]:
    """The pictures to train on, and where they are: `source`, or without one `iclevr/` of the working
    directory, or where there is none the pack that ships. `extra`: a folder of more pictures, with its labels.json.

    Raises InputError as `ICLEVRDataset` does, and if without `source` only a part of iclevr/ is rendered.
    """
    default = Path("iclevr") if os.path.lexists("iclevr") else PACK
    found = source or default
    announce(f"reading {found}")
    data = ICLEVRDataset(found, labels_path, objects)
    if not source and found != PACK and len(data) < len(data.label_file):
        raise InputError(
            f"{found}: only {len(data):,} of {len(data.label_file):,} pictures are rendered; render the rest by "
            f"`python -m data.render`, or give --data {found} for those there are, or --data {PACK} for the "
            f"pack"
        )
    if extra:
        announce(f"reading {extra}")
        data.extend(ICLEVRDataset(extra, extra / LABELS_NAME, objects, may_repeat=True))
    return data, found


# --------------------------------------------------------------------------------------- order in training


def seed_of(*key: int) -> int:
    """One 64-bit seed from several numbers: what is drawn at a step depends on (seed, step) alone."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@functools.lru_cache(maxsize=2)  # the same for all steps of an epoch
def epoch_order(epoch: int, size: int, seed: int) -> torch.Tensor:
    """The order [size] of the pictures in an epoch."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(seed, epoch, 1)))


def batch_indices(step: int, batch_size: int, size: int, seed: int) -> torch.Tensor:
    """Indices [batch_size] of the pictures of a step.

    Epochs follow each other without a gap, each a permutation of its own, so every picture is seen equally
    often and every batch is full.
    """
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    indices = torch.empty_like(positions)
    for epoch in torch.unique(positions // size).tolist():
        inside = positions // size == epoch
        indices[inside] = epoch_order(epoch, size, seed)[positions[inside] % size]
    return indices


def draw_pictures(step: int, batch_size: int, data: ICLEVRDataset, hard_share: float, seed: int) -> torch.Tensor:
    """Indices [batch_size] of the pictures of a step: a share of the hard ones, the others drawn from all."""
    from_hard = round(hard_share * batch_size)
    if not from_hard:
        return batch_indices(step, batch_size, len(data), seed)
    hard = data.hard[batch_indices(step, from_hard, len(data.hard), seed)]
    return torch.cat([hard, batch_indices(step, batch_size - from_hard, len(data), seed)])


def draw_labels(indices: torch.Tensor, data: ICLEVRDataset, wrong_share: float) -> torch.Tensor:
    """Indices [B] of the pictures whose labels those at `indices` [B] are to be given: their own, but for a share that
    is given that of a confusable one. Draws from PyTorch's generator of the CPU.

    For guidance distillation: sampling also passes pictures that are about to show a mistake, which no picture of the
    data with its own label is like.
    """
    if not wrong_share:
        return indices
    labels_of = indices.clone()
    for row, index in enumerate(indices.tolist()):
        confusable = data.confusable[index]
        if confusable and torch.rand(()) < wrong_share:
            labels_of[row] = confusable[int(torch.randint(len(confusable), ()))]
    return labels_of
