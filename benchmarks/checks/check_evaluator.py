"""What the evaluator sees and misses in the pictures that ship, none of whose scenes it was trained on.

    python benchmarks/checks/check_evaluator.py --sheet docs/evaluator_failures.png

Prints tables in Markdown (docs/evaluator.md) and draws every picture whose set of objects it gets wrong. How
much of an object is hidden comes from the scenes themselves, placed again by render.py.
"""

import argparse
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
from labels import load_objects, scene_of
from report.metrics import confusions, kind_of

BLUR, NOISE = 0.6, 4  # pixels, grey levels
HIDDEN = (0, 0.05, 0.25, 0.5, 0.75, 1)  # shares of an object's pixels
FILM = (160, 120)


def hidden_shares(job: tuple[str, list[str], list[int]]) -> list[list[float]]:
    """For each picture of a scene: the share of each object that other objects hide."""
    name, names, counts = job
    renderer = render.renderer  # of this worker
    placed = renderer.layout(name, names)[0]
    alone = [renderer.visible_pixels([p], FILM)[0] for p in placed[: max(counts)]]
    together = [renderer.visible_pixels(placed[:n], FILM) for n in counts]
    return [[1 - min(1, s / a) for s, a in zip(seen, alone, strict=False)] for seen in together]


def all_hidden_shares(data: ICLEVRDataset) -> list[list[float]]:
    options = data.manifest["options"]
    labels = dict(zip(data.filenames, data.conditions, strict=True))
    scenes = render.group_scenes(labels, PACK)
    jobs = [render.scene_job(name, filenames, labels) for name, filenames in scenes.items()]
    context = multiprocessing.get_context("spawn")
    start = ("64x64", options["samples"], options["seed"])
    with context.Pool(os.cpu_count(), render.start_worker, start) as pool:
        parts = list(tqdm(pool.imap(hidden_shares, jobs, chunksize=8), total=len(jobs), unit="scene"))
    return [shares for part in parts for shares in part]


def table(title: str, header: list[str], rows: list[list]):
    print(f"\n**{title}**\n")
    for i, row in enumerate([header, *rows]):
        print("| " + " | ".join(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row) + " |")
        if i == 0:
            print("|" + "---|" * len(header))


def draw_sheet(path: Path, images: np.ndarray, captions: list[str], columns: int = 8):
    side, text = 160, 16 + 15 * max(1, max(caption.count("\n") for caption in captions))
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * (side + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * side, i // columns * (side + text)
        sheet.paste(Image.fromarray(image).resize((side - 4, side - 4), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + side - 2), caption, "black")
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "evaluator.pth")
    parser.add_argument("--data", type=Path, default=PACK, help="what render.py made (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, help="picture of all failures to write")
    args = parser.parse_args()
    objects = load_objects()
    names = sorted(objects, key=objects.get)
    data = ICLEVRDataset(args.data, ROOT / "train.json", objects)
    judge = evaluation_model(args.weights)
    torch.manual_seed(0)
    clean, soft = [], []
    for images in tqdm(data.images.split(500), unit="batch"):
        images = to_float(images)
        clean.append(judge.probabilities(images))
        soft.append(judge.probabilities(soften(images, BLUR, NOISE)))
    asked, number = data.labels.bool(), data.labels.sum(1)
    outputs = {"as rendered": torch.cat(clean), f"blur {BLUR} px, noise {NOISE} levels": torch.cat(soft)}
    seen = outputs["as rendered"] > judge.threshold

    scenes = len({scene_of(f) for f in data.filenames})
    print(f"{len(data):,} pictures of {scenes:,} scenes; threshold {judge.threshold}")
    rows = [["accuracy, micro top-k", *(judge.compute_acc(o, data.labels) for o in outputs.values())]]
    rows += [["exact set", *(judge.exact_set(o, data.labels) for o in outputs.values())]]
    for n in (1, 2, 3):
        of = number == n
        rows.append([f"accuracy, {n} objects" if n > 1 else "accuracy, 1 object",
                     *(judge.compute_acc(o[of], data.labels[of]) for o in outputs.values())])  # fmt: skip
        rows.append([f"exact set, {n} objects" if n > 1 else "exact set, 1 object",
                     *(judge.exact_set(o[of], data.labels[of]) for o in outputs.values())])  # fmt: skip
    table("All pictures, and by number of objects", ["measure", *outputs], rows)

    failed = (seen != asked).any(1).nonzero().flatten().tolist()
    for part, title in ((0, "By colour"), (1, "By shape")):
        rows = []
        for value in dict.fromkeys(name.split()[part] for name in names):
            of = [i for i, name in enumerate(names) if name.split()[part] == value]
            there, hit = asked[:, of].sum().item(), (asked & seen)[:, of].sum().item()
            rows.append([value, there, there - hit, (seen & ~asked)[:, of].sum().item(), hit / there])
        table(title, ["", "objects", "not seen", "seen where there is none", "share seen"], rows)

    pairs = {i: confusions(names, asked[i], seen[i]) for i in failed}
    counts = collections.Counter(kind_of(*pair) for of in pairs.values() for pair in of)
    table("Kinds of mistakes", ["", "objects"], [[k, v] for k, v in counts.most_common()])
    taken = collections.Counter()
    for pair in (pair for of in pairs.values() for pair in of if all(pair)):
        part = 1 if kind_of(*pair) == "shape mistaken" else 0
        taken[tuple(name.split()[part] for name in pair)] += 1
    table("What is taken for what", ["asked", "seen", "objects"], [[*k, v] for k, v in taken.most_common()])

    hidden = all_hidden_shares(data)
    bins = collections.defaultdict(lambda: [0, 0])
    for i, shares in enumerate(hidden):
        for name, share in zip(data.conditions[i], shares, strict=True):
            bin_ = bins[int(np.searchsorted(HIDDEN[1:-1], share, side="right"))]
            bin_[0] += 1
            bin_[1] += int(seen[i, objects[name]])
    rows = [[f"{HIDDEN[b]:.0%} to {HIDDEN[b + 1]:.0%}", n, n - hit, hit / n]
            for b, (n, hit) in sorted(bins.items())]  # fmt: skip
    table("By how much of an object others hide", ["hidden", "objects", "not seen", "share seen"], rows)

    if args.sheet:
        captions = []
        for i in failed:
            lines = [f"{a or 'nothing'} -> {s or 'nothing'}" for a, s in pairs[i]]
            shares = [hidden[i][data.conditions[i].index(a)] for a, _ in pairs[i] if a]
            captions.append("\n".join([*lines[:2], *(f"hidden {h:.0%}" for h in shares[:1])]))
        draw_sheet(args.sheet, data.images[failed].permute(0, 2, 3, 1).numpy(), captions)


if __name__ == "__main__":
    main()
