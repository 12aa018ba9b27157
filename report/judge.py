"""The second judge: it finds the objects in a picture by their colour, without any network.

It works from the known camera, light, colours and sizes of the scene, and shares no code with the evaluator.
The evaluator says which of the 24 objects it sees, so it cannot notice a second copy of the same object. This
judge counts the objects of each colour, but it cannot tell shapes apart.
"""

import collections
import functools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data.render import CAMERA, COLORS, FIELD_OF_VIEW, MIN_DISTANCE, OBJECT_SIZE, PLACE_RANGE
from options import IMAGE_SIZE

GROUND_TINT = np.array([0.346, 0.335, 0.319])  # shares of red, green and blue in the light off the ground
COLOURED = 0.09  # a pixel further than this from the ground's tint has a colour
NEUTRAL = 0.05  # a pixel nearer than this has none: it is ground, shadow or a gray object
DARK = 0.62  # times the ground's brightness: a neutral pixel darker than this is a gray object, not a shadow
SPACING = 0.2  # between the places that are tried, in the units of the scene
OUTSIDE = 0.5  # penalty for each pixel of a silhouette that shows ground
LEAST_PIXELS = 6  # of an object's colour that must lie in its silhouette
LEAST_SHARE = 0.15  # of a silhouette's pixels: the least score of an object


class Found(NamedTuple):
    """An object that was found in a picture."""

    colour: str
    x: float  # place on the ground, in the units of the scene
    y: float
    size: float  # pixels of its colour / pixels of all silhouettes found in that colour


def project(points: np.ndarray) -> np.ndarray:
    """Map points [..., 3] of the scene to pixel coordinates (x, y) [..., 2] in the 64x64 picture."""
    camera = np.array(CAMERA)
    ahead = -camera / np.linalg.norm(camera)
    right = np.cross(ahead, [0, 0, 1])
    right /= np.linalg.norm(right)
    ray = points - camera
    scale = IMAGE_SIZE / 2 / np.tan(np.radians(FIELD_OF_VIEW / 2)) / (ray @ ahead)
    x = scale * (ray @ right)
    y = scale * (ray @ np.cross(right, ahead)) * 4 / 3  # the picture is squashed from 4:3
    return np.stack([IMAGE_SIZE / 2 + x, IMAGE_SIZE / 2 - y], -1)


@functools.cache
def silhouettes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places [P, 2] on the ground, for each the pixels [4096, P] that a cylinder there covers, 0 or 1, and how
    many these are [P].

    The cylinder stands for every shape: cubes and spheres differ from it by about a pixel at the edge.
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
    columns = np.array(masks, np.float32).T.copy()
    return places, columns, columns.sum(0)


@functools.cache
def ground_basis() -> np.ndarray:
    """The 15 polynomials of degree up to 4 over the picture's pixels: [4096, 15]."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] / (IMAGE_SIZE - 1) - 0.5
    return np.stack([x**a * y**b for a in range(5) for b in range(5 - a)], -1).reshape(IMAGE_SIZE**2, -1)


def segment(picture: np.ndarray) -> np.ndarray:
    """The colour of each pixel of a uint8 picture [3, 64, 64]: [4096] indices into COLORS, -1 for ground.

    The hue of a pixel is the direction from the ground's tint to the pixel's tint. A gray object has no hue,
    but is much darker than the ground. To tell it from a shadow, the ground's brightness is fitted by a
    smooth surface.
    """
    x = picture.reshape(3, -1).T / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) + 1e-4  # from sRGB; no zeros
    brightness = linear.sum(1)
    tint = linear / brightness[:, None] - GROUND_TINT
    saturation = np.abs(tint).max(1)
    neutral = saturation < NEUTRAL

    basis = ground_basis()
    logarithm = np.log(brightness)
    ground = neutral
    for _ in range(6):  # fit, leave out what is far off (shadows, gray objects), fit again
        used = basis[ground]
        surface = basis @ np.linalg.lstsq(used.T @ used, used.T @ logarithm[ground], rcond=None)[0]
        ground = neutral & (logarithm - surface > -0.12) & (logarithm - surface < 0.25)

    gray = list(COLORS).index("gray")
    hues = np.array([np.array(rgb) / sum(rgb) - 1 / 3 for rgb in COLORS.values()])
    hues[gray] = np.nan  # so that no pixel is nearest to it
    hues /= np.linalg.norm(hues, axis=1, keepdims=True)
    colours = np.where(saturation > COLOURED, np.nanargmax(tint @ hues.T, axis=1), -1)
    colours[neutral & (brightness < DARK * np.exp(surface))] = gray
    return colours


def find_objects(picture: np.ndarray) -> list[Found]:
    """The objects in a uint8 picture [3, 64, 64], one colour after the other."""
    colours = segment(picture)
    places, masks, sizes = silhouettes()  # [P, 2], [4096, P], [P]
    on_ground = sizes - masks[colours >= 0].sum(0)  # [P], pixels of each silhouette that show ground
    found = []
    for colour, name in enumerate(COLORS):
        pixels = colours == colour
        chosen = choose_places(pixels, colours < 0, on_ground)
        size = float(pixels.sum() / max(1, sizes[chosen].sum()))
        found += [Found(name, float(x), float(y), size) for x, y in places[chosen]]
    return found


def choose_places(pixels: np.ndarray, ground: np.ndarray, on_ground: np.ndarray) -> list[int]:
    """Where objects of one colour stand: indices of silhouettes that together cover the pixels of the colour.

    `pixels`, `ground`: bool [4096], which pixels have the colour and which show ground; `on_ground` [P]: how
    many pixels of each silhouette show ground. The choice is greedy: the silhouette with the best score comes
    first, its pixels are taken away, and so on. No two are nearer than the renderer puts objects.
    """
    places, masks, sizes = silhouettes()  # [P, 2], [4096, P], [P]
    covered = masks[pixels].sum(0)  # [P], pixels of the colour in each silhouette
    is_free = np.ones(len(places), bool)
    chosen: list[int] = []
    while pixels.sum() >= LEAST_PIXELS:
        score = np.where(is_free, covered - OUTSIDE * on_ground, -np.inf)
        best = int(score.argmax())
        if covered[best] < LEAST_PIXELS or score[best] < LEAST_SHARE * sizes[best]:
            break
        chosen.append(best)
        is_free = is_free & (np.linalg.norm(places - places[best], axis=1) > 0.9 * MIN_DISTANCE)
        inside = masks[:, best] > 0
        covered = covered - masks[inside & pixels].sum(0)
        on_ground = on_ground - masks[inside & ground].sum(0)
        pixels = pixels & ~inside
        ground = ground & ~inside
    return chosen


def count_colours(found: list[Found]) -> collections.Counter:
    """How many of the objects `found` have each colour."""
    return collections.Counter(one.colour for one in found)
