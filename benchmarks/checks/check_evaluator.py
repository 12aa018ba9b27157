"""What the evaluator sees and misses in the pictures that ship, none of whose scenes it was trained on.

    python benchmarks/checks/check_evaluator.py --sheet docs/evaluator_failures.png

Prints tables in Markdown (docs/evaluator.md) and draws every picture whose set of objects it gets wrong. How
much of an object is hidden comes from the scenes themselves, which data/render.py places again.
"""

import argparse
import bisect
import collections
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import render
from data.pack import PACK
from dataset import ICLEVRDataset, to_float
from evaluator import evaluation_model, soften
from infra.commands import ROOT
from label_files import load_objects, scene_of
from labels import colour_of, shape_of
from report.metrics import confusions, kind_of

BLUR = 0.6  # pixels
NOISE = 4  # grey levels
HIDDEN = (0, 0.05, 0.25, 0.5, 0.75, 1)  # shares of an object's pixels
FILM = (160, 120)


def hidden_shares(job: render.Job) -> list[list[float]]:
    """For each picture of a scene: the share of each object that other objects hide."""
    name, names, counts = job
    renderer = render.renderer  # of this worker
    placed = renderer.layout(name, names)[0]
    alone = [renderer.visible_pixels([p], FILM)[0] for p in placed[: max(counts)]]
    shares = []
    for count in counts:
        together = renderer.visible_pixels(placed[:count], FILM)
        shares.append([1 - min(1, t / a) for t, a in zip(together, alone[:count], strict=True)])
    return shares


def all_hidden_shares(data: ICLEVRDataset) -> list[list[float]]:
    """`hidden_shares` of all pictures, in their order."""
    options = data.manifest["options"]
    labels = dict(zip(data.filenames, data.conditions, strict=True))
    scenes = render.group_scenes(labels, PACK)
    jobs = [render.scene_job(name, filenames, labels) for name, filenames in scenes.items()]
    context = multiprocessing.get_context("spawn")
    start = ("64x64", options["samples"], options["seed"])
    shares = []
    with context.Pool(os.cpu_count(), render.start_worker, start) as pool:
        for of_scene in tqdm(pool.imap(hidden_shares, jobs, chunksize=8), total=len(jobs), unit="scene"):
            shares += of_scene
    return shares


def probabilities(judge: evaluation_model, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the evaluator gives for uint8 images [N, 3, 64, 64], as they are and softened: two of [N, 24]."""
    torch.manual_seed(0)
    soft = []
    for batch in tqdm(images.split(500), unit="batch"):
        soft.append(judge.probabilities(soften(to_float(batch), BLUR, NOISE)))
    return {"as rendered": judge.judge(images), f"blur {BLUR} px, noise {NOISE} levels": torch.cat(soft)}


def score_rows(judge: evaluation_model, outputs: dict[str, torch.Tensor], labels: torch.Tensor) -> list:
    """Accuracy and exact set of each of `outputs`, of all pictures and by their number of objects."""
    number = labels.sum(1)
    groups = [("accuracy, micro top-k", "exact set", number > 0)]
    for n, text in {1: "1 object", 2: "2 objects", 3: "3 objects"}.items():
        groups.append((f"accuracy, {text}", f"exact set, {text}", number == n))
    rows = []
    for accuracy, exact_set, chosen in groups:
        rows.append([accuracy, *(judge.compute_acc(o[chosen], labels[chosen]) for o in outputs.values())])
        rows.append([exact_set, *(judge.exact_set(o[chosen], labels[chosen]) for o in outputs.values())])
    return rows


def group_rows(groups: list[str], asked: torch.Tensor, seen: torch.Tensor) -> list:
    """What is asked for and what is seen, bool [N, 24], by the group (colour or shape) of each label [24]."""
    rows = []
    for group in dict.fromkeys(groups):
        members = torch.tensor([other == group for other in groups])
        there = int(asked[:, members].sum())
        hits = int((asked & seen)[:, members].sum())
        surplus = int((seen & ~asked)[:, members].sum())
        rows.append([group, there, there - hits, surplus, hits / there])
    return rows


def mistake_rows(mistakes: dict[int, list[tuple[str, str]]]) -> tuple[list, list]:
    """The kinds of mistakes, and which shape or colour was taken for which."""
    kinds: collections.Counter = collections.Counter()
    taken: collections.Counter = collections.Counter()
    for pairs in mistakes.values():
        for asked, seen in pairs:
            kind = kind_of(asked, seen)
            kinds[kind] += 1
            if kind == "shape mistaken":
                taken[shape_of(asked), shape_of(seen)] += 1
            elif kind == "colour mistaken":
                taken[colour_of(asked), colour_of(seen)] += 1
    return [list(row) for row in kinds.most_common()], [[*pair, n] for pair, n in taken.most_common()]


def hidden_rows(data: ICLEVRDataset, hidden: list[list[float]], seen: torch.Tensor) -> list:
    """Objects by how much of them is hidden."""
    hits = collections.defaultdict(list)
    for i, shares in enumerate(hidden):
        for name, share in zip(data.conditions[i], shares, strict=True):
            upper = bisect.bisect_right(HIDDEN, share, 1, len(HIDDEN) - 1)
            hits[upper].append(bool(seen[i, data.objects[name]]))
    rows = []
    for upper, of_objects in sorted(hits.items()):
        there = len(of_objects)
        hit = sum(of_objects)
        rows.append([f"{HIDDEN[upper - 1]:.0%} to {HIDDEN[upper]:.0%}", there, there - hit, hit / there])
    return rows


def table(title: str, header: list[str], rows: list[list]):
    print(f"\n**{title}**\n")
    for i, row in enumerate([header, *rows]):
        print("| " + " | ".join(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row) + " |")
        if i == 0:
            print("|" + "---|" * len(header))


def captions(data: ICLEVRDataset, mistakes: dict[int, list[tuple[str, str]]], hidden: list) -> list[str]:
    """For each picture with mistakes: two of them at most, and how much of the first object is hidden."""
    found = []
    for i, pairs in mistakes.items():
        lines = [f"{asked or 'nothing'} -> {seen or 'nothing'}" for asked, seen in pairs[:2]]
        missed = [asked for asked, _ in pairs if asked]
        if missed:
            lines.append(f"hidden {hidden[i][data.conditions[i].index(missed[0])]:.0%}")
        found.append("\n".join(lines))
    return found


def draw_sheet(path: Path, images: np.ndarray, captions: list[str], columns: int = 8):
    side = 160
    height = side + 16 + 15 * max(1, max(caption.count("\n") for caption in captions))
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = i % columns * side
        y = i // columns * height
        sheet.paste(Image.fromarray(image).resize((side - 4, side - 4), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + side - 2), caption, "black")
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weights", type=Path, default=ROOT / "weights" / "evaluator.pth")
    add("--data", type=Path, default=PACK, help="what data/render.py made (default: %(default)s)")
    add("--sheet", type=Path, help="picture of all failures to write")
    args = parser.parse_args()
    objects = load_objects()
    names = sorted(objects, key=objects.get)
    data = ICLEVRDataset(args.data, ROOT / "train.json", objects)
    judge = evaluation_model(args.weights)
    outputs = probabilities(judge, data.images)
    asked = data.labels.bool()
    seen = outputs["as rendered"] > judge.threshold

    scenes = len({scene_of(filename) for filename in data.filenames})
    print(f"{len(data):,} pictures of {scenes:,} scenes; threshold {judge.threshold}")
    rows = score_rows(judge, outputs, data.labels)
    table("All pictures, and by number of objects", ["measure", *outputs], rows)
    header = ["", "objects", "not seen", "seen where there is none", "share seen"]
    table("By colour", header, group_rows([colour_of(name) for name in names], asked, seen))
    table("By shape", header, group_rows([shape_of(name) for name in names], asked, seen))
    failed = (seen != asked).any(1).nonzero().flatten().tolist()
    mistakes = {i: confusions(names, asked[i], seen[i]) for i in failed}
    kinds, taken = mistake_rows(mistakes)
    table("Kinds of mistakes", ["", "objects"], kinds)
    table("What is taken for what", ["asked", "seen", "objects"], taken)
    hidden = all_hidden_shares(data)
    rows = hidden_rows(data, hidden, seen)
    table("By how much of an object others hide", ["hidden", "objects", "not seen", "share seen"], rows)
    if args.sheet:
        images = data.images[failed].permute(0, 2, 3, 1).numpy()
        draw_sheet(args.sheet, images, captions(data, mistakes, hidden))


if __name__ == "__main__":
    main()
