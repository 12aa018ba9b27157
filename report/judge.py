"""A second judge, which shares nothing with the evaluator and imports nothing of it: how many objects of
which colours a picture shows, and where, from what is known of camera, light, colours and sizes.

The evaluator says which of the 24 objects it sees, and so is blind to a second copy of one of them; this one
counts, but cannot tell shapes.
"""

import collections
import functools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data.render import CAMERA, COLORS, FIELD_OF_VIEW, MIN_DISTANCE, OBJECT_SIZE, PLACE_RANGE
from options import IMAGE_SIZE

GROUND_TINT = np.array([0.346, 0.335, 0.319])  # shares of red, green and blue in what ground reflects
COLOURED, NEUTRAL = 0.09, 0.05  # distances from that tint: above the first a colour, below the second none
DARK = 0.62  # of the ground's brightness: what is darker and has no colour is a gray object, not a shadow
SPACING = 0.2  # of the places tried, in the scene's units
OUTSIDE = 0.5  # what a pixel of a silhouette counts that ground shows instead
LEAST_PIXELS, LEAST_SHARE = 6, 0.15  # of a silhouette that must be there


class Found(NamedTuple):
    """An object that a picture shows."""

    colour: str
    x: float  # place on the ground, in the scene's units
    y: float
    size: float  # pixels of its colour, of those that silhouettes of all objects of the colour have


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
    """Places [P, 2] on the ground and the pixels [4096, P] that a cylinder there covers: 0 or 1.

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
    return places, np.array(masks, np.float32).T.copy()


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
        used = basis[ground]
        surface = basis @ np.linalg.lstsq(used.T @ used, used.T @ logarithm[ground], rcond=None)[0]
        ground = neutral & (logarithm - surface > -0.12) & (logarithm - surface < 0.25)
    hues = np.array([np.array(rgb) / sum(rgb) - 1 / 3 for rgb in COLORS.values()])
    hues[gray := list(COLORS).index("gray")] = np.nan  # it has none
    hues /= np.linalg.norm(hues, axis=1, keepdims=True)
    colours = np.where(saturation > COLOURED, np.nanargmax(tint @ hues.T, axis=1), -1)
    colours[neutral & (brightness < DARK * np.exp(surface))] = gray
    return colours


def find_objects(picture: np.ndarray) -> list[Found]:
    """The objects in a uint8 picture [3, 64, 64].

    From the known camera, light, colours and size of objects alone, without the evaluator: silhouettes are
    laid over the pixels of each colour, the one that explains most of them first, no two closer than objects
    stand.
    """
    colours, found = segment(picture), []
    places, masks = silhouettes()  # [P, 2], [4096, P]
    sizes = masks.sum(0)
    on_ground = sizes - masks[colours >= 0].sum(0)  # [P], pixels of each silhouette that show ground
    for colour, name in enumerate(COLORS):
        left, bare, free, chosen = colours == colour, colours < 0, np.ones(len(places), bool), []
        pixels, covered, uncovered = left.sum(), masks[left].sum(0), on_ground.copy()
        while left.sum() >= LEAST_PIXELS:
            score = np.where(free, covered - OUTSIDE * uncovered, -np.inf)
            best = score.argmax()
            if covered[best] < LEAST_PIXELS or score[best] < LEAST_SHARE * sizes[best]:
                break
            chosen.append(best)
            free &= np.linalg.norm(places - places[best], axis=1) > 0.9 * MIN_DISTANCE
            inside = masks[:, best] > 0
            covered -= masks[inside & left].sum(0)
            uncovered -= masks[inside & bare].sum(0)
            left, bare = left & ~inside, bare & ~inside
        size = float(pixels / max(1, sizes[chosen].sum()))
        found += [Found(name, *places[best].tolist(), size) for best in chosen]
    return found


def count_colours(found: list[Found]) -> collections.Counter:
    """How many of the objects `found` have which colour."""
    return collections.Counter(one.colour for one in found)
