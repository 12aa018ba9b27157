"""Hold render.py's pictures against what was measured of real i-CLEVR pictures.

    python benchmarks/checks/check_render.py                    # everything; minutes
    python benchmarks/checks/check_render.py --only ground speed --json check.json
    python benchmarks/checks/check_render.py --sheet docs/render_sheet.png   # a sheet of our pictures, no checks

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
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the scripts are flat files
from data import render
from data.render import LAMP_JITTER, LAMPS, SAMPLES, Renderer, direct_light

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
BOXES = {
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
COLOR_LIMIT, BOX_LIMIT, GROUND_LIMIT = 8, 2, 4  # grey levels, pixels of 320x240, grey levels
GROUND_GRAIN, OBJECT_GRAIN, PICTURES_PER_SECOND, REAL_GROUND_RMS = 0.7, 2.0, 3.0, 1.5
GRAIN_SCENES, REFERENCE_SAMPLES = 4, 600  # 25 times the default: a fifth of its noise, 2 % in quadrature


class Table:
    """Rows of measured against expected, printed as they come."""

    def __init__(self):
        self.rows: list[dict] = []
        print("| what | measured | expected | |\n|---|---|---|---|")

    def add(self, what: str, measured: str, expected: str, passed: bool):
        self.rows.append({"what": what, "measured": measured, "expected": expected, "passed": bool(passed)})
        print(f"| {what} | {measured} | {expected} | {'ok' if passed else 'MISSED'} |", flush=True)


# ---------------------------------------------------------------------------------------------------- helpers


def draw_lamps(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {n: LAMPS[n][0] + rng.uniform(-LAMP_JITTER, LAMP_JITTER, 3) for n in LAMPS}


def make_picture(renderer: Renderer, placed: list[tuple], lamps: dict[str, np.ndarray]) -> np.ndarray:
    """A picture [height, width, 3] of `placed` objects and `lamps`, made as the ones of the command are."""
    renderer.layout = lambda name, names: (placed, lamps, 1)
    picture = renderer.pictures("", [], [len(placed)])[0]
    del renderer.layout  # the class's own again
    return np.array(picture).astype(float)


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
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) * 320 / mask.shape[1]


def middle(edges: np.ndarray, sides: str = "ltrb") -> np.ndarray:
    """Middle (x, y) of a box in pixel indices, or of the one known of two opposite sides."""
    known = np.array([side in sides for side in "ltrb"])
    return np.array([edges[i::2][known[i::2]].mean() for i in range(2)]) - 0.5


def fit_place(
    renderer: Renderer, others: list[tuple], name: str, target: np.ndarray, sides: str, error
) -> tuple:
    """Where to put `name` among `others` so that its visible box has the middle of `target`, by `sides`.

    `target` is left, top, right, bottom in 320x240. Moved as the ground there moves with the pixels, until it
    stays. The rotation of a cube is the one with the smallest `error(mask [480, 640])`.
    """
    center = middle(target)

    def ground(point: np.ndarray) -> np.ndarray:  # between four pixels
        x, y = (int(v) for v in point.clip(0, [318, 238]))
        (a, b), here = point - (x, y), renderer.positions[y, x, :2]
        return (
            here
            + a * (renderer.positions[y, x + 1, :2] - here)
            + b * (renderer.positions[y + 1, x, :2] - here)
        )

    found, place = [], ground(center)
    for degrees in range(0, 90, 5) if name.endswith("cube") else [0]:
        for _ in range(2 if found else 6):  # the place for the last angle is a good start
            placed = (name, *map(float, place), float(degrees))
            mask = object_map(renderer, [*others, placed], (640, 480)) == len(others) + 1
            off = middle(target, sides) - middle(box(mask), sides)
            place = place + ground(center + off) - ground(center)
        found.append((error(mask), placed))
    return min(found)[1]


# ----------------------------------------------------------------------------------------------------- checks


def check_ground(table: Table, draws: int):
    """Mean and spread of eight ground pixels of the empty scene over draws of the lamps."""
    renderer, rng = Renderer("64x64", SAMPLES, 0), np.random.default_rng(0)
    green = np.stack(
        [make_picture(renderer, [], draw_lamps(rng))[..., 1] for _ in range(draws)]
    )  # [draws, 64, 64]
    for (row, column), (mean, spread) in GROUND.items():
        values = green[:, row, column]
        close = mean[0] - GROUND_LIMIT <= values.mean() <= mean[1] + GROUND_LIMIT
        expected = f"{mean[0]}-{mean[1]}, within {GROUND_LIMIT}"
        table.add(f"ground at {row},{column}: mean of {draws} draws", f"{values.mean():.1f}", expected, close)
        close = 0.7 * spread[0] <= values.std(ddof=1) <= 1.3 * spread[1]
        expected = f"{spread[0]}-{spread[1]}, within 30 %"
        table.add(f"ground at {row},{column}: spread", f"{values.std(ddof=1):.1f}", expected, close)


def check_grain(table: Table):
    """Standard deviation of 64x64 pictures at the default samples about the same scenes with many samples."""
    few, many = Renderer("64x64", SAMPLES, 0), Renderer("64x64", REFERENCE_SAMPLES, 0)
    noise = {"ground": [], "objects": [], "their edges": []}
    for scene in range(GRAIN_SCENES):
        names = render.draw_objects(np.random.default_rng(scene), 3)
        placed, lamps, _ = few.layout(f"grain_{scene}", names)
        placed = placed[:3]
        off = make_picture(few, placed, lamps) - make_picture(many, placed, lamps)  # [64, 64, 3]
        shown = object_map(few, placed, (512, 512 * 3 // 4)) > 0
        covered = np.array(
            Image.fromarray(shown.astype(np.float32)).resize((64, 64), Image.Resampling.BILINEAR)
        )
        noise["ground"].append(off[covered < 1e-3])
        noise["objects"].append(off[covered > 0.999])
        noise["their edges"].append(off[(covered >= 1e-3) & (covered <= 0.999)])
    for where, limit in ("ground", GROUND_GRAIN), ("objects", OBJECT_GRAIN), ("their edges", np.inf):
        values = np.concatenate(noise[where])
        what = (
            f"grain at {SAMPLES} samples, {where} ({len(values)} pixels; against {REFERENCE_SAMPLES} samples)"
        )
        expected = f"< {limit}" if limit < np.inf else "no goal"
        table.add(what, f"{values.std():.2f}", expected, values.std() < limit)


def check_speed(table: Table):
    """Pictures per second of the command on all cores, without its start: the difference of two limits."""
    seconds, limits = [], (2 * os.cpu_count(), 12 * os.cpu_count())  # scenes of three pictures
    for limit in limits:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            line = [sys.executable, "-m", "data.render", "--limit", str(limit), "--out", folder]
            subprocess.run(line, check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
    rate = 3 * (limits[1] - limits[0]) / (seconds[1] - seconds[0])
    expected = f">= {PICTURES_PER_SECOND:g} on 2"
    table.add(
        f"pictures per second, {os.cpu_count()} cores", f"{rate:.2f}", expected, rate >= PICTURES_PER_SECOND
    )


def check_colors(table: Table, draws: int):
    """Mean colours at 320x240 of objects where the real ones stand, over draws of lamps and rotation."""
    renderer, rng = Renderer("320x240", SAMPLES, 0), np.random.default_rng(0)
    for expected, places in COLORS.values():
        means = []
        for i in range(draws):
            placed = [(*places[i % len(places)], float(rng.uniform(0, 360)))]
            light = renderer.trace(renderer.scene(placed, draw_lamps(rng), renderer.film), 4, seed=i)
            means.append(render.to_srgb(light)[object_map(renderer, placed, renderer.film) == 1].mean(0))
        names = " and ".join(name for name, _, _ in places)
        add_color(table, f"{names}: mean colour of {draws} draws", np.mean(means, 0), expected)


def add_color(table: Table, what: str, mean: np.ndarray, expected):
    close = np.abs(mean - expected).max() <= COLOR_LIMIT
    numbers = " ".join(f"{x:.0f}" for x in expected)
    table.add(what, " ".join(f"{x:.0f}" for x in mean), f"{numbers}, within {COLOR_LIMIT}", close)


def check_boxes(table: Table):
    """Where the centre sphere is, and how large a far and a near object is where a real one stands."""
    renderer = Renderer("320x240", SAMPLES, 0)

    def measure(placed: tuple) -> np.ndarray:
        return box(object_map(renderer, [placed], (1280, 960)) == 1)

    (target, width, _), edges = BOXES["purple sphere"], measure(("purple sphere", 0.0, 0.0, 0.0))
    ours, real = np.array([*middle(edges), edges[2] - edges[0]]), np.array([*target, width])
    add_box(table, "sphere at the centre: middle x, y, width", ours, real)
    for name, sides in ("brown cube", "ltr"), ("blue cylinder", "ltrb"):
        target, width, height = BOXES[name]
        half = np.array([width, height]) / 2
        real = np.concatenate([target - half, target + half]) + 0.5
        placed = fit_place(
            renderer, [], name, real, sides, lambda mask, real=real: np.abs(box(mask) - real)[:3].sum()
        )
        size = np.diff(measure(placed).reshape(2, 2), axis=0)[0]
        if "b" in sides:
            add_box(table, f"near {name.split()[1]}: width, height", size, 2 * half)
        else:
            add_box(table, f"far {name.split()[1]}: width", size[:1], 2 * half[:1])


def add_box(table: Table, what: str, ours: np.ndarray, real: np.ndarray):
    close = np.abs(ours - real).max() <= BOX_LIMIT
    text = [" ".join(f"{x:.1f}" for x in numbers) for numbers in (ours, real)]
    table.add(what, text[0], f"{text[1]}, within {BOX_LIMIT}", close)


# ---------------------------------------------------------------------------------------------- real pictures


def ground_levels(renderer: Renderer, offsets: np.ndarray, block: int = 4) -> np.ndarray:
    """sRGB levels (float) of the empty ground, mean light of blocks of pixels, for lamp `offsets` [3, 3]."""

    def mean(x):
        return x.reshape(x.shape[0] // block, block, x.shape[1] // block, block, 3).mean((1, 3))

    lamps = {n: LAMPS[n][0] + offsets[i] for i, n in enumerate(LAMPS)}
    light = direct_light(mean(renderer.positions), mean(renderer.normals), lamps) + mean(
        renderer.indirect_light
    )
    return 255 * (
        1.055 * light ** (1 / 2.4) - 0.055
    )  # the ground is never so dark as the curve's linear part


def fit_lamps(renderer: Renderer, picture: np.ndarray, rounds: int = 12) -> tuple[np.ndarray, float, float]:
    """Offsets [3, 3] of the lamps, within +-LAMP_JITTER, that make the ground of `picture` [240, 320, 3].

    Gauss-Newton on ground out of shadows: objects and shadows are what the fit leaves worst, so it goes on
    with pixels near the last round's model. Returns offsets, rms in levels, share of pixels in the fit.
    """
    real = picture.reshape(60, 4, 80, 4, 3).mean((1, 3))  # [60, 80, 3]: evens out the real picture's grain
    offsets = np.zeros(9)
    for i in range(rounds):
        model = ground_levels(renderer, offsets.reshape(3, 3))
        off = real - model
        worst = np.abs(off).max(-1)
        keep = worst <= max(3, np.quantile(worst, 0.6))
        slopes = [ground_levels(renderer, (offsets + 0.02 * e).reshape(3, 3)) - model for e in np.eye(9)]
        slopes = np.stack(slopes, -1)[keep].reshape(-1, 9) / 0.02
        rms = np.sqrt((off[keep] ** 2).mean())
        if i < rounds - 1:
            step = np.linalg.solve(
                slopes.T @ slopes + 1e-3 * len(slopes) * np.eye(9) * 0.5**i, slopes.T @ off[keep].ravel()
            )
            offsets = (offsets + step).clip(-LAMP_JITTER, LAMP_JITTER)
    return offsets.reshape(3, 3), rms, keep.mean()


def object_masks(
    pictures: list[np.ndarray], renderer: Renderer, offsets: np.ndarray
) -> dict[str, np.ndarray]:
    """Object -> mask [240, 320] in the real pictures of a scene: five steps of seqA, or the one of seqB."""
    colored = [p.max(-1) - p.min(-1) > 30 for p in pictures]  # about half of what the objects have
    if len(pictures) > 1:
        new = [
            np.ones_like(colored[0])
        ]  # and what a step changes strongly is its new object, not its reflection
        new += [np.abs(b - a).max(-1) > 20 for a, b in zip(pictures, pictures[1:], strict=False)]
        return {name: a & b for name, a, b in zip(REAL_SCENES["seqA"], colored, new, strict=True)}
    red = colored[0] & (pictures[0][..., 0] - pictures[0][..., 1] > 25)
    ground = ground_levels(renderer, offsets).mean(-1).repeat(4, 0).repeat(4, 1)
    gray = (pictures[0].mean(-1) - ground < -25) & ~colored[0]
    gray[:, :175] = False  # left of it are shadows as dark: its left side stays unknown
    return {"gray cylinder": gray, "red sphere": red, "yellow cube": colored[0] & ~red}


def check_real(table: Table, folder: Path):
    """Two real scenes rebuilt: lamps by the ground, places by the boxes; then sides and colours compared."""
    renderer = Renderer("320x240", SAMPLES, 0)
    for scene, steps in ("seqA", range(5)), ("seqB", [2]):
        files = [folder / f"{scene}_step{k}.png" for k in steps]
        pictures = [np.array(Image.open(f).convert("RGB")).astype(float) for f in files]
        offsets, rms, share = fit_lamps(renderer, pictures[0])
        what = (
            f"{scene}: ground after the lamps' fit, rms ({share:.0%}, offsets to {np.abs(offsets).max():.2f})"
        )
        table.add(what, f"{rms:.2f}", f"< {REAL_GROUND_RMS}", rms < REAL_GROUND_RMS)
        masks, placed = object_masks(pictures, renderer, offsets), []
        for name, sides in REAL_SCENES[scene].items():
            real = masks[name].repeat(2, 0).repeat(2, 1)
            at = fit_place(
                renderer, placed, name, box(real), sides, lambda mask, real=real: (mask ^ real).sum()
            )
            placed.append(at)
            shown = object_map(renderer, placed, (1280, 960)) == len(placed)
            known = [side in sides for side in "ltrb"]
            add_box(table, f"{scene}, {name}: sides {sides}", box(shown)[known], box(real)[known])
        lamps = {n: LAMPS[n][0] + offsets[i] for i, n in enumerate(LAMPS)}
        for i, (name, *_) in enumerate(placed):
            step, shown = (i, placed[: i + 1]) if len(pictures) > 1 else (0, placed)
            ours = make_picture(renderer, shown, lamps)
            both = masks[name] & (object_map(renderer, shown, (320, 240)) == i + 1)
            add_color(
                table, f"{scene}, {name}: mean colour", ours[both].mean(0), pictures[step][both].mean(0)
            )


# ----------------------------------------------------------------------------------------------- command line


def make_sheet(path: Path, scenes: int = 8, scale: int = 2):
    """The first scenes of train.json as render.py makes them: a scene a column, its three steps downwards."""
    labels = render.load_json(ROOT / "train.json")
    renderer = Renderer("64x64", SAMPLES, 0)
    sheet = Image.new("RGB", (scenes * 66 - 2, 3 * 66 - 2), "white")
    for i, (name, files) in enumerate(
        list(render.group_scenes(labels, ROOT / "train.json").items())[:scenes]
    ):
        for k, picture in enumerate(renderer.pictures(name, labels[files[-1]], [1, 2, 3])):
            sheet.paste(picture, (66 * i, 66 * k))
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(
        path, optimize=True
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = ROOT.parent / "shared" / "real"
    parser.add_argument("--real", type=Path, default=default, metavar="DIR",
                        help="the six real pictures (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--draws", type=int, default=24, help="draws of the lamps' jitter (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write a sheet of our pictures and stop")
    checks = ("ground", "grain", "speed", "colors", "boxes", "real")
    parser.add_argument(
        "--only", nargs="+", choices=checks, default=checks, help="some of the checks (default: all)"
    )
    args = parser.parse_args()
    if args.draws < 2:
        parser.error("--draws: a spread needs at least 2")
    if args.sheet:
        make_sheet(args.sheet)
        return
    table = Table()
    for check in args.only:
        if check == "real" and not args.real.is_dir():
            print(f"{args.real}: no real pictures there, their rows are left out")
        elif check == "real":
            check_real(table, args.real)
        elif check in ("ground", "colors"):
            globals()[f"check_{check}"](table, args.draws)
        else:
            globals()[f"check_{check}"](table)
    if args.json:
        args.json.write_text(json.dumps({"draws": args.draws, "rows": table.rows}, indent=1) + "\n")
    raise SystemExit(not all(row["passed"] for row in table.rows))


if __name__ == "__main__":
    main()
