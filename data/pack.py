"""A pack: a whole rendered set, pictures with labels, in one .npz file, without loss."""

import json
import zipfile
from pathlib import Path

import numpy as np
import torch

from data.manifest import check_manifest
from infra.commands import ROOT, InputError
from infra.files import parse_json, temporary_beside
from label_files import first_scenes, names_of, scene_of
from options import IMAGE_SIZE

PACK = ROOT / "data" / "iclevr.npz"  # the pictures that ship
HELD_OUT = ROOT / "data" / "held_out.npz"  # others of the first 700 scenes of the same labels


def save_pack(
    path: Path,
    images: torch.Tensor,
    labels: torch.Tensor,
    filenames: list[str],
    objects: dict[str, int],
    manifest: dict,
):
    """Write a whole rendered set into one .npz that `np.load` opens, lossless; `manifest` is the folder's.

    `differences` is uint8 [scenes, steps, 64, 64, 3]: each picture less the one a step before, then each
    pixel less its left neighbour, modulo 256, because LZMA makes 30 MB of those and 33 MB of the pictures.
    `filenames` [N] and `labels` [N, 24] go through scenes and steps in that order; `objects` [24] names the
    labels. Raises InputError if not every scene has the same number of steps, next to each other.
    """
    scenes = [scene_of(f) for f in filenames]
    count = len(set(scenes))
    steps = len(scenes) // count
    if scenes != np.repeat(scenes[::steps], steps).tolist():
        raise InputError(f"{path}: expected scenes of {steps} pictures each, next to each other")
    pixels = images.permute(0, 2, 3, 1).reshape(count, steps, IMAGE_SIZE, IMAGE_SIZE, 3).numpy()
    by_step = np.diff(pixels, axis=1, prepend=np.uint8(0))
    arrays = {
        "differences": np.diff(by_step, axis=3, prepend=np.uint8(0)),
        "labels": labels.numpy().astype(np.uint8),
        "filenames": np.array(filenames),
        "objects": np.array(names_of(objects)),
        "manifest": np.array(json.dumps(manifest)),
    }
    temporary = temporary_beside(path)
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as file:  # np.savez knows deflate alone
            for name, array in arrays.items():
                with file.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        temporary.replace(path)
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
    """Read a file made by `save_pack`: its pictures, uint8 [N, 3, 64, 64], its manifest, and their N labels,
    which are the first ones of `labels`.

    Raises InputError if it is broken, was made from other labels, or unpacks to more than it should.
    """
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
        raise InputError(f"{path}: no such file; expected a pack made by `python -m data.render --pack`") from None
    except InputError:
        raise
    except Exception as error:  # of many kinds, by what is broken
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a pack made by `python -m data.render --pack` ({reason})") from None
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        got = f"{images.dtype} {images.shape}"
        raise InputError(f"{path}: expected differences of uint8 [scenes, steps, 64, 64, 3], got {got}")
    count = images.shape[0] * images.shape[1]
    if count != len(present):
        raise InputError(f"{path}: {count} pictures for {len(present)} of {labels_path}")
    for step in range(1, images.shape[1]):  # in place, so that the set is held once
        images[:, step] += images[:, step - 1]
    for scene in images:
        np.cumsum(scene, axis=2, dtype=np.uint8, out=scene)
    return torch.from_numpy(images).flatten(0, 1).permute(0, 3, 1, 2), manifest, present
