"""One page about samples on disk: pictures with what is wrong in them, scores, likeness to the data, copies.

    python sample.py --mode test new_test process --seeds 10   # what a lab asks for, in images/
    python sample.py --mode train --num-images 2100            # to compare with renders of the same scenes
    python -m report                                           # images/report.html, all in one file

Lists in images/ get a section each, images/train those on likeness and copies, lists in folders within (such
as images/best_of_4/test) a row each in the table of scores. `benchmarks/page.sh` makes docs/report.html.
"""

import argparse
from pathlib import Path

from infra.commands import ROOT, InputError, Parser, command, read_early, to_path


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="One page about samples on disk: what is wrong in them, scores, likeness.")
    add = parser.add_argument
    add("images", type=to_path, nargs="?", default=Path("images"),
        help="folder that sample.py wrote to (default: %(default)s)")  # fmt: skip
    add("--out", type=to_path, help="page to write (default: IMAGES/report.html)")
    add("--data", type=to_path, help="training pictures (default: iclevr/, else the pack that ships)")
    add("--labels", type=to_path, default=ROOT / "train.json", help="theirs (default: train.json)")
    add(
        "--held-out",
        type=to_path,
        help="renders of the same labels, not trained on (default: data/held_out.npz)",
    )
    add("--figures", type=to_path, nargs="+", default=[], help="PNG files to put on the page as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    read_early(parse_args)

import base64
import collections
import datetime
import io
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version

import jinja2
import matplotlib
import numpy as np
import torch
from PIL import Image
from scipy.stats import ks_2samp
from tqdm import tqdm

matplotlib.use("svg")
from matplotlib import pyplot as plt

from checkpoint import METADATA_NAME, newest
from data.pack import HELD_OUT
from dataset import ICLEVRDataset, load_data
from infra.files import load_json, write_whole
from labels import load_objects
from report.judge import count_colours, find_objects
from report.metrics import (
    Judged,
    all_confusions,
    by_number,
    by_object,
    confusion_matrix,
    confusions,
    distances,
    features,
    judge,
    kind_of,
    load_samples,
    nearest,
    runs_of,
    scores,
    spread,
)
from scoring import Scoring, load_evaluator

TITLE = b"<title>i-CLEVR samples</title>"  # of every page, in page.jinja
SHOWN = 12  # pictures of a kind, where there may be many
FIRST = ("test", "new_test", "unseen", "validation")  # the order of sections
plt.rcParams |= {"svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
plt.rcParams |= {"figure.constrained_layout.use": True, "font.family": "sans-serif"}


# --------------------------------------------------------------------------------------- pictures and figures


def image_url(picture: torch.Tensor) -> str:
    """A uint8 picture [3, 64, 64] as a data URL, lossless."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer := io.BytesIO(), "webp", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def file_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def svg(figure) -> str:
    figure.savefig(buffer := io.StringIO(), format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def draw_objects(rows: list[tuple[str, int, float]]) -> str:
    """Accuracy of each object as a bar."""
    figure, axes = plt.subplots(figsize=(8, 3))
    axes.bar([name for name, _, _ in rows], [accuracy for _, _, accuracy in rows], color="tab:blue")
    axes.set(ylabel="accuracy", ylim=(min(0.5, min(r[2] for r in rows)), 1))
    axes.tick_params(axis="x", rotation=90)
    return svg(figure)


def draw_confusions(matrix: torch.Tensor, names: list[str]) -> str:
    """What was seen in place of what was asked for; what was seen right is left out, it would hide that."""
    figure, axes = plt.subplots(figsize=(6.5, 6))
    counts = matrix.float().fill_diagonal_(0).numpy()
    axes.imshow(np.where(counts > 0, counts, np.nan), cmap="Reds", vmin=0)
    axes.grid(False)
    for i, j in zip(*counts.nonzero(), strict=True):
        colour = "white" if counts[i, j] > counts.max() / 2 else "black"
        axes.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks(range(len(names) + 1), [*names, "nothing"], rotation=90, fontsize=7)
    axes.set_yticks(range(len(names) + 1), [*names, "nothing"], fontsize=7)
    axes.set(xlabel="seen", ylabel="asked for")
    return svg(figure)


def draw_seeds(lists: dict[str, list[float]]) -> str | None:
    """The mean accuracy of the first 2, 3, ... seeds and its 95 % interval: how many it takes."""
    lists = {name: accuracies for name, accuracies in lists.items() if len(accuracies) > 1}
    if not lists:
        return None
    figure, axes = plt.subplots(figsize=(6, 3))
    for name, accuracies in lists.items():
        counts = range(2, len(accuracies) + 1)
        found = [spread(accuracies[:n]) for n in counts]
        line = axes.plot(counts, [s.mean for s in found], marker="o", markersize=3, label=name)
        low, high = ([s.interval[side] for s in found] for side in (0, 1))
        axes.fill_between(counts, low, high, alpha=0.15, color=line[0].get_color())
    axes.set(xlabel="seeds", ylabel="accuracy, mean", ylim=(None, 1.02))
    axes.legend()
    return svg(figure)


def draw_histograms(panels: dict[str, dict[str, np.ndarray]], bins: int = 40) -> str:
    """A panel for each quantity, a line for each set of pictures."""
    figure, sides = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.8), squeeze=False)
    for axes, (title, sets) in zip(sides[0], panels.items(), strict=True):
        edges = np.histogram_bin_edges(np.concatenate([*sets.values()]), bins)
        for name, values in sets.items():
            axes.hist(values, edges, density=True, histtype="step", label=name)
        axes.set(xlabel=title, yticks=[])
    sides[0][0].set_ylabel("density")
    sides[0][-1].legend(fontsize=7)
    return svg(figure)


def draw_log(path: Path) -> str:
    """The loss of a training run by the pictures it has seen, a mean over a fiftieth of the run."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    pictures, loss = (np.array([entry[name] for entry in entries]) for name in ("pictures", "loss"))
    width = max(1, len(loss) // 50)
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.plot(pictures[width - 1 :], np.convolve(loss, np.ones(width) / width, "valid"))
    axes.set(xlabel="pictures seen", ylabel="training loss", yscale="log")
    return svg(figure)


# --------------------------------------------------------------------------------------------------- sections


def describe(judged: Judged, i: int, names: list[str]) -> dict:
    """Picture `i`: what was asked, whether each judge holds it right, and what they saw if not."""
    pairs = confusions(names, judged.labels[i], judged.seen[i])
    seen = [f"{asked} → {seen or 'not seen'}" if asked else f"also {seen}" for asked, seen in pairs]
    counted = ", ".join(sorted(count_colours(judged.found[i]).elements())) or "nothing"
    return {
        "url": image_url(judged.pictures[i]),
        "asked": judged.conditions[i],
        "seen": seen,
        "counted": None if judged.counted[i] else counted,
        "right": "",
    }


def list_section(name: str, report: dict, judged: Judged, names: list[str]) -> dict:
    """A list of conditions: its pictures of the first seed, and tables and figures of all seeds."""
    size = len(report["conditions"])
    runs = runs_of(judged, size)
    both = torch.stack([run.exact & run.counted for run in runs])  # [seeds, N]
    pictures = [describe(runs[0], i, names) for i in range(len(runs[0]))]
    for picture, right in zip(pictures, both.sum(0).tolist(), strict=True):
        if len(both) > 1:
            picture["right"] = f"right in {right} of {len(both)} seeds"
    mistakes = collections.Counter(kind_of(*pair) for pair in all_confusions(judged, names))
    mistakes["an object too many counted, of a colour asked for"] = sum(
        bool(extra.keys() & {n.split()[0] for n in condition})
        for extra, condition in zip(judged.surplus, judged.conditions, strict=True)
    )
    return {
        "name": name,
        "seed": report["seed"],
        "pictures": pictures,
        "wrong": int((~both[0]).sum()),
        "seeds": len(runs),
        "by_number": by_number(judged),
        "by_colour": by_object(judged, names, 0),
        "by_shape": by_object(judged, names, 1),
        "objects": draw_objects(by_object(judged, names, None)),
        "mistakes": mistakes.most_common(),
        "confusions": draw_confusions(confusion_matrix(judged, names), names),
    }


def options_of(report: dict) -> str:
    """How the pictures of a report were sampled, in a few words."""
    words = [report["sampler"], f"{report['steps']} steps", f"guidance {report['guidance_scale']:g}"]
    if report.get("negative_scale"):
        words.append(f"negative labels {report['negative_scale']:g}")
    if "best_of" in report:
        words.append(f"best of {report['best_of']} by the lift over {report['lift_over']}")
    if report.get("evaluator_scale"):
        words.append(f"evaluator {report['evaluator_scale']:g}")
    if report["precision"] != "no":
        words.append(report["precision"])
    return ", ".join(words)


def score_row(name: str, report: dict, judged: Judged) -> dict:
    runs = runs_of(judged, len(report["conditions"]))
    return {
        "name": name,
        "options": options_of(report),
        "guided": bool(report.get("evaluator_scale")),
        "seeds": len(runs),
        "pictures": len(judged),
        "scores": scores(runs),
    }


def disagreements(judged: Judged, names: list[str]) -> dict:
    """How often the judges disagree on whether a picture is right, with the first such pictures."""
    which = (judged.exact != judged.counted).nonzero().flatten().tolist()
    shown = [describe(judged, i, names) for i in which[:SHOWN]]
    return {"share": len(which) / len(judged), "count": len(judged), "pictures": shown}


def places(found: list) -> dict[str, np.ndarray]:
    """Places and sizes of all objects that the second judge found in some pictures."""
    rows = np.array([(one.x, one.y, one.size) for objects in found for one in objects]).reshape(-1, 3)
    return {"x": rows[:, 0], "y": rows[:, 1], "size": rows[:, 2]}


def likeness_section(
    folder: Path, samples: Judged, held_out: Judged, data: ICLEVRDataset, evaluator: Scoring
) -> dict:
    """How like renders of the same conditions the samples are, and how near to the training pictures.

    As many of `samples` (in `folder`), of `held_out` and of the training pictures are compared, from the
    first on, as there are samples and renders. Raises InputError if they are not of the same conditions.
    """
    count = min(len(samples), len(held_out))
    samples, held_out, training = samples.part(range(count)), held_out.part(range(count)), data.images[:count]
    if not samples.conditions == held_out.conditions == data.conditions[:count]:
        raise InputError(
            f"{folder}: not the conditions of the training pictures and of the held-out renders, one by one; "
            f"paint them with `python sample.py --mode train`"
        )
    real = features(held_out.pictures, evaluator)
    rows = {"samples": samples.pictures, "training pictures": training}
    rows = {name: distances(real, features(pictures, evaluator)) for name, pictures in rows.items()}
    found = {"held-out renders": places(held_out.found), "samples": places(samples.found)}
    found["training pictures"] = places([find_objects(picture) for picture in training.numpy()])
    for name, row in rows.items():
        for quantity, values in found["held-out renders"].items():
            row[quantity] = ks_2samp(values, found[name][quantity]).statistic
    panels = {q: {name: sets[q] for name, sets in found.items()} for q in ("x", "y", "size")}

    near = {"samples": nearest(samples.pictures, data.images)}
    near["held-out renders"] = nearest(held_out.pictures, data.images)
    number = samples.labels.sum(1)
    copies = []
    for n in number.unique().tolist():
        of = number == n
        quantiles = {name: distance[of].quantile(torch.tensor([0, 0.01, 0.5])).tolist()
                     for name, (distance, _) in near.items()}  # fmt: skip
        copies.append((n, int(of.sum()), quantiles))
    distance, which = near["samples"]
    closest = [i for i in distance.argsort().tolist() if number[i] == number.max()][: SHOWN // 2]
    return {
        "count": count,
        "rows": rows,
        "places": draw_histograms(panels),
        "copies": copies,
        "copies_figure": draw_histograms(
            {
                f"{n} object{'s' * (n > 1)}": {name: d[number == n].numpy() for name, (d, _) in near.items()}
                for n in number.unique().tolist()
            }
        ),
        "pairs_of": int(number.max()),
        "pairs": [
            {
                "sample": image_url(samples.pictures[i]),
                "asked": samples.conditions[i],
                "training": image_url(data.images[which[i]]),
                "file": data.filenames[which[i]],
                "distance": distance[i].item(),
            }
            for i in closest
        ],
    }


def sample_folders(images: Path) -> list[Path]:
    """The folders of pictures with a report beside them in `images` and one level below, in order."""
    found = [
        path.with_name(path.name.removesuffix(".json"))
        for path in [*images.glob("*.json"), *images.glob("*/*.json")]
    ]
    found = [folder for folder in found if folder.is_dir()]
    order = {name: i for i, name in enumerate(FIRST)}
    return sorted(found, key=lambda f: (f.parent != images, f.parent, order.get(f.name, len(FIRST)), f.name))


def load_held_out(path: Path | None, labels: Path, objects: dict[str, int]) -> ICLEVRDataset | None:
    """Renders that were not trained on; None, and why, if those that ship are not of `labels`."""
    try:
        return ICLEVRDataset(path or HELD_OUT, labels, objects)
    except InputError as error:
        if path:
            raise
        print(f"no comparison with held-out renders; give some with --held-out ({error})", file=sys.stderr)
        return None


def weights_section(reports: list[dict]) -> dict:
    """The weights that painted the pictures; if it is one folder and still there, what it says of them."""
    names = sorted({report["weights"] for report in reports})
    section = {"names": names, "metadata": None, "log": None}
    folder = newest(Path(names[0]))
    if len(names) == 1 and (folder / METADATA_NAME).exists():
        section["metadata"] = {k: v for k, v in load_json(folder / METADATA_NAME).items() if k != "unseen"}
        if (log := folder.parent / "log.jsonl").exists():  # of a run
            section["log"] = draw_log(log)
    return section


def versions() -> dict[str, str]:
    names = ("torch", "torchvision", "diffusers", "torchmetrics", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def build(images: Path, held_out: ICLEVRDataset | None, training: Callable[[], ICLEVRDataset]) -> dict:
    """All that the page says of the samples in `images`; `training` loads what they are compared with, if
    they are. Raises InputError."""
    folders = sample_folders(images)
    if not folders:
        raise InputError(f"{images}: no samples; make some with `python sample.py --mode test new_test`")
    bar = tqdm(folders, "judging", unit="list", delay=1, leave=False)
    samples = {folder.relative_to(images).as_posix(): load_samples(folder) for folder in bar}
    objects, reports = load_objects(), [report for report, _ in samples.values()]
    names, evaluator = sorted(objects, key=objects.get), load_evaluator(reports[0]["evaluator"])
    scored = {name: found for name, found in samples.items() if name != "train"}
    lists = {name: found for name, found in scored.items() if "/" not in name}
    page = {
        "rows": [score_row(name, *found) for name, found in scored.items()],
        "lists": [list_section(name, *found, names) for name, found in lists.items()],
        "judges": {name: disagreements(judged, names) for name, (_, judged) in lists.items()},
        "held_out": None,
        "likeness": None,
        "seeds": draw_seeds({name: report["accuracies"] for name, (report, _) in lists.items()}),
        "strip": file_url(strip) if (strip := images / "process.png").exists() else None,
        "weights": weights_section(reports),
        "options": {
            name: {
                k: v
                for k, v in report.items()
                if k not in ("conditions", "exact_sets") and not k.endswith("_sha256")
            }
            for name, (report, _) in samples.items()
        },
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
    }
    if held_out:
        judged = judge(held_out.images, held_out.conditions, evaluator)
        page["judges"] = {"held-out renders": disagreements(judged, names)} | page["judges"]
        page["held_out"] = {"count": len(judged), "exact": judged.exact.float().mean().item(),
                            "counted": judged.counted.float().mean().item()}  # fmt: skip
        if "train" in samples:
            compared = (samples["train"][1], judged, training(), evaluator)
            page["likeness"] = likeness_section(images / "train", *compared)
    return page


def refuse_other_page(path: Path):
    """Raise InputError if there is a file at `path` that is no page of report."""
    if os.path.lexists(path) and TITLE not in path.read_bytes()[:1000]:
        raise InputError(f"{path}: there already, and no page of report; choose another --out")


@command
def main(argv: list[str] | None = None):
    args = parse_args(argv)
    out, objects = args.out or args.images / "report.html", load_objects()
    refuse_other_page(out)
    figures = {path.stem: file_url(path) for path in args.figures}
    held_out = load_held_out(args.held_out, args.labels, objects)
    page = build(args.images, held_out, lambda: load_data(args.data, args.labels, objects)[0])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((ROOT / "report" / "page.jinja").read_text(encoding="utf-8"))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, template.render(page | {"figures": figures}).encode())
    print(f"{out}: {len(page['rows'])} lists, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
