"""Scores of pictures that sample.py painted: how sure the accuracy is, and what it does not see.

    python -m report.metrics images/test images/new_test       # a line each; report.py makes a page of them

The lab's accuracy is noisy (a list has 72 or 84 objects) and blind to objects too many. So it comes with an
interval, with the exact set, and with a second judge that counts (judge.py).
"""

import argparse
from pathlib import Path

from infra.commands import InputError, Parser, command, read_early, to_path
from options import RANGES, check_options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Scores of pictures that sample.py painted, with their intervals and a second judge."
    )
    parser.add_argument("folders", type=to_path, nargs="+", metavar="FOLDER", help="such as images/test")
    return parser.parse_args(argv)


if __name__ == "__main__":
    read_early(parse_args)

import collections
import statistics
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.stats import t as student_t
from torch import nn
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from dataset import read_pictures, to_float
from infra.files import check_fields, load_json
from labels import check_condition, load_objects, multi_hot
from options import NUM_OBJECTS
from report.judge import Found, count_colours, find_objects
from scoring import BATCH_SIZE, Scoring, load_evaluator

REPORT = {"conditions": list, "num_images": int, "seed": int, "accuracies": list, "precision": str}
REPORT |= {"weights": str, "evaluator": str}  # what a report of sample.py has at least


@dataclass(frozen=True)
class Judged:
    """N pictures, what they were to show, and what both judges saw in them."""

    pictures: torch.Tensor  # uint8 [N, 3, 64, 64]
    conditions: list[list[str]]
    labels: torch.Tensor  # bool [N, 24]
    probabilities: torch.Tensor  # [N, 24], of the evaluator
    threshold: float  # of these
    found: list[list[Found]]  # by the second judge

    def __len__(self) -> int:
        return len(self.pictures)

    def part(self, indices: range) -> "Judged":
        """The same of some pictures next to each other."""
        at = slice(indices.start, indices.stop)
        tensors = (self.labels[at], self.probabilities[at])
        return Judged(self.pictures[at], self.conditions[at], *tensors, self.threshold, self.found[at])

    @cached_property
    def seen(self) -> torch.Tensor:
        """Bool [N, 24]: objects above the evaluator's threshold."""
        return self.probabilities > self.threshold

    @cached_property
    def hits(self) -> torch.Tensor:
        """Bool [N, 24]: objects asked for that are among the evaluator's k highest, k of them asked for."""
        ranks = self.probabilities.argsort(dim=1, descending=True).argsort(dim=1)
        return self.labels & (ranks < self.labels.sum(1, keepdim=True))

    @cached_property
    def exact(self) -> torch.Tensor:
        """Bool [N]: the evaluator sees all objects asked for and no other."""
        return (self.seen == self.labels).all(1)

    @cached_property
    def surplus(self) -> list[collections.Counter]:
        """For each picture the colours of which the second judge counts more objects than asked for."""
        return [counted - asked for counted, asked in self._colours]

    @cached_property
    def counted(self) -> torch.Tensor:
        """Bool [N]: the second judge counts as many objects of each colour as asked for."""
        return torch.tensor([counted == asked for counted, asked in self._colours])

    @cached_property
    def _colours(self) -> list[tuple[collections.Counter, collections.Counter]]:
        asked = [collections.Counter(n.split()[0] for n in condition) for condition in self.conditions]
        return list(zip(map(count_colours, self.found), asked, strict=True))


def judge(pictures: torch.Tensor, conditions: list[list[str]], evaluator: Scoring) -> Judged:
    """Show uint8 pictures [N, 3, 64, 64], which are to show `conditions`, to both judges."""
    labels = multi_hot(conditions, load_objects()).bool()
    found = evaluator.judge(pictures)
    objects = [find_objects(picture) for picture in pictures.numpy()]
    return Judged(pictures, conditions, labels, found, evaluator.threshold, objects)


def load_samples(folder: Path) -> tuple[dict, Judged]:
    """What sample.py painted into `folder`: its report, and the pictures judged. Raises InputError."""
    path = folder.with_name(f"{folder.name}.json")
    report, objects = load_json(path), load_objects()
    if not isinstance(report, dict) or not report.get("accuracies"):
        raise InputError(f"{path}: expected the report that sample.py writes beside a list it painted whole")
    conditions, count = (check_fields(report, REPORT, path)[name] for name in ("conditions", "num_images"))
    check_options({name: report[name] for name in ("sampler", *RANGES) if name in report}, str(path))
    if not conditions or not count or not all(type(x) is float for x in report["accuracies"]):
        raise InputError(f"{path}: expected conditions, a number of pictures, accuracies")
    for i, condition in enumerate(conditions):
        check_condition(condition, objects, f"{path}, conditions, entry {i}")
    pictures = read_pictures(folder, count)
    conditions = [conditions[i % len(conditions)] for i in range(count)]
    return report, judge(pictures, conditions, load_evaluator(report["evaluator"]))


# ----------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Spread:
    """Mean of some runs, their standard deviation, and the 95 % interval of the mean (Student's t); of one
    run neither."""

    mean: float
    deviation: float | None = None
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.deviation:.3f}" if self.deviation is not None else "")


def spread(values: list[float]) -> Spread:
    mean = statistics.mean(values)
    if len(values) < 2:
        return Spread(mean)
    deviation = statistics.stdev(values)
    half = student_t.ppf(0.975, len(values) - 1) * deviation / len(values) ** 0.5
    return Spread(mean, deviation, (mean - half, mean + half))


def runs_of(judged: Judged, size: int) -> list[Judged]:
    """Each whole time through a list of `size` conditions; if there is none, what there is of it."""
    count = max(1, len(judged) // size)
    return [judged.part(range(k * size, min((k + 1) * size, len(judged)))) for k in range(count)]


def scores(runs: list[Judged]) -> dict[str, Spread]:
    """The measures of a list painted several times.

    `accuracy`: the lab's, micro top-k; `per_condition`: its mean over pictures, each of which then weighs the
    same however many objects it has; shares of pictures: `exact_set`, `second_judge`, `both` held right by
    the evaluator, by the second judge, by both; `extra_seen`, `extra_counted` in which the evaluator sees an
    object not asked for, the second judge more objects of a colour than asked for.
    """
    measures = {
        "accuracy": lambda run: run.hits.sum() / run.labels.sum(),
        "per_condition": lambda run: (run.hits.sum(1) / run.labels.sum(1)).mean(),
        "exact_set": lambda run: run.exact.float().mean(),
        "second_judge": lambda run: run.counted.float().mean(),
        "both": lambda run: (run.exact & run.counted).float().mean(),
        "extra_seen": lambda run: (run.seen & ~run.labels).any(1).float().mean(),
        "extra_counted": lambda run: sum(1 for extra in run.surplus if extra) / len(run),
    }
    return {name: spread([float(measure(run)) for run in runs]) for name, measure in measures.items()}


def by_number(judged: Judged) -> list[tuple[int, int, float, float, float]]:
    """Number of objects asked for, pictures, accuracy, exact set, held right by both judges."""
    number = judged.labels.sum(1)
    rows = []
    for n in number.unique().tolist():
        of = number == n
        accuracy = judged.hits[of].sum().item() / judged.labels[of].sum().item()
        exact_set, both = (x[of].float().mean().item() for x in (judged.exact, judged.exact & judged.counted))
        rows.append((n, int(of.sum()), accuracy, exact_set, both))
    return rows


def by_object(judged: Judged, names: list[str], part: int | None) -> list[tuple[str, int, float]]:
    """Accuracy by colour (`part` 0), shape (1) or object (None): name, times asked for, share of hits.

    `names` [24] are those of the labels."""
    groups = collections.defaultdict(list)
    for i, name in enumerate(names):
        groups[name if part is None else name.split()[part]].append(i)
    asked = {group: int(judged.labels[:, of].sum()) for group, of in groups.items()}
    return [(g, asked[g], int(judged.hits[:, of].sum()) / asked[g]) for g, of in groups.items() if asked[g]]


def confusions(names: list[str], asked: torch.Tensor, seen: torch.Tensor) -> list[tuple[str, str]]:
    """What was taken for what in one picture, given its rows [24] of labels; '' stands for nothing."""
    missed = [names[i] for i in (asked & ~seen).nonzero().flatten()]
    extra = [names[i] for i in (seen & ~asked).nonzero().flatten()]
    pairs = []
    for part in (0, 1):  # the same colour first, then the same shape
        for name in list(missed):
            twin = next((e for e in extra if e.split()[part] == name.split()[part]), None)
            if twin:
                pairs.append((name, twin))
                missed.remove(name)
                extra.remove(twin)
    return pairs + [(m, "") for m in missed] + [("", e) for e in extra]


def kind_of(asked: str, seen: str) -> str:
    """The kind of mistake that a pair of `confusions` is."""
    if not seen:
        return "missed"
    if not asked:
        return "seen where there is none"
    return "shape mistaken" if asked.split()[0] == seen.split()[0] else "colour mistaken"


def all_confusions(judged: Judged, names: list[str]) -> list[tuple[str, str]]:
    """The `confusions` of all pictures, one after the other."""
    return [
        pair
        for asked, seen in zip(judged.labels, judged.seen, strict=True)
        for pair in confusions(names, asked, seen)
    ]


def confusion_matrix(judged: Judged, names: list[str]) -> torch.Tensor:
    """Counts [25, 25]: rows the object asked for, columns the object that the evaluator saw in its place; the
    last of both stands for none. `names` [24] are those of the labels."""
    index = {name: i for i, name in enumerate(names)} | {"": NUM_OBJECTS}
    right = (judged.labels & judged.seen).nonzero()[:, 1]
    mistakes = all_confusions(judged, names)
    asked, seen = (torch.tensor([index[pair[side]] for pair in mistakes]).long() for side in (0, 1))
    return multiclass_confusion_matrix(torch.cat([right, seen]), torch.cat([right, asked]), NUM_OBJECTS + 1)


# ------------------------------------------------------------------------------------------------- likeness


@torch.no_grad()
def features(pictures: torch.Tensor, evaluator: Scoring) -> torch.Tensor:
    """What the evaluator's last layer is given of uint8 pictures [N, 3, 64, 64]: [N, 512]."""
    body = nn.Sequential(*list(evaluator.resnet18.children())[:-1], nn.Flatten())
    parts = pictures.split(BATCH_SIZE)
    return torch.cat([body(to_float(part).to(evaluator.device)).cpu() for part in parts])


def distances(real: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Frechet (arXiv 1706.08500) and kernel distance (arXiv 1801.01401) between features [N, 512] and
    [M, 512]; the second with the standard deviation over its subsets."""
    frechet = FrechetInceptionDistance(feature=(given := _Given()), normalize=False)
    size = min(1000, len(real), len(other))
    with warnings.catch_warnings(action="ignore"):  # that features are kept
        kernel = KernelInceptionDistance(feature=given, subset_size=size, subsets=50)
    for metric in (frechet, kernel):
        metric.update(real, real=True)
        metric.update(other, real=False)
    torch.manual_seed(0)  # of the subsets
    mean, deviation = kernel.compute()
    return {"frechet": frechet.compute().item(), "kernel": mean.item(), "kernel_deviation": deviation.item()}


class _Given(nn.Module):
    """Hands features on: torchmetrics asks for a network, which here has run already."""

    num_features = 512

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def nearest(pictures: torch.Tensor, training: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance [N] of uint8 pictures [N, 3, 64, 64] to the nearest of `training` [M, 3, 64, 64], root mean
    square in grey levels, and which one it is [N]."""
    ours = pictures.flatten(1).float() - 128
    best, index = torch.full((len(ours),), torch.inf), torch.zeros(len(ours), dtype=torch.long)
    for start in range(0, len(training), 1000):
        theirs = training[start : start + 1000].flatten(1).float() - 128
        squares = theirs.square().sum(1) - 2 * (ours @ theirs.T)  # [N, 1000], less the constant of each row
        low, at = squares.min(1)
        index = torch.where(low < best, start + at, index)
        best = torch.minimum(best, low)
    exact = (pictures.float() - training[index].float()).square().mean((1, 2, 3)).sqrt()
    return exact, index


@command
def main(argv: list[str] | None = None):
    for folder in parse_args(argv).folders:
        report, judged = load_samples(folder)
        found = scores(runs_of(judged, len(report["conditions"])))
        interval = found["accuracy"].interval
        sure = f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        print(
            f"{folder}: {len(judged)} pictures, accuracy {found['accuracy'].mean:.4f}{sure}, exact set "
            f"{found['exact_set'].mean:.4f}; number and colours right {found['second_judge'].mean:.4f}, "
            f"both {found['both'].mean:.4f}"
        )


if __name__ == "__main__":
    main()
