"""Compare the pictures of data/render.py with what was measured on real i-CLEVR pictures.

    python benchmarks/checks/check_render.py                         # everything; minutes
    python benchmarks/checks/check_render.py --only ground speed --json check.json
    python benchmarks/checks/check_render.py --sheet sheet.png       # a sheet of our pictures, no checks

Prints one row per check, measured against expected, and exits with 1 if one fails. The real pictures are
not part of the project: without them (--real) the rows that need them are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data import render
from data.render import LAMP_JITTER, LAMPS, SAMPLES, Renderer, direct_light
from infra.files import load_json

# Green channel of ground pixels (row, column) of 64x64 in samples of four public models, trained on the real
# pictures: range over the models of the mean and of the standard deviation over pictures.
GROUND = {
    (3, 5): ((105, 107), (0.6, 1.8)), (28, 3): ((133, 136), (7, 13)), (32, 3): ((131, 136), (6, 12)),
    (40, 5): ((125, 126), (4, 4)), (60, 58): ((145, 151), (6, 10)), (50, 60): ((136, 141), (5, 7)),
    (20, 60): ((109, 109), (1.7, 1.7)), (10, 32): ((107, 107), (1, 2.5)),
}  # fmt: skip
# Mean colours of objects in six real pictures of 320x240, and where check_real finds them in their scenes.
COLORS = {
    "purple": ((107, 59, 125), [("purple sphere", 0.0, 0.0)]),
    "red": ((113, 53, 52), [("red sphere", -0.53, -2.45)]),
    "brown": ((100, 76, 44), [("brown cylinder", 2.37, 2.19), ("brown cube", -2.5, -0.9)]),
    "blue": ((69, 88, 137), [("blue cylinder", 2.81, -1.12)]),
    "yellow": ((142, 135, 68), [("yellow cube", 0.0, 0.0)]),
}
# Boxes of three real objects in pixels of 320x240: middle (x, y), width, height; None where it was not noted.
BOXES: dict[str, tuple] = {
    "purple sphere": ((159.5, 103), 36.5, None),  # 36-37 wide
    "brown cube": ((91, 86), 37, 42),  # far; its bottom is hidden, so 42 is down to what hides it
    "blue cylinder": ((202, 155), 50, 67),  # near
}
# Objects of the real pictures; which sides of their boxes can be told there (left, top, right, bottom).
REAL_SCENES = {
    "seqA": {"purple sphere": "ltrb", "brown cylinder": "ltrb", "red sphere": "ltrb", "brown cube": "ltr",
             "blue cylinder": "ltrb"},
    "seqB": {"gray cylinder": "trb", "red sphere": "ltrb", "yellow cube": "ltrb"},
}  # fmt: skip
COLOR_LIMIT = 8  # grey levels
GROUND_LIMIT = 4  # grey levels
REAL_GROUND_RMS = 1.5  # grey levels
BOX_LIMIT = 2  # pixels of 320x240
GRAIN_LIMITS = {"ground": 0.7, "objects": 2.0, "their edges": np.inf}  # grey levels
GRAIN_SCENES = 4
REFERENCE_SAMPLES = 600  # 25 times the default: a fifth of its noise, 2 % in quadrature
PICTURES_PER_SECOND = 3.0


class Table:
    """Rows of measured against expected, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        print("| what | measured | expected | |\n|---|---|---|---|")

    def add(self, what: str, measured: str, expected: str, passed: bool):
        self.rows.append({"what": what, "measured": measured, "expected": expected, "passed": bool(passed)})
        print(f"| {what} | {measured} | {expected} | {'ok' if passed else 'MISSED'} |", flush=True)


def draw_lamps(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: LAMPS[name][0] + rng.uniform(-LAMP_JITTER, LAMP_JITTER, 3) for name in LAMPS}


def moved_lamps(offsets: np.ndarray) -> dict[str, np.ndarray]:
    """The lamps, each moved by its row of `offsets` [3, 3]."""
    return {name: LAMPS[name][0] + offset for name, offset in zip(LAMPS, offsets, strict=True)}


def make_picture(renderer: Renderer, placed: list[tuple], lamps: dict[str, np.ndarray]) -> np.ndarray:
    """A picture [height, width, 3] of `placed` objects and `lamps`, made as the ones of the command are."""
    with mock.patch.object(renderer, "layout", return_value=(placed, lamps, 1)):
        return np.array(renderer.pictures("", [], [len(placed)])[0]).astype(float)


def object_map(renderer: Renderer, placed: list[tuple], film: tuple[int, int]) -> np.ndarray:
    """Which object each pixel of `film` shows [height, width]: 0 ground, 1 the first of `placed`, and so on.

    One sample per pixel, so an edge is known to half a pixel of `film`.
    """
    scene = renderer.scene(placed, {}, film)
    shape_of = renderer.auxiliary(scene, "i:shape_index", 1)[..., 0].round().astype(int)
    number = [0] + [int(s.id()[6:]) + 1 if s.id().startswith("object") else 0 for s in scene.shapes()]
    return np.array(number)[shape_of]


def box(mask: np.ndarray) -> np.ndarray:
    """Left, top, right, bottom of a mask in pixels of 320x240, right and bottom exclusive."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) * 320 / mask.shape[1]


def is_known(sides: str) -> np.ndarray:
    """Which of left, top, right and bottom are among `sides`."""
    return np.array([side in sides for side in "ltrb"])


def middle(edges: np.ndarray, sides: str = "ltrb") -> np.ndarray:
    """Middle (x, y) of a box in pixel indices; where only one of two opposite sides is known, that side."""
    known = is_known(sides)
    x = edges[0::2][known[0::2]].mean()
    y = edges[1::2][known[1::2]].mean()
    return np.array([x, y]) - 0.5


def fit_place(renderer: Renderer, others: list[tuple], name: str, target: np.ndarray, sides: str, real=None) -> tuple:
    """Where to put `name` among `others` so that its visible box has the middle of `target`, by `sides`.

    `target` is left, top, right, bottom in 320x240. The object is moved on the ground by as much as its box
    is off, a few times. The rotation of a cube is the one whose mask comes closest to `real` [480, 640];
    without `real`, the one whose box comes closest to `target`.
    """
    center = middle(target)

    def ground(point: np.ndarray) -> np.ndarray:  # interpolated between pixels
        x, y = point.clip(0, [318, 238]).astype(int)
        here = renderer.positions[y, x, :2]
        to_the_right = renderer.positions[y, x + 1, :2] - here
        downwards = renderer.positions[y + 1, x, :2] - here
        return here + (point[0] - x) * to_the_right + (point[1] - y) * downwards

    found: list[tuple[float, tuple]] = []
    place = ground(center)
    for degrees in range(0, 90, 5) if name.endswith("cube") else [0]:
        for _ in range(2 if found else 6):  # the place for the last angle is a good start
            placed = (name, *map(float, place), float(degrees))
            mask = object_map(renderer, [*others, placed], (640, 480)) == len(others) + 1
            off = middle(target, sides) - middle(box(mask), sides)
            place = place + ground(center + off) - ground(center)
        boxes_differ = np.abs(box(mask) - target)[is_known(sides)].sum()
        found.append((boxes_differ if real is None else (mask ^ real).sum(), placed))
    return min(found)[1]


def check_ground(table: Table, args: argparse.Namespace):
    """Mean and spread of eight ground pixels of the empty scene over draws of the lamps."""
    renderer = Renderer("64x64", SAMPLES, 0)
    rng = np.random.default_rng(0)
    pictures = np.stack([make_picture(renderer, [], draw_lamps(rng)) for _ in range(args.draws)])
    for (row, column), (means, spreads) in GROUND.items():
        where = f"ground at {row},{column}"
        mean = float(pictures[:, row, column, 1].mean())
        close = means[0] - GROUND_LIMIT <= mean <= means[1] + GROUND_LIMIT
        expected = f"{means[0]}-{means[1]}, within {GROUND_LIMIT}"
        table.add(f"{where}: mean of {args.draws} draws", f"{mean:.1f}", expected, close)
        spread = float(pictures[:, row, column, 1].std(ddof=1))
        close = 0.7 * spreads[0] <= spread <= 1.3 * spreads[1]
        table.add(f"{where}: spread", f"{spread:.1f}", f"{spreads[0]}-{spreads[1]}, within 30 %", close)


def check_grain(table: Table, args: argparse.Namespace):
    """Standard deviation of 64x64 pictures at the default samples about the same scenes with many samples."""
    few = Renderer("64x64", SAMPLES, 0)
    many = Renderer("64x64", REFERENCE_SAMPLES, 0)
    noise: dict[str, list[np.ndarray]] = {where: [] for where in GRAIN_LIMITS}
    for scene in range(GRAIN_SCENES):
        names = render.draw_objects(np.random.default_rng(scene), 3)
        placed, lamps, _ = few.layout(f"grain_{scene}", names)
        placed = placed[:3]
        off = make_picture(few, placed, lamps) - make_picture(many, placed, lamps)  # [64, 64, 3]
        shown = object_map(few, placed, (512, 512 * 3 // 4)) > 0
        small = Image.fromarray(shown.astype(np.float32)).resize((64, 64), Image.Resampling.BILINEAR)
        covered = np.array(small)  # share of each pixel that shows an object
        noise["ground"].append(off[covered < 1e-3])
        noise["objects"].append(off[covered > 0.999])
        noise["their edges"].append(off[(covered >= 1e-3) & (covered <= 0.999)])
    for where, limit in GRAIN_LIMITS.items():
        values = np.concatenate(noise[where])
        deviation = float(values.std())
        expected = f"< {limit}" if limit < np.inf else "no goal"
        of = f"{where} ({len(values)} pixels; against {REFERENCE_SAMPLES} samples)"
        table.add(f"grain at {SAMPLES} samples, {of}", f"{deviation:.2f}", expected, deviation < limit)


def check_speed(table: Table, args: argparse.Namespace):
    """Pictures per second of the command on all cores, without its start: the difference of two runs."""
    cores = os.cpu_count() or 1
    scenes = (2 * cores, 12 * cores)  # of three pictures each
    seconds = []
    for limit in scenes:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            line = [sys.executable, "-m", "data.render", "--limit", str(limit), "--out", folder]
            subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
    rate = 3 * (scenes[1] - scenes[0]) / (seconds[1] - seconds[0])
    expected = f">= {PICTURES_PER_SECOND:g} on 2"
    table.add(f"pictures per second, {cores} cores", f"{rate:.2f}", expected, rate >= PICTURES_PER_SECOND)


def check_colors(table: Table, args: argparse.Namespace):
    """Mean colours at 320x240 of objects where the real ones stand, over draws of lamps and rotation."""
    renderer = Renderer("320x240", SAMPLES, 0)
    rng = np.random.default_rng(0)
    for expected, places in COLORS.values():
        means = []
        for i in range(args.draws):
            placed = [(*places[i % len(places)], float(rng.uniform(0, 360)))]
            light = renderer.trace(renderer.scene(placed, draw_lamps(rng), renderer.film), 4, seed=i)
            means.append(render.to_srgb(light)[object_map(renderer, placed, renderer.film) == 1].mean(0))
        names = " and ".join(name for name, _, _ in places)
        add_color(table, f"{names}: mean colour of {args.draws} draws", np.mean(means, 0), expected)


def in_words(numbers: Iterable[float], digits: int) -> str:
    return " ".join(f"{x:.{digits}f}" for x in numbers)


def add_color(table: Table, what: str, mean: np.ndarray, expected):
    close = np.abs(mean - expected).max() <= COLOR_LIMIT
    table.add(what, in_words(mean, 0), f"{in_words(expected, 0)}, within {COLOR_LIMIT}", close)


def check_boxes(table: Table, args: argparse.Namespace):
    """Where the centre sphere is, and how large a far and a near object is where a real one stands."""
    renderer = Renderer("320x240", SAMPLES, 0)

    def measure(placed: tuple) -> np.ndarray:
        return box(object_map(renderer, [placed], (1280, 960)) == 1)

    edges = measure(("purple sphere", 0.0, 0.0, 0.0))
    ours = np.array([*middle(edges), edges[2] - edges[0]])
    center, width, _ = BOXES["purple sphere"]
    add_box(table, "sphere at the centre: middle x, y, width", ours, np.array([*center, width]))
    for name, sides in {"brown cube": "ltr", "blue cylinder": "ltrb"}.items():
        center, *size = BOXES[name]
        half = np.array(size) / 2
        target = np.concatenate([center - half, center + half]) + 0.5
        left, top, right, bottom = measure(fit_place(renderer, [], name, target, sides))
        if "b" in sides:
            add_box(table, "near cylinder: width, height", np.array([right - left, bottom - top]), 2 * half)
        else:
            add_box(table, "far cube: width", np.array([right - left]), 2 * half[:1])


def add_box(table: Table, what: str, ours: np.ndarray, real: np.ndarray):
    close = np.abs(ours - real).max() <= BOX_LIMIT
    table.add(what, in_words(ours, 1), f"{in_words(real, 1)}, within {BOX_LIMIT}", close)


def ground_levels(renderer: Renderer, offsets: np.ndarray, block: int = 4) -> np.ndarray:
    """sRGB levels (float) of the empty ground, mean light of blocks of pixels, for lamp `offsets` [3, 3]."""

    def mean(x):
        return x.reshape(x.shape[0] // block, block, x.shape[1] // block, block, 3).mean((1, 3))

    light = direct_light(mean(renderer.positions), mean(renderer.normals), moved_lamps(offsets))
    light += mean(renderer.indirect_light)
    # sRGB without its linear part, which is for darker pixels than the ground has.
    return 255 * (1.055 * light ** (1 / 2.4) - 0.055)


def fit_lamps(renderer: Renderer, picture: np.ndarray, rounds: int = 12) -> tuple[np.ndarray, float, float]:
    """Offsets [3, 3] of the lamps, within +-LAMP_JITTER, that make the ground of `picture` [240, 320, 3].

    Gauss-Newton on ground outside of shadows: the fit is worst at objects and shadows, so each round takes
    only pixels near the last round's model. Returns offsets, rms in levels, share of pixels in the fit.
    """
    real = picture.reshape(60, 4, 80, 4, 3).mean((1, 3))  # [60, 80, 3]: evens out the real picture's grain
    offsets = np.zeros(9)
    for i in range(rounds):
        model = ground_levels(renderer, offsets.reshape(3, 3))
        off = real - model
        worst = np.abs(off).max(-1)
        keep = worst <= max(3, np.quantile(worst, 0.6))
        if i < rounds - 1:
            moved = [ground_levels(renderer, (offsets + 0.02 * e).reshape(3, 3)) - model for e in np.eye(9)]
            slopes = np.stack(moved, -1)[keep].reshape(-1, 9) / 0.02
            damping = 1e-3 * len(slopes) * np.eye(9) * 0.5**i
            step = np.linalg.solve(slopes.T @ slopes + damping, slopes.T @ off[keep].ravel())
            offsets = (offsets + step).clip(-LAMP_JITTER, LAMP_JITTER)
    rms = np.sqrt((off[keep] ** 2).mean())
    return offsets.reshape(3, 3), rms, keep.mean()


def object_masks(pictures: list, renderer: Renderer, offsets: np.ndarray) -> dict[str, np.ndarray]:
    """Object -> mask [240, 320] in the real pictures of a scene: five steps of seqA, or the one of seqB."""
    colored = [p.max(-1) - p.min(-1) > 30 for p in pictures]  # about half of what the objects have
    if len(pictures) > 1:
        # Each picture adds an object. What changes strongly is that object, not its reflection.
        masks = [colored[0]]
        for i in range(1, len(pictures)):
            masks.append(colored[i] & (np.abs(pictures[i] - pictures[i - 1]).max(-1) > 20))
        return dict(zip(REAL_SCENES["seqA"], masks, strict=True))
    red = colored[0] & (pictures[0][..., 0] - pictures[0][..., 1] > 25)
    ground = ground_levels(renderer, offsets).mean(-1).repeat(4, 0).repeat(4, 1)
    gray = (pictures[0].mean(-1) - ground < -25) & ~colored[0]
    gray[:, :175] = False  # left of it are shadows as dark: its left side stays unknown
    return {"gray cylinder": gray, "red sphere": red, "yellow cube": colored[0] & ~red}


def check_real(table: Table, args: argparse.Namespace):
    """Two real scenes rebuilt: lamps by the ground, places by the boxes; then sides and colours compared."""
    if not args.real.is_dir():
        print(f"{args.real}: no real pictures there, their rows are left out")
        return
    renderer = Renderer("320x240", SAMPLES, 0)
    for scene, steps in {"seqA": range(5), "seqB": [2]}.items():
        files = [args.real / f"{scene}_step{k}.png" for k in steps]
        pictures = [np.array(Image.open(f).convert("RGB")).astype(float) for f in files]
        offsets, rms, share = fit_lamps(renderer, pictures[0])
        fit = f"the lamps' fit, rms ({share:.0%}, offsets to {np.abs(offsets).max():.2f})"
        limit = f"< {REAL_GROUND_RMS}"
        table.add(f"{scene}: ground after {fit}", f"{rms:.2f}", limit, rms < REAL_GROUND_RMS)
        masks = object_masks(pictures, renderer, offsets)
        placed = rebuild(table, renderer, scene, masks)
        for i, name in enumerate(masks):
            is_sequence = len(pictures) > 1  # each picture shows one object more than the last
            real = pictures[i if is_sequence else 0]
            shown = placed[: i + 1] if is_sequence else placed
            ours = make_picture(renderer, shown, moved_lamps(offsets))
            common = masks[name] & (object_map(renderer, shown, (320, 240)) == i + 1)
            add_color(table, f"{scene}, {name}: mean colour", ours[common].mean(0), real[common].mean(0))


def rebuild(table: Table, renderer: Renderer, scene: str, masks: dict[str, np.ndarray]) -> list[tuple]:
    """Place the objects of a real scene one after the other, and compare the sides of their boxes."""
    placed: list[tuple] = []
    for name, sides in REAL_SCENES[scene].items():
        real = masks[name].repeat(2, 0).repeat(2, 1)  # [480, 640]
        placed.append(fit_place(renderer, placed, name, box(real), sides, real))
        ours = object_map(renderer, placed, (1280, 960)) == len(placed)
        known = is_known(sides)
        add_box(table, f"{scene}, {name}: sides {sides}", box(ours)[known], box(real)[known])
    return placed


CHECKS = {
    "ground": check_ground, "grain": check_grain, "speed": check_speed,
    "colors": check_colors, "boxes": check_boxes, "real": check_real,
}  # fmt: skip


def make_sheet(path: Path, count: int = 8, scale: int = 2):
    """The first scenes of train.json as data/render.py makes them: a scene a column, its steps downwards."""
    labels = load_json(ROOT / "train.json")
    scenes = render.group_scenes(labels, ROOT / "train.json")
    renderer = Renderer("64x64", SAMPLES, 0)
    sheet = Image.new("RGB", (count * 66 - 2, 3 * 66 - 2), "white")
    for column, name in enumerate(list(scenes)[:count]):
        objects = labels[scenes[name][-1]]
        for row, picture in enumerate(renderer.pictures(name, objects, [1, 2, 3])):
            sheet.paste(picture, (66 * column, 66 * row))
    size = (sheet.width * scale, sheet.height * scale)
    sheet.resize(size, Image.Resampling.NEAREST).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = ROOT.parent / "shared" / "real"
    add = parser.add_argument
    add("--real", type=Path, default=default, metavar="DIR", help="real pictures (default: %(default)s)")
    add("--draws", type=int, default=24, help="draws of the lamps (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the rows there, too")
    add("--sheet", type=Path, metavar="FILE", help="write a sheet of our pictures and stop")
    add("--only", nargs="+", choices=CHECKS, default=CHECKS, help="these checks (default: all)")
    args = parser.parse_args()
    if args.draws < 2:
        parser.error("--draws: a spread needs at least 2")
    if args.sheet:
        make_sheet(args.sheet)
        return
    table = Table()
    for name in args.only:
        CHECKS[name](table, args)
    if args.json:
        args.json.write_text(json.dumps({"draws": args.draws, "rows": table.rows}, indent=1) + "\n")
    raise SystemExit(not all(row["passed"] for row in table.rows))


if __name__ == "__main__":
    main()
