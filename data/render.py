"""Draw i-CLEVR label files and render their pictures with Mitsuba 3.

    python -m data.render                     # the 18,009 pictures of train.json into iclevr/
    python -m data.render --limit 20          # only its first 20 scenes
    python -m data.render --random-scenes 1000 --out more   # new scenes, their labels in more/labels.json
    python -m data.render --make-labels       # the five label files that ship

More pictures of what is hard to paint, for `train.py --extra hard`:

    python -m data.render --hard-labels --out hard                       # hard/labels.json
    python -m data.render --labels hard/labels.json --out hard           # its pictures

Pictures ship as packs in data/. To make one: render a folder, pack it, move the pack to data/.

    python -m data.render                     # data/iclevr.npz: the pictures to train on
    python -m data.render --pack
    mv iclevr.npz data/

    python -m data.render --limit 700 --seed 2 --out held_out   # data/held_out.npz: others of 700 scenes
    python -m data.render --limit 700 --pack --out held_out
    mv held_out.npz data/

    python -m data.render --verify            # renders 20 scenes of data/iclevr.npz again and compares
    python -m data.render --export DIR        # the pictures of data/iclevr.npz for datasets.load_dataset

A picture is a function of (seed, scene name, objects) alone: the number of workers, the order and where a
run was stopped leave no trace in it. Scene, lamps and materials are those of CLEVR (Johnson et al. 2017,
arXiv 1612.06890) with the placement of i-CLEVR (El-Nouby et al. 2019, arXiv 1811.09845).
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.commands import ROOT, InputError, Parser, command, number, read_early, shown, to_path, to_seed
from infra.signals import signals_interrupt

SAMPLES = 24  # light paths per pixel: grain below 2 grey levels on objects, 0.7 on the ground
FILM_SIZES = {"64x64": (128, 96), "320x240": (320, 240)}  # 64x64 is squashed from 4:3, as the original is


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m data.render", description="Draw i-CLEVR label files and render their pictures with Mitsuba 3."
    )
    parser.add_argument("--labels", type=to_path, default=ROOT / "train.json", help="default: train.json")
    parser.add_argument("--out", type=to_path, help="folder (default: iclevr; with --make-labels: this one)")
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="only the first N scenes")
    parser.add_argument("--size", choices=FILM_SIZES, default="64x64", help="pixels (default: %(default)s)")
    parser.add_argument(
        "--samples", type=number(int, 1), default=SAMPLES, help="light paths per pixel (default: %(default)s)"
    )
    parser.add_argument("--seed", type=to_seed, default=0, help="of places, lamps and labels (default: 0)")
    parser.add_argument("--workers", type=number(int, 1), default=os.cpu_count(), help="default: all cores")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--make-labels", action="store_true", help="write the five label files and stop")
    other.add_argument("--hard-labels", action="store_true",
                       help="write OUT/labels.json: scenes of --labels with two objects of one colour, and scenes "
                       "that show an object twice, and stop")  # fmt: skip
    other.add_argument("--random-scenes", type=number(int, 1), metavar="N",
                       help="render all steps of N new scenes of 1 to 5 objects")  # fmt: skip
    other.add_argument("--pack", action="store_true", help="write the pictures of --out to one file, OUT.npz")
    other.add_argument("--verify", action="store_true",
                       help="render --limit scenes (default: 20) of OUT.npz again, or without --out of "
                       "data/iclevr.npz, and compare")  # fmt: skip
    other.add_argument("--export", type=to_path, metavar="DIR",
                       help="write the pictures of --out, or without it of data/iclevr.npz, to DIR as Parquet, for "
                       "datasets.load_dataset")  # fmt: skip
    args = parser.parse_args(argv)
    if (args.random_scenes or args.hard_labels) and not args.out:
        parser.error("--random-scenes and --hard-labels need --out DIR")
    return args


if __name__ == "__main__":
    read_early(parse_args)

import importlib.metadata
import io
import json
import multiprocessing
import signal
import sys
import tempfile

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.export import export
from data.manifest import MANIFEST_NAME, open_manifest
from data.pack import PACK, is_pack, load_pack, save_pack
from dataset import ICLEVRDataset
from infra.files import contents, text_sha256, write_json
from label_files import LABELS_NAME, MAX_OBJECTS, load_labels, load_objects, scene_of
from labels import colour_of, pairs_of_one_colour

SHAPES = ("cube", "sphere", "cylinder")
COLORS = {  # sRGB numbers that CLEVR hands to Blender as if they were linear
    "gray": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 105, 20),
    "brown": (129, 74, 25), "purple": (129, 38, 192), "cyan": (41, 208, 208), "yellow": (255, 238, 51),
}  # fmt: skip

BRIGHTNESS = 1.10  # of the objects' diffuse colours, fitted to the mean colours of real objects

# The scene, in Blender's units (z up).
CAMERA = (7.4811, -6.5076, 5.3437)  # looks at the origin
FIELD_OF_VIEW = 49.134  # horizontal angle in degrees
LAMPS = {  # position, side, power in W, rgb: squares aimed at the origin
    "key": ((6.446711, -2.905175, 4.258398), 0.5, 78.5398, (1, 0.9323, 0.8167)),
    "fill": ((-4.671124, -4.013597, 3.011225), 0.5, 23.5619, (0.7617, 0.8177, 1)),
    "back": ((-1.168501, 2.646024, 5.815737), 1.0, 39.2699, (1, 1, 1)),
}
LAMP_JITTER = 1.0  # each lamp of a scene moves by a uniform draw in [-1, 1] per axis
SUN_DIRECTION = (-0.4145, 0.1946, -0.8890)
SUN_IRRADIANCE = 0.45
GROUND_ALBEDO = 0.8
COVE = ((-23.556, 0), (-1.09, 0), (1.96, 0), (2.26, 0), (4.081, 23.215))  # Bezier points (distance, height)
COVE_START = (-24.0628, -17.9967)
COVE_ALONG = (-0.9032, 0.4292)
COVE_ACROSS = (0.4292, 0.9032)
COVE_WIDTH = 56.485
OBJECT_SIZE = 0.58  # sphere radius, half-edge, cylinder radius and half-height; fits the real boxes
CUBE_BEVEL = 0.10  # of OBJECT_SIZE
CYLINDER_BEVEL = 0.09  # of OBJECT_SIZE
PLACE_RANGE = 3.0  # of the objects' centres: [-3, 3]^2
MIN_DISTANCE = 2.45  # between two centres
MIN_VISIBLE = 200  # pixels of 320x240 that each of the five placed objects must show

TWICE = 3400  # scenes of `hard_labels` that show an object twice
SAME_SHAPE_SHARE = 0.4  # of these: two objects of one colour in one shape, with no more objects than asked for

Job = tuple[str, list[str], list[int]]  # scene name, its objects, how many of them each picture shows


# --------------------------------------------------------------------------------------------------- labels


def draw_objects(rng: np.random.Generator, count: int) -> list[str]:
    """Shape and colour uniform; the colour is redrawn while that object is already there."""
    names: list[str] = []
    for _ in range(count):
        shape = rng.choice(SHAPES)
        color = rng.choice(list(COLORS))
        while f"{color} {shape}" in names:
            color = rng.choice(list(COLORS))
        names.append(f"{color} {shape}")
    return names


def draw_conditions(rng: np.random.Generator, quota: dict, taken: set, in_train: set) -> list[list[str]]:
    """Draw conditions by `quota`, (objects, colours, occurs in train) -> how many, none of them in `taken`.

    Redrawn as a whole until all 24 objects appear. Sorted by number of objects.
    """
    while True:
        left = dict(quota)
        used = set(taken)
        conditions: list[list[str]] = []
        while any(left.values()):
            names = draw_objects(rng, int(rng.integers(1, 4)))
            condition = frozenset(names)
            key = (len(names), len({colour_of(n) for n in names}), condition in in_train)
            if left.get(key, 0) and condition not in used:
                left[key] -= 1
                used.add(condition)
                conditions.append(names)
        if len(set().union(*conditions)) == len(SHAPES) * len(COLORS):
            return sorted(conditions, key=len)


def scene_labels(scene: str, names: list[str]) -> dict[str, list[str]]:
    """Labels of all steps of a scene: its first picture shows one object, each other one more."""
    return {f"{scene}_{k}.png": names[: k + 1] for k in range(len(names))}


def make_labels(seed: int) -> dict[str, object]:
    """The five label files with the statistics of the official ones: file name -> content."""
    rng = np.random.default_rng(seed)
    names = [f"{color} {shape}" for shape in SHAPES for color in COLORS]
    train: dict[str, list[str]] = {}
    for scene in rng.permutation(6003):
        train.update(scene_labels(f"CLEVR_train_{scene:06d}", draw_objects(rng, 3)))
    in_train = set(map(frozenset, train.values()))
    test_quota = {(1, 1, True): 6, (2, 2, True): 12, (3, 3, True): 10, (3, 2, True): 3, (3, 3, False): 1}
    new_test_quota = {(2, 1, True): 9, (2, 2, True): 3, (3, 1, True): 3, (3, 2, True): 16, (3, 3, True): 1}
    # As test_quota, but without a triple that train.json lacks: those are a test of their own.
    like_test_quota = {(1, 1, True): 6, (2, 2, True): 12, (3, 3, True): 11, (3, 2, True): 3}
    test = draw_conditions(rng, test_quota, set(), in_train)
    taken = set(map(frozenset, test))
    new_test = draw_conditions(rng, new_test_quota, taken, in_train)
    taken.update(map(frozenset, new_test))
    validation = draw_conditions(rng, like_test_quota, taken, in_train)
    taken.update(map(frozenset, validation))
    validation += draw_conditions(rng, new_test_quota, taken, in_train)
    return {
        "objects.json": {name: i for i, name in enumerate(names)}, "train.json": train, "test.json": test,
        "new_test.json": new_test, "validation.json": sorted(validation, key=len),
    }  # fmt: skip


def random_labels(scenes: int, seed: int) -> dict[str, list[str]]:
    """All steps of `scenes` new scenes: as many scenes of each number of objects, 1 to 5."""
    labels: dict[str, list[str]] = {}
    for i in range(scenes):
        rng = np.random.default_rng([seed, i])
        names = draw_objects(rng, int(rng.integers(1, MAX_OBJECTS + 1)))
        labels.update(scene_labels(f"CLEVR_random{seed}_{i:06d}", names))
    return labels


def hard_labels(labels: dict[str, list[str]], seed: int) -> dict[str, list[str]]:
    """Labels of scenes that are hard to paint, shuffled, made from `labels` of i-CLEVR scenes.

    Each scene with two objects of one colour is there two times, to be placed anew. In TWICE other scenes an object is
    there twice. These show the mistakes that a model makes, under labels that say so: a condition with a copy of an
    object, or with two objects of one colour in one shape.
    """
    rng = np.random.default_rng(seed)
    conditions = list(labels.values())
    pairs = [condition for condition in conditions if pairs_of_one_colour(condition)]
    scenes: dict[str, dict[str, list[str]]] = {}  # name -> labels of its pictures
    for copy in range(2):
        for filename, condition in labels.items():
            if pairs_of_one_colour(condition):
                scene = f"CLEVR_pairs{copy}_{scene_of(filename).removeprefix('CLEVR_train_')}"
                scenes.setdefault(scene, {})[f"{scene}_{len(condition) - 1}.png"] = condition
    for i in range(TWICE):
        if rng.random() < SAME_SHAPE_SHARE:
            names = list(pairs[rng.integers(len(pairs))])
            of_one_colour = pairs_of_one_colour(names)
            lost, doubled = of_one_colour[rng.integers(len(of_one_colour))]
            names[names.index(lost)] = doubled
        else:
            names = list(conditions[rng.integers(len(conditions))])
            names.append(names[rng.integers(len(names))])
        rng.shuffle(names)
        scene = f"CLEVR_twice_{i:06d}"
        scenes[scene] = {f"{scene}_{len(names) - 1}.png": names}
    chosen = list(scenes.values())
    order = np.random.default_rng(0).permutation(len(chosen))  # so that the first scenes are like all
    return {filename: condition for i in order for filename, condition in chosen[i].items()}


def write_new(files: dict[Path, object]):
    """Write JSON files in the official one-line form. If one is there and differs: InputError."""
    texts = {path: json.dumps(content) for path, content in files.items()}
    for path, text in texts.items():
        if path.exists() and path.read_text() != text:
            raise InputError(f"{path}: another file of that name stands there; choose another --out")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# ----------------------------------------------------------------------------------------- geometry and light


def grid_faces(rows: int, columns: int) -> np.ndarray:
    """Triangles [2 (rows - 1) (columns - 1), 3] of a grid of vertices stored row by row."""
    i, j = np.meshgrid(np.arange(rows - 1), np.arange(columns - 1), indexing="ij")
    a = (i * columns + j).ravel()
    return np.concatenate([np.stack([a, a + columns + 1, a + 1], 1), np.stack([a, a + columns, a + columns + 1], 1)])


def cube_mesh(bevel: float, segments: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, unit normals and faces of a cube of half-edge 1 with rounded edges."""
    edge = 1 - bevel + bevel * np.tan(np.linspace(0, np.pi / 4, segments))
    line = np.concatenate([-edge[::-1], edge])
    u, v = np.meshgrid(line, line, indexing="ij")
    sides = []
    for axis in range(3):
        for sign in (1, -1):
            side = np.empty((u.size, 3))
            side[:, axis] = sign
            side[:, (axis + 1) % 3] = sign * u.ravel()
            side[:, (axis + 2) % 3] = v.ravel()
            sides.append(side)
    vertices = np.concatenate(sides)
    faces = [grid_faces(len(line), len(line)) + i * u.size for i in range(len(sides))]
    core = vertices.clip(bevel - 1, 1 - bevel)  # a rounded cube is a smaller cube with a ball rolled over it
    normals = vertices - core
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return core + bevel * normals, normals, np.concatenate(faces)


def cylinder_mesh(bevel: float, segments: int = 6, around: int = 96) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, unit normals and faces of a cylinder of radius and half-height 1 with rounded rims."""
    angle = np.linspace(0, np.pi / 2, segments)
    turn = np.stack([np.sin(angle), np.cos(angle)], 1)  # normals (radial, up) from top to side
    normal = np.concatenate([[[0, 1]], turn, turn[::-1] * [1, -1], [[0, -1]]])
    corner = np.sign(normal[1:-1, 1:] + 1e-12) * [1 - bevel]
    rim = np.concatenate([np.full_like(corner, 1 - bevel), corner], 1) + bevel * normal[1:-1]
    profile = np.concatenate([[[0, 1]], rim, [[0, -1]]])
    phi = np.linspace(0, 2 * np.pi, around + 1)

    def revolve(p):
        return np.stack([np.outer(p[:, 0], np.cos(phi)), np.outer(p[:, 0], np.sin(phi)),
                         np.outer(p[:, 1], np.ones_like(phi))], 2).reshape(-1, 3)  # fmt: skip

    return revolve(profile), revolve(normal), grid_faces(len(profile), around + 1)


def cove_mesh(points: int = 65) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, unit normals and faces of the ground: a quartic Bezier profile drawn across."""
    t = np.linspace(0, 1, points)[:, None]
    weights = np.concatenate([c * t**k * (1 - t) ** (4 - k) for k, c in enumerate((1, 4, 6, 4, 1))], 1)
    profile = weights @ np.array(COVE)  # [points, 2] distance and height
    slope = np.gradient(profile, axis=0)
    slope /= np.linalg.norm(slope, axis=1, keepdims=True)
    along = np.append(COVE_ALONG, 0)
    across = np.append(COVE_ACROSS, 0)
    line = np.append(COVE_START, 0) + profile[:, :1] * along + profile[:, 1:] * [0, 0, 1]
    normal = -slope[:, 1:] * along + slope[:, :1] * [0, 0, 1]
    return np.concatenate([line, line + COVE_WIDTH * across]), np.tile(normal, (2, 1)), grid_faces(2, points)


def direct_light(positions: np.ndarray, normals: np.ndarray, lamps: dict[str, np.ndarray]) -> np.ndarray:
    """Radiance [..., 3] of unshadowed ground at `positions` [..., 3] by sun and lamps alone: no noise."""
    irradiance = SUN_IRRADIANCE * (-normals @ np.array(SUN_DIRECTION)).clip(0)[..., None] * np.ones(3)
    offsets = (np.arange(4) + 0.5) / 4 - 0.5
    for name, (_, side, power, rgb) in LAMPS.items():
        aim = -lamps[name] / np.linalg.norm(lamps[name])
        right = np.cross(aim, [0, 0, 1])
        right /= np.linalg.norm(right)
        up = np.cross(right, aim)
        radiance = power / (np.pi * side**2) * np.array(rgb)
        for u in offsets:  # a lamp as 4 x 4 small patches
            for v in offsets:
                ray = lamps[name] + side * (u * right + v * up) - positions
                square = (ray**2).sum(-1)
                cosines = (ray * normals).sum(-1).clip(0) * (-ray @ aim).clip(0) / square
                irradiance += (cosines / square * side**2 / 16)[..., None] * radiance
    return GROUND_ALBEDO / np.pi * irradiance


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear radiance -> uint8, by the sRGB curve."""
    x = linear.clip(0, 1)
    return (np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055) * 255 + 0.5).astype(np.uint8)


class Renderer:
    """Renders scenes of one film size. Setting up takes a second or two."""

    def __init__(self, size: str, samples: int, seed: int):
        import mitsuba as mi  # here, and in workers alone: the variant and the thread count are process-wide

        mi.set_variant("scalar_rgb")
        self.mi: Any = mi  # its types depend on the variant
        self.samples = samples
        self.seed = seed
        self.film = FILM_SIZES[size]
        width, height = size.split("x")
        self.pixels = (int(width), int(height))
        self.folder = tempfile.TemporaryDirectory()
        self.shapes = {
            "sphere": {"type": "sphere"},
            "cube": self.write_mesh("cube", *cube_mesh(CUBE_BEVEL)),
            "cylinder": self.write_mesh("cylinder", *cylinder_mesh(CYLINDER_BEVEL)),
            "cove": self.write_mesh("cove", *cove_mesh()),
        }
        self.rubber = {
            color: mi.load_dict({
                "type": "roughplastic", "distribution": "beckmann", "alpha": 0.35, "int_ior": 1.2,
                "nonlinear": False,
                "specular_reflectance": {"type": "rgb", "value": 0.8},
                "diffuse_reflectance": {"type": "rgb", "value": [min(1, BRIGHTNESS * x / 255) for x in rgb]},
            }) for color, rgb in COLORS.items()
        }  # fmt: skip
        self.positions, self.normals = self.ground_points(self.film)
        self.indirect_light = self.ground_indirect()
        self.empty_depth = self.depth([])

    def write_mesh(self, name: str, vertices: np.ndarray, normals: np.ndarray, faces: np.ndarray) -> dict:
        """Write a mesh to a file of its own. Returns what a scene has to say to show it."""
        mesh = self.mi.Mesh(name, len(vertices), len(faces), has_vertex_normals=True)
        values = self.mi.traverse(mesh)
        values["vertex_positions"] = vertices.astype(np.float32).ravel()
        values["vertex_normals"] = normals.astype(np.float32).ravel()
        values["faces"] = faces.astype(np.uint32).ravel()
        values.update()
        path = str(Path(self.folder.name, f"{name}.ply"))
        mesh.write_ply(path)
        return {"type": "ply", "filename": path}

    def scene(self, placed: list[tuple], lamps: dict[str, np.ndarray], film: tuple[int, int]):
        """A Mitsuba scene: ground, sun, `lamps` and `placed` objects (name, x, y, degrees)."""
        transform = self.mi.ScalarTransform4f
        white = {"type": "rgb", "value": GROUND_ALBEDO}
        content = {
            "type": "scene",
            "sensor": {
                "type": "perspective", "fov": FIELD_OF_VIEW, "fov_axis": "x",
                "to_world": transform().look_at(origin=CAMERA, target=[0, 0, 0], up=[0, 0, 1]),
                "film": {"type": "hdrfilm", "width": film[0], "height": film[1], "pixel_format": "rgb",
                         "rfilter": {"type": "box"}},
                "sampler": {"type": "multijitter"},
            },
            "ground": self.shapes["cove"] | {
                "bsdf": {"type": "twosided", "b": {"type": "diffuse", "reflectance": white}}},
            "sun": {"type": "directional", "direction": SUN_DIRECTION,
                    "irradiance": {"type": "rgb", "value": SUN_IRRADIANCE}},
        }  # fmt: skip
        for name, position in lamps.items():
            _, side, power, rgb = LAMPS[name]
            content[name] = {
                "type": "rectangle",
                "to_world": transform().look_at(position, target=[0, 0, 0], up=[0, 0, 1]).scale(side / 2),
                "emitter": {"type": "area", "radiance": {"type": "rgb", "value": np.multiply(
                    rgb, power / (np.pi * side**2)).tolist()}},
                "bsdf": {"type": "null"},  # lets light through: Blender's lamps cast no shadow in the sun
            }  # fmt: skip
        for i, (name, x, y, degrees) in enumerate(placed):
            color, shape = name.split()
            at = transform().translate([x, y, OBJECT_SIZE]).rotate([0, 0, 1], degrees).scale(OBJECT_SIZE)
            content[f"object{i}"] = self.shapes[shape] | {"to_world": at, "bsdf": self.rubber[color]}
        # Optimised, objects of one material would become one shape, and `place` could not tell them apart.
        return self.mi.load_dict(content, optimize=False)

    def trace(self, scene, samples: int, seed: int) -> np.ndarray:
        """Path-traced linear radiance [height, width, 3]. Only volpath lets light through null surfaces."""
        integrator = self.mi.load_dict({"type": "volpath", "max_depth": 5, "hide_emitters": True})
        return np.array(self.mi.render(scene, integrator=integrator, spp=samples, seed=seed))

    def auxiliary(self, scene, kind: str, samples: int) -> np.ndarray:
        integrator = self.mi.load_dict({"type": "aov", "aovs": kind} if ":" in kind else {"type": kind})
        return np.array(self.mi.render(scene, integrator=integrator, spp=samples, seed=0))

    def depth(self, placed: list[tuple]) -> np.ndarray:
        """Distance [height, width, 3] to what a pixel shows. No lamps: these rays would hit them."""
        return self.auxiliary(self.scene(placed, {}, self.film), "depth", 4)

    def ground_points(self, film: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Mean position and unit normal of the empty ground in each pixel, both [height, width, 3]."""
        values = self.auxiliary(self.scene([], {}, film), "p:position,n:sh_normal", 16)
        normals = values[..., 3:6]
        return values[..., :3], normals / np.linalg.norm(normals, axis=-1, keepdims=True)

    def ground_indirect(self) -> np.ndarray:
        """Light from ground to ground [height, width, 3]: faint and smooth, so coarse and unjittered."""
        lamps = {name: np.array(lamp[0]) for name, lamp in LAMPS.items()}
        film = (32, 24)
        indirect = self.trace(self.scene([], lamps, film), 1024, seed=0)
        indirect = (indirect - direct_light(*self.ground_points(film), lamps)).astype(np.float32)
        channels = [Image.fromarray(indirect[..., c]) for c in range(3)]
        return np.stack([np.array(c.resize(self.film, Image.Resampling.BICUBIC)) for c in channels], -1)

    def visible_pixels(self, placed: list[tuple], film: tuple[int, int]) -> list[int]:
        """How many pixels of `film` show each of the `placed` objects."""
        scene = self.scene(placed, {}, film)
        shape_of = self.auxiliary(scene, "i:shape_index", 1)[..., 0]
        index = {shape.id(): i for i, shape in enumerate(scene.shapes(), 1)}  # Mitsuba counts from one
        return [int((shape_of == index[f"object{k}"]).sum()) for k in range(len(placed))]

    def place(self, rng: np.random.Generator, names: list[str]) -> list[tuple]:
        """Positions for five objects, `names` first, the rest drawn: (name, x, y, degrees), all in sight.

        The first stands at the origin. All are drawn anew while one shows fewer than 200 of 320x240 pixels.
        """
        others = [name for name in draw_objects(rng, MAX_OBJECTS) if name not in names]
        names = names + others[: MAX_OBJECTS - len(names)]
        while True:
            points = [np.zeros(2)]
            for point in rng.uniform(-PLACE_RANGE, PLACE_RANGE, (1000, 2)):
                if min(np.linalg.norm(point - p) for p in points) >= MIN_DISTANCE:
                    points.append(point)
                if len(points) == len(names):
                    break
            else:
                continue  # the first few left no room for the fifth
            degrees = [float(rng.uniform(0, 360)) for _ in names]
            placed = [(n, *map(float, p), d) for n, p, d in zip(names, points, degrees, strict=True)]
            if min(self.visible_pixels(placed, (320, 240))) >= MIN_VISIBLE:
                return placed

    def layout(self, scene_name: str, names: list[str]) -> tuple[list[tuple], dict[str, np.ndarray], int]:
        """Placed objects, lamp positions and sampler seed of a scene, from (seed, scene name) alone."""
        rng = np.random.default_rng([self.seed, *scene_name.encode()])
        lamps = {n: np.add(lamp[0], rng.uniform(-LAMP_JITTER, LAMP_JITTER, 3)) for n, lamp in LAMPS.items()}
        trace_seed = int(rng.integers(2**31))
        return self.place(rng, names), lamps, trace_seed

    def pictures(self, scene_name: str, names: list[str], counts: list[int]) -> list[Image.Image]:
        """The scene with its first k objects, for each k of `counts`.

        On ground pixels the sampler's noise is taken out: what the empty ground, traced with the same seed,
        is off its noiseless light is subtracted.
        """
        placed, lamps, seed = self.layout(scene_name, names)
        empty = self.scene([], lamps, self.film)
        noise = self.trace(empty, self.samples, seed) - direct_light(self.positions, self.normals, lamps)
        noise -= self.indirect_light
        images = []
        for count in counts:
            scene = self.scene(placed[:count], lamps, self.film)
            is_ground = np.abs(self.depth(placed[:count]) - self.empty_depth).max(-1, keepdims=True) < 1e-3
            image = Image.fromarray(to_srgb(self.trace(scene, self.samples, seed) - noise * is_ground))
            images.append(image.resize(self.pixels, Image.Resampling.BILINEAR))
        return images


# ----------------------------------------------------------------------------------------------- command line


renderer: Renderer  # of this worker


def start_worker(size: str, samples: int, seed: int):
    global renderer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    import drjit

    drjit.set_thread_count(1)
    renderer = Renderer(size, samples, seed)


def render_scene(job: Job) -> list[bytes]:
    """The PNG files of one scene. The parent writes them, in order, so a stop leaves no gap."""
    files = []
    for image in renderer.pictures(*job):
        buffer = io.BytesIO()
        image.save(buffer, "png")
        files.append(buffer.getvalue())
    return files


def group_scenes(labels: dict[str, list[str]], path: Path) -> dict[str, list[str]]:
    """Scene name -> its file names, in file order. Raises InputError if its label lists are not nested."""
    scenes: dict[str, list[str]] = {}
    for filename in labels:
        scenes.setdefault(scene_of(filename, path), []).append(filename)
    for filenames in scenes.values():
        longest = max((labels[f] for f in filenames), key=len)
        for f in filenames:
            if labels[f] != longest[: len(labels[f])]:
                raise InputError(f"{path}, entry {f!r}: expected the first objects of its scene, {longest}")
    return scenes


def scene_job(name: str, filenames: list[str], labels: dict[str, list[str]]) -> Job:
    """What `render_scene` takes to render the pictures `filenames` of a scene."""
    conditions = [labels[f] for f in filenames]
    return name, max(conditions, key=len), [len(c) for c in conditions]


def refuse_others(out: Path, labels_path: Path):
    """Raise InputError if `out` holds anything that render.py did not make, but for the label file itself."""
    found = set(contents(out))
    if MANIFEST_NAME in found:
        return
    if labels_path.resolve().parent == out.resolve():
        found.discard(labels_path.name)
    if found:
        raise InputError(f"{out}: holds files that render.py did not make ({shown(min(found))}); choose another --out")


def mitsuba_version() -> str:
    try:
        return importlib.metadata.version("mitsuba")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("mitsuba: not installed; pip install -r requirements-dev.txt") from None


def render_scenes(jobs: list[Job], options: dict, workers: int) -> Iterator[list[bytes]]:
    """Yield the PNG files of each of `jobs`, made by `scene_job`."""
    context = multiprocessing.get_context("spawn")
    start = (options["size"], options["samples"], options["seed"])
    bar = tqdm(total=sum(len(counts) for _, _, counts in jobs), unit="picture", disable=not jobs)
    with bar, context.Pool(max(1, min(workers, len(jobs))), start_worker, start) as pool:
        for pictures in pool.imap(render_scene, jobs):
            yield pictures
            bar.update(len(pictures))


def pack(out: Path, labels_path: Path, objects: dict[str, int], limit: int | None):
    """Write the whole set in `out`, or its first `limit` scenes, to `out`.npz."""
    refuse_others(out, labels_path)
    manifest = open_manifest(out, {"labels_sha256": text_sha256(labels_path)})
    path = out.with_name(f"{out.name}.npz")
    if path.exists() and not is_pack(path):
        raise InputError(f"{path}: there already, and no pack of render.py; choose another --out")
    data = ICLEVRDataset(out, labels_path, objects)
    if manifest["scenes_done"] != limit and len(data) < len(data.label_file):
        raise InputError(
            f"{out}: {len(data):,} of {len(data.label_file):,} pictures; render the rest before packing, or pack the "
            f"{manifest['scenes_done']} scenes there are with --limit"
        )
    if manifest.get("options", {}).get("size") != "64x64":
        raise InputError(f"{out}: expected pictures rendered at 64x64")
    save_pack(path, data.images, data.labels, data.filenames, data.objects, manifest)
    print(f"{path}: {len(data):,} pictures, {path.stat().st_size / 1e6:.1f} MB")


def verify(path: Path, labels_path: Path, count: int, workers: int, objects: dict[str, int]):
    """Render `count` scenes of the pack `path`, spread evenly, with its own options; print what differs."""
    here = mitsuba_version()
    images, manifest, labels = load_pack(path, labels_path, load_labels(labels_path, objects))
    options = manifest["options"]
    scenes = group_scenes(labels, labels_path)
    names = list(scenes)
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, count).astype(int))]
    jobs = [scene_job(name, scenes[name], labels) for name in chosen]
    index_of = {filename: i for i, filename in enumerate(labels)}
    differences = []
    for name, pngs in zip(chosen, render_scenes(jobs, options, workers), strict=True):
        for filename, png in zip(scenes[name], pngs, strict=True):
            packed = images[index_of[filename]].permute(1, 2, 0).numpy()
            image = np.array(Image.open(io.BytesIO(png))).astype(int)
            differences.append(abs(image - packed).max(-1))
    share = np.mean(np.array(differences) > 0)
    print(f"{path}: {len(differences)} of {len(images):,} pictures rendered again")
    print(f"{share:.4%} of their pixels differ, by {np.max(differences)} grey levels at most")
    if here != options["mitsuba"]:
        print(f"packed from Mitsuba {options['mitsuba']}, rendered again with {here}")


def render_folder(out: Path, labels_path: Path, objects: dict[str, int], args: argparse.Namespace):
    """Render the scenes that `out` lacks of the first `args.limit` of a label file, or of all.

    Ctrl-C ends the process with exit code 130. What was rendered stays, and the same command goes on.
    """
    labels = load_labels(labels_path, objects, may_repeat=True)
    scenes = group_scenes(labels, labels_path)
    options = {"size": args.size, "samples": args.samples, "seed": args.seed, "mitsuba": mitsuba_version()}
    wanted = {"labels": labels_path.name, "labels_sha256": text_sha256(labels_path), "options": options}
    manifest = open_manifest(out, wanted)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MANIFEST_NAME, manifest)

    todo = list(scenes)[manifest["scenes_done"] : args.limit]
    jobs = [scene_job(name, scenes[name], labels) for name in todo]
    rendered = render_scenes(jobs, options, args.workers)
    try:
        with signals_interrupt():
            for name, pictures in zip(todo, rendered, strict=True):
                for filename, png in zip(scenes[name], pictures, strict=True):
                    (out / filename).write_bytes(png)
                manifest["scenes_done"] += 1
                write_json(out / MANIFEST_NAME, manifest)
    except KeyboardInterrupt:
        done = f"{manifest['scenes_done']} of {len(scenes)} scenes"
        print(f"stopped after {done}; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"{out}: {manifest['scenes_done']} of {len(scenes)} scenes are rendered")


@command
def main(argv: list[str] | None = None):
    args = parse_args(argv)
    if args.make_labels:
        folder = args.out or Path()
        write_new({folder / name: content for name, content in make_labels(args.seed).items()})
        return
    objects = load_objects()
    out = args.out or Path("iclevr")
    if args.hard_labels:
        write_new({out / LABELS_NAME: hard_labels(load_labels(args.labels, objects), args.seed)})
    elif args.pack:
        pack(out, args.labels, objects, args.limit)
    elif args.export:
        export(ICLEVRDataset(args.out or PACK, args.labels, objects), args.export)
    elif args.verify:
        path = out.with_name(f"{out.name}.npz") if args.out else PACK
        verify(path, args.labels, args.limit or 20, args.workers, objects)
    else:
        labels_path = out / LABELS_NAME if args.random_scenes else args.labels
        refuse_others(out, labels_path)
        if args.random_scenes:
            write_new({labels_path: random_labels(args.random_scenes, args.seed)})
        render_folder(out, labels_path, objects, args)


if __name__ == "__main__":
    main()
