"""Pictures with their multi-hot labels: from files to two tensors.

Pictures are squashed to 64x64 without crop or padding: both would lose objects that the label names.
"""

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
from infra.commands import InputError
from infra.files import load_json, temporary_beside, write_whole
from labels import first_scenes, load_labels, multi_hot
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


def write_picture(path: Path, image: torch.Tensor):
    """Write a picture, uint8 [3, H, W] on the CPU, as PNG."""
    to_pil_image(image).save(content := io.BytesIO(), "PNG")
    write_whole(path, content.getvalue())


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], contiguous however the bytes lie in memory."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float in [-1, 1] (clamped) -> uint8 in 0..255, the inverse of `to_float`."""
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


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
                raise InputError(
                    f"{source}: no whole scene yet; run `python -m data.render --out {source}` on"
                )
            self.images = load_pictures(source, list(present))
        else:
            raise InputError(
                f"{source}: no pictures there; make them with `python -m data.render --out {source}`, or link the "
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
            f"`python -m data.render`, or give --data {found} for those there are, or --data {PACK} for the pack"
        )
    return data, found
