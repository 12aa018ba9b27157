"""What the page says, section by section: tables, figures and pictures, as page.jinja puts them in."""

import collections
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from bookkeeping.curves import LOG_NAME
from checkpoint import METADATA_NAME, newest
from dataset import ICLEVRDataset
from infra.commands import InputError
from infra.files import load_json
from labels import colour_of, shape_of
from report import figures, likeness, metrics
from report.judge import count_colours, find_objects
from report.metrics import Judged, share
from scoring import Scoring

SHOWN = 12  # pictures of a kind at most, where there may be many
# What the likelihood under the right label is compared with, by the option --lift-over.
BASELINES = {"mistakes": "labels with one mistake", "unconditional": "no label"}


def describe(judged: Judged, i: int, names: list[str], right: str = "") -> dict:
    """Picture `i`: what was asked for, what each judge saw if it differs, and a note `right` below it."""
    seen = []
    for asked, other in metrics.confusions(names, judged.labels[i], judged.seen[i]):
        seen.append(f"{asked} → {other or 'not seen'}" if asked else f"also {other}")
    counted = ", ".join(sorted(count_colours(judged.found[i]).elements())) or "nothing"
    return {
        "url": figures.picture_url(judged.pictures[i]),
        "asked": judged.conditions[i],
        "seen": seen,
        "counted": None if judged.counted[i] else counted,
        "right": right,
    }


def list_section(name: str, report: dict, judged: Judged, names: list[str]) -> dict:
    """A list of conditions: its pictures of the first seed, with tables and figures over all seeds."""
    runs = metrics.runs_of(judged, len(report["conditions"]))
    both = torch.stack([run.both for run in runs])  # [seeds, N]
    pictures = []
    for i, right in enumerate(both.sum(0).tolist()):
        note = f"right in {right} of {len(runs)} seeds" if len(runs) > 1 else ""
        pictures.append(describe(runs[0], i, names, note))
    return {
        "name": name,
        "seed": report["seed"],
        "pictures": pictures,
        "wrong": int((~both[0]).sum()),
        "seeds": len(runs),
        "by_number": metrics.by_number(judged),
        "by_colour": metrics.by_group(judged, [colour_of(one) for one in names]),
        "by_shape": metrics.by_group(judged, [shape_of(one) for one in names]),
        "objects": figures.draw_objects(metrics.by_group(judged, names)),
        "mistakes": count_mistakes(judged, names),
        "confusions": figures.draw_confusions(metrics.confusion_matrix(judged, names), names),
    }


def count_mistakes(judged: Judged, names: list[str]) -> list[tuple[str, int]]:
    """How often each kind of mistake was made, the most frequent first."""
    counts = collections.Counter(metrics.kind_of(*pair) for pair in metrics.all_confusions(judged, names))
    pictures = 0  # with a copy of an object, which the evaluator cannot notice
    for surplus, condition in zip(judged.surplus, judged.conditions, strict=True):
        pictures += any(colour_of(name) in surplus for name in condition)
    counts["surplus object of a colour that was asked for (second judge)"] = pictures
    return counts.most_common()


def options_of(report: dict) -> str:
    """How the pictures of a report were sampled, in a few words."""
    words = [report["sampler"], f"{report['steps']} steps", f"guidance {report['guidance_scale']:g}"]
    if report.get("negative_scale"):
        words.append(f"negative prompting {report['negative_scale']:g}")
    if "best_of" in report:
        baseline = BASELINES.get(report["lift_over"], report["lift_over"])
        words.append(f"best of {report['best_of']} by likelihood ratio against {baseline}")
    if report.get("evaluator_scale"):
        words.append(f"guidance by the evaluator {report['evaluator_scale']:g}")
    if report["precision"] != "no":
        words.append(report["precision"])
    return ", ".join(words)


def score_row(name: str, report: dict, judged: Judged) -> dict:
    """A row in the table of scores."""
    runs = metrics.runs_of(judged, len(report["conditions"]))
    return {
        "name": name,
        "options": options_of(report),
        "guided": bool(report.get("evaluator_scale")),
        "seeds": len(runs),
        "pictures": len(judged),
        "scores": metrics.scores(runs),
    }


def disagreements(judged: Judged, names: list[str]) -> dict:
    """For how many pictures each judge says "right", how often only one does, and the first such pictures."""
    which = (judged.exact != judged.counted).nonzero().flatten().tolist()
    return {
        "count": len(judged),
        "exact": share(judged.exact),
        "counted": share(judged.counted),
        "share": len(which) / len(judged),
        "pictures": [describe(judged, i, names) for i in which[:SHOWN]],
    }


def comparison(folder: Path, samples: Judged, held_out: Judged, data: ICLEVRDataset, evaluator: Scoring) -> dict:
    """Two sections: how like held-out renders the samples are, and how close they are to training pictures.

    `samples` were painted into `folder`. As many of `samples`, `held_out` and `data` are compared as all of
    them have, from the first on. Raises InputError if their conditions differ.
    """
    count = min(len(samples), len(held_out))
    samples = samples.part(range(count))
    held_out = held_out.part(range(count))
    if not samples.conditions == held_out.conditions == data.conditions[:count]:
        raise InputError(
            f"{folder}: not the conditions of the training pictures and of the held-out renders, one by one; "
            f"paint them with `python sample.py --mode train`"
        )
    return {
        "likeness": likeness_section(samples, held_out, data.images[:count], evaluator),
        "copies": copies_section(samples, held_out, data),
    }


def likeness_section(samples: Judged, held_out: Judged, training: torch.Tensor, evaluator: Scoring) -> dict:
    """Distances of samples to held-out renders, beside those of training pictures, uint8 [N, 3, 64, 64]."""
    real = likeness.features(held_out.pictures, evaluator)
    places = {
        "held-out renders": likeness.places(held_out.found),
        "samples": likeness.places(samples.found),
        "training pictures": likeness.places([find_objects(picture) for picture in training.numpy()]),
    }
    rows = {}
    for name, pictures in {"samples": samples.pictures, "training pictures": training}.items():
        rows[name] = likeness.distances(real, likeness.features(pictures, evaluator))
        rows[name].update(likeness.place_distances(places["held-out renders"], places[name]))
    return {"count": len(samples), "rows": rows, "figure": figures.draw_histograms(places)}


def copies_section(samples: Judged, held_out: Judged, data: ICLEVRDataset) -> dict:
    """How near samples and held-out renders are to training pictures, and the closest pairs."""
    distance, which = likeness.nearest(samples.pictures, data.images)
    near = {"samples": distance, "held-out renders": likeness.nearest(held_out.pictures, data.images)[0]}
    number = samples.labels.sum(1)  # [N], objects asked for
    rows = []
    histograms: dict[str, dict] = {name: {} for name in near}
    for n in number.unique().tolist():
        for name, distances in near.items():
            chosen = distances[number == n]
            rows.append((n, len(chosen), name, chosen.quantile(torch.tensor([0, 0.01, 0.5])).tolist()))
            histograms[name][f"{n} object{'s' * (n > 1)}"] = chosen.numpy()

    most = int(number.max())
    closest = [i for i in distance.argsort().tolist() if number[i] == most]
    pairs = [
        {
            "sample": figures.picture_url(samples.pictures[i]),
            "asked": samples.conditions[i],
            "training": figures.picture_url(data.images[which[i]]),
            "file": data.filenames[int(which[i])],
            "distance": distance[i].item(),
        }
        for i in closest[: SHOWN // 2]
    ]
    return {"rows": rows, "figure": figures.draw_histograms(histograms), "pairs_of": most, "pairs": pairs}


def weights_section(reports: list[dict]) -> dict:
    """The weights that painted the pictures, with the notes beside them if it is one folder, still there."""
    names = sorted({report["weights"] for report in reports})
    section: dict = {"names": names, "metadata": None, "log": None}
    folder = newest(Path(names[0]))
    if len(names) == 1 and (folder / METADATA_NAME).exists():
        section["metadata"] = load_json(folder / METADATA_NAME)
        section["metadata"].pop("unseen", None)  # a hundred lists of objects
        log = folder.parent / LOG_NAME
        if log.exists():  # the weights are those of a run
            section["log"] = figures.draw_log(log)
    return section


def shown_options(report: dict) -> dict:
    """What the page shows of a report: all but long lists and hashes."""
    hidden = ("conditions", "exact_sets")
    return {k: v for k, v in report.items() if k not in hidden and not k.endswith("_sha256")}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "diffusers", "torchmetrics", "numpy", "pillow"):
        found[name] = version(name)
    return found
