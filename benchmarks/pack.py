"""How long the pictures that ship take to read, and how large they would be in other lossless forms.

    python benchmarks/pack.py

The sizes are a table in Markdown, measured on 300 scenes and scaled to all.
"""

import io
import lzma
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from commands import ROOT
from dataset import PACK, ICLEVRDataset, load_objects

SCENES = 300


def encoded(pictures: Iterable[np.ndarray], **options) -> int:
    """Bytes of all `pictures` [height, width, 3], each a file of its own."""
    total = 0
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(picture)).save(buffer, **options)
        total += buffer.tell()
    return total


def packed(array: np.ndarray) -> int:
    """Bytes of `array` compressed as zipfile does it."""
    filters = [{"id": lzma.FILTER_LZMA1}]
    return len(lzma.compress(np.ascontiguousarray(array).tobytes(), lzma.FORMAT_RAW, filters=filters))


def main():
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    data = ICLEVRDataset(PACK, ROOT / "train.json", load_objects())
    seconds = time.perf_counter() - start
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(f"{PACK.name}: {PACK.stat().st_size / 1e6:.1f} MB")
    print(f"read and checked in {seconds:.2f} s, with {megabytes:.0f} MB of memory\n")
    images = data.images.permute(0, 2, 3, 1).numpy()
    scenes = images[: 3 * SCENES].reshape(SCENES, 3, 64, 64, 3)
    steps = np.diff(scenes, axis=1, prepend=np.uint8(0))
    strips, step_strips = (a.swapaxes(1, 2).reshape(SCENES, 64, 192, 3) for a in (scenes, steps))
    webp = {"format": "webp", "lossless": True, "quality": 100, "method": 6}
    sizes = {
        "PNG, a picture a file": encoded(images[: 3 * SCENES], format="png", optimize=True),
        "WebP, a picture a file": encoded(images[: 3 * SCENES], **webp),
        "WebP, the three steps of a scene side by side": encoded(strips, **webp),
        "WebP, differences between steps side by side": encoded(step_strips, **webp),
        ".npz of the pictures, LZMA": packed(scenes),
        ".npz of differences between steps, LZMA": packed(steps),
        ".npz of differences between steps, then to the left pixel, LZMA (what ships)": packed(
            np.diff(steps, axis=3, prepend=np.uint8(0))
        ),
    }
    print("| form | MB |\n|---|---|")
    for name, size in sizes.items():
        print(f"| {name} | {size * len(images) / (3 * SCENES) / 1e6:.1f} |")


if __name__ == "__main__":
    main()
