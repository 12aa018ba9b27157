"""A second judge beside the evaluator, which shares nothing with it: how many objects of which colours a
picture shows, from what is known of camera, light, colours and sizes.

    python metrics.py images/test images/new_test       # both judges on what sample.py painted

The evaluator says which of the 24 objects it sees, and so is blind to a second copy of one of them.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dataset import (
    IMAGE_SIZE,
    InputError,
    command,
    load_json,
    load_objects,
    multi_hot,
    read_picture,
    to_float,
)
from evaluator import evaluation_model
from render import CAMERA, COLORS, FIELD_OF_VIEW, MIN_DISTANCE, OBJECT_SIZE, PLACE_RANGE

GROUND_TINT = np.array([0.346, 0.335, 0.319])  # shares of red, green and blue in what ground reflects
COLOURED, NEUTRAL = 0.09, 0.05  # distances from that tint: above the first a colour, below the second none
DARK = 0.62  # of the ground's brightness: what is darker and has no colour is a gray object, not a shadow
SPACING = 0.2  # of the places tried, in the scene's units
OUTSIDE = 0.5  # what a pixel of a silhouette counts that ground shows instead
LEAST_PIXELS, LEAST_SHARE = 6, 0.15  # of a silhouette that must be there


def project(points: np.ndarray) -> np.ndarray:
    """Pixel coordinates (x, y) [..., 2] in the 64x64 picture of points [..., 3] of the scene."""
    camera = np.array(CAMERA)
    ahead = -camera / np.linalg.norm(camera)
    right = np.cross(ahead, [0, 0, 1])
    right /= np.linalg.norm(right)
    ray = points - camera
    scale = IMAGE_SIZE / 2 / np.tan(np.radians(FIELD_OF_VIEW / 2)) / (ray @ ahead)
    x, y = scale * (ray @ right), scale * (ray @ np.cross(right, ahead)) * 4 / 3  # squashed from 4:3
    return np.stack([IMAGE_SIZE / 2 + x, IMAGE_SIZE / 2 - y], -1)


@functools.cache
def silhouettes() -> tuple[np.ndarray, np.ndarray]:
    """Places [P, 2] on the ground and the pixels [P, 4096] that a cylinder there covers: 0 or 1.

    It stands for every shape: cubes and spheres differ from it by a pixel at the rim.
    """
    line = np.arange(-PLACE_RANGE, PLACE_RANGE + SPACING / 2, SPACING)
    places = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    angle = np.linspace(0, 2 * np.pi, 40)
    ring = 1.05 * OBJECT_SIZE * np.stack([np.cos(angle), np.sin(angle)], 1)
    masks = []
    for place in places:
        drawn = Image.new("L", (4 * IMAGE_SIZE,) * 2)
        for height in np.linspace(0, 2 * OBJECT_SIZE, 12):
            disc = np.column_stack([place + ring, np.full(len(ring), height)])
            ImageDraw.Draw(drawn).polygon([*map(tuple, 4 * project(disc))], fill=255)
        masks.append(np.asarray(drawn.resize((IMAGE_SIZE,) * 2, Image.Resampling.BOX)).ravel() > 127)
    return places, np.array(masks, np.float32)


@functools.cache
def ground_basis() -> np.ndarray:
    """Polynomials [4096, 15] of degree 4 over the picture."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] / (IMAGE_SIZE - 1) - 0.5
    return np.stack([x**a * y**b for a in range(5) for b in range(5 - a)], -1).reshape(IMAGE_SIZE**2, -1)


def segment(picture: np.ndarray) -> np.ndarray:
    """The colour of each pixel of a uint8 picture [3, 64, 64]: [4096] indices into COLORS, -1 for ground.

    Hue is the direction in which the light's tint is moved; gray is what is much darker than the ground,
    whose brightness is a smooth surface fitted to what has no colour and no shadow.
    """
    x = picture.reshape(3, -1).T / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) + 1e-4
    brightness = linear.sum(1)
    tint = linear / brightness[:, None] - GROUND_TINT
    saturation = np.abs(tint).max(1)
    basis, logarithm = ground_basis(), np.log(brightness)
    ground = neutral = saturation < NEUTRAL
    for _ in range(6):
        surface = basis @ np.linalg.lstsq(basis[ground], logarithm[ground], rcond=None)[0]
        ground = neutral & (logarithm - surface > -0.12) & (logarithm - surface < 0.25)
    hues = np.array([np.array(rgb) / sum(rgb) - 1 / 3 for rgb in COLORS.values()])
    hues[gray := list(COLORS).index("gray")] = np.nan  # it has none
    hues /= np.linalg.norm(hues, axis=1, keepdims=True)
    colours = np.where(saturation > COLOURED, np.nanargmax(tint @ hues.T, axis=1), -1)
    colours[neutral & (brightness < DARK * np.exp(surface))] = gray
    return colours


def find_objects(picture: np.ndarray) -> list[tuple[str, float, float]]:
    """Colour and place (x, y) on the ground of each object in a uint8 picture [3, 64, 64].

    From the known camera, light, colours and size of objects alone, without the evaluator: silhouettes are
    laid over the pixels of each colour, the one that explains most of them first, no two closer than objects
    stand.
    """
    names, colours, found = list(COLORS), segment(picture), []
    places, masks = silhouettes()
    for colour, name in enumerate(names):
        mine, ground = (colours == colour).astype(np.float32), (colours < 0).astype(np.float32)
        free = np.ones(len(places), bool)
        while mine.sum() >= LEAST_PIXELS:
            covered = masks @ mine
            score = np.where(free, covered - OUTSIDE * (masks @ ground), -np.inf)
            best = score.argmax()
            if covered[best] < LEAST_PIXELS or score[best] < LEAST_SHARE * masks[best].sum():
                break
            found.append((name, *places[best].tolist()))
            free &= np.linalg.norm(places - places[best], axis=1) > 0.9 * MIN_DISTANCE
            mine *= 1 - masks[best]
            ground *= 1 - masks[best]
    return found


def count_colours(picture: torch.Tensor) -> list[str]:
    """The colours, sorted, of the objects that a uint8 picture [3, 64, 64] shows, one for each object."""
    return sorted(colour for colour, _, _ in find_objects(picture.numpy()))


def shows_colours(pictures: torch.Tensor, conditions: list[list[str]]) -> torch.Tensor:
    """Bool [N]: whether uint8 pictures [N, 3, 64, 64] show as many objects of each colour as their conditions
    ask for, and no other."""
    asked = [sorted(name.split()[0] for name in condition) for condition in conditions]
    right = [count_colours(p) == colours for p, colours in zip(pictures, asked, strict=True)]
    return torch.tensor(right)


def load_samples(folder: Path) -> tuple[dict, list[list[str]], torch.Tensor]:
    """What sample.py painted into `folder`: its report, and of each picture the condition and uint8 pixels
    [N, 3, 64, 64]. Raises InputError."""
    path = folder.with_suffix(".json")
    report = load_json(path)
    if not isinstance(report, dict) or not {"conditions", "num_images", "evaluator"} <= report.keys():
        raise InputError(f"{path}: expected the report that sample.py writes beside its pictures")
    pictures = [read_picture(folder / f"{i}.png") for i in range(report["num_images"])]
    conditions = [report["conditions"][i % len(report["conditions"])] for i in range(len(pictures))]
    return report, conditions, torch.stack(pictures)


def judge_twice(report: dict, conditions: list[list[str]], pictures: torch.Tensor) -> dict[str, float]:
    """Shares of what `load_samples` gives that the evaluator, the second judge, and both hold right."""
    evaluator = evaluation_model(report["evaluator"])
    found = torch.cat([evaluator.probabilities(to_float(part)) for part in pictures.split(500)])
    seen = found > evaluator.threshold
    first = (seen == multi_hot(conditions, load_objects()).bool()).all(1)
    second = shows_colours(pictures, conditions)
    shares = {"exact_set": first, "second_judge": second, "both": first & second}
    return {name: right.float().mean().item() for name, right in shares.items()}


@command
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="What two judges say about pictures that sample.py painted.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="such as images/test")
    for folder in parser.parse_args(argv).folders:
        report, conditions, pictures = load_samples(folder)
        shares = judge_twice(report, conditions, pictures)
        print(
            f"{folder}: {len(pictures)} pictures, accuracy {report['accuracy']:.4f}, exact set "
            f"{shares['exact_set']:.4f}; number and colours right {shares['second_judge']:.4f}, "
            f"both {shares['both']:.4f}"
        )


if __name__ == "__main__":
    main()
