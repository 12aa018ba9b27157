"""Measures of the pictures that sample.py painted.

    python -m report.metrics images/test images/new_test       # a line each; `python -m report` makes a page

The lab's accuracy is noisy, as a list has only 72 or 84 objects, and it does not notice surplus objects. So
it comes with a confidence interval, the exact set, and a second judge that counts objects (judge.py).
"""

import argparse
from pathlib import Path

from infra.commands import InputError, Parser, command, read_early, to_path
from options import RANGES, check_options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m report.metrics",
        description="Scores of pictures that sample.py painted, with confidence intervals and a second judge.",
    )
    parser.add_argument("folders", type=to_path, nargs="+", metavar="FOLDER", help="such as images/test")
    return parser.parse_args(argv)


if __name__ == "__main__":
    read_early(parse_args)

import collections
import statistics
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.stats import t as student_t

from dataset import read_pictures
from infra.files import check_fields, load_json
from lab import load_evaluator
from label_files import check_condition, load_objects
from labels import colour_of, multi_hot, shape_of
from options import NUM_OBJECTS
from report.judge import Found, count_colours, find_objects
from scoring import Scoring

REPORT_FIELDS: dict[str, type] = dict(  # that every report of sample.py has
    conditions=list, num_images=int, seed=int, accuracies=list, precision=str, weights=str, evaluator=str
)


# ------------------------------------------------------------------------------------------------ both judges


@dataclass(frozen=True)
class Judged:
    """N pictures, what they should show, and what the two judges saw in them."""

    pictures: torch.Tensor  # uint8 [N, 3, 64, 64]
    conditions: list[list[str]]
    labels: torch.Tensor  # bool [N, 24]
    probabilities: torch.Tensor  # [N, 24], from the evaluator
    threshold: float  # an object with a higher probability counts as seen
    found: list[list[Found]]  # by the second judge

    def __len__(self) -> int:
        return len(self.pictures)

    def part(self, indices: range) -> "Judged":
        """The same for some consecutive pictures."""
        at = slice(indices.start, indices.stop)
        return Judged(
            self.pictures[at],
            self.conditions[at],
            self.labels[at],
            self.probabilities[at],
            self.threshold,
            self.found[at],
        )

    @cached_property
    def seen(self) -> torch.Tensor:
        """Bool [N, 24]: the objects that the evaluator sees."""
        return self.probabilities > self.threshold

    @cached_property
    def hits(self) -> torch.Tensor:
        """Bool [N, 24]: for a picture with k objects, those of them that are among the evaluator's k highest
        probabilities."""
        ranks = self.probabilities.argsort(dim=1, descending=True).argsort(dim=1)
        return self.labels & (ranks < self.labels.sum(1, keepdim=True))

    @cached_property
    def exact(self) -> torch.Tensor:
        """Bool [N]: right for the evaluator, which sees all objects asked for and no other."""
        return (self.seen == self.labels).all(1)

    @cached_property
    def counted(self) -> torch.Tensor:
        """Bool [N]: right for the second judge, which counts as many objects of each colour as asked for."""
        return torch.tensor([counted == asked for counted, asked in self._colours])

    @cached_property
    def both(self) -> torch.Tensor:
        """Bool [N]: right for both judges."""
        return self.exact & self.counted

    @cached_property
    def surplus(self) -> list[collections.Counter]:
        """For each picture: how many objects of each colour the second judge counts too many."""
        return [counted - asked for counted, asked in self._colours]

    @cached_property
    def _colours(self) -> list[tuple[collections.Counter, collections.Counter]]:
        """For each picture: how many objects of each colour are counted, and how many are asked for."""
        pairs = []
        for found, condition in zip(self.found, self.conditions, strict=True):
            pairs.append((count_colours(found), collections.Counter(map(colour_of, condition))))
        return pairs


def judge(pictures: torch.Tensor, conditions: list[list[str]], evaluator: Scoring) -> Judged:
    """Show uint8 pictures [N, 3, 64, 64], which should show `conditions`, to both judges."""
    labels = multi_hot(conditions, load_objects()).bool()
    probabilities = evaluator.judge(pictures)
    found = [find_objects(picture) for picture in pictures.numpy()]
    return Judged(pictures, conditions, labels, probabilities, evaluator.threshold, found)


def load_samples(folder: Path) -> tuple[dict, Judged]:
    """Read and judge what sample.py painted into `folder`: its report, and the judged pictures. Raises
    InputError."""
    path = folder.with_name(f"{folder.name}.json")
    report = load_json(path)
    check_report(report, path)
    pictures = read_pictures(folder, report["num_images"])
    size = len(report["conditions"])
    conditions = [report["conditions"][i % size] for i in range(len(pictures))]
    return report, judge(pictures, conditions, load_evaluator(report["evaluator"]))


def check_report(report, path: Path):
    """Raise InputError unless `report`, read from `path`, belongs to a list that was painted to its end."""
    if not isinstance(report, dict) or not report.get("accuracies"):
        raise InputError(f"{path}: expected the report that sample.py writes beside a list it painted whole")
    check_fields(report, REPORT_FIELDS, path)
    check_options({name: report[name] for name in ("sampler", *RANGES) if name in report}, str(path))
    has_floats = all(type(accuracy) is float for accuracy in report["accuracies"])
    if not report["conditions"] or not report["num_images"] or not has_floats:
        raise InputError(f"{path}: expected conditions, a number of pictures, accuracies")
    objects = load_objects()
    for i, condition in enumerate(report["conditions"]):
        check_condition(condition, objects, f"{path}, conditions, entry {i}")


# ----------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Spread:
    """Mean of some runs; of two runs or more also their standard deviation, and the 95 % confidence interval
    of the mean."""

    mean: float
    deviation: float | None = None
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


def spread(values: list[float]) -> Spread:
    mean = statistics.mean(values)
    if len(values) < 2:
        return Spread(mean)
    return Spread(mean, statistics.stdev(values), confidence_interval(values))


def confidence_interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval (Student's t) of the mean of two values or more."""
    mean = statistics.mean(values)
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half


def runs_of(judged: Judged, size: int) -> list[Judged]:
    """Cut pictures into whole runs through a list of `size` conditions. If there is no whole run, return the
    part that there is."""
    count = max(1, len(judged) // size)
    return [judged.part(range(k * size, (k + 1) * size)) for k in range(count)]


def share(is_so: torch.Tensor) -> float:
    """Share of True in bool [N]."""
    return is_so.float().mean().item()


def measure(run: Judged) -> dict[str, float]:
    """All measures of one run through a list.

    `accuracy` is the lab's: the share of hits among all objects asked for (micro top-k). `per_condition` is
    the mean of each picture's own share, so that all pictures weigh the same. The others are shares of
    pictures. `exact_set`, `second_judge`, `both`: right for the evaluator, for the second judge, for both.
    `extra_seen`: the evaluator sees an object that was not asked for. `extra_counted`: the second judge
    counts more objects of a colour than were asked for.
    """
    hits = run.hits.sum(1)
    asked = run.labels.sum(1)
    return {
        "accuracy": (hits.sum() / asked.sum()).item(),
        "per_condition": (hits / asked).mean().item(),
        "exact_set": share(run.exact),
        "second_judge": share(run.counted),
        "both": share(run.both),
        "extra_seen": share((run.seen & ~run.labels).any(1)),
        "extra_counted": sum(1 for extra in run.surplus if extra) / len(run),
    }


def scores(runs: list[Judged]) -> dict[str, Spread]:
    """The measures of a list that was painted several times; their names are those of `measure`."""
    measures = [measure(run) for run in runs]
    return {name: spread([one[name] for one in measures]) for name in measures[0]}


def by_number(judged: Judged) -> list[tuple[int, int, float, float, float]]:
    """Rows by the number of objects asked for: that number, pictures, accuracy, shares of pictures that are
    right for the evaluator and right for both judges."""
    number = judged.labels.sum(1)
    rows = []
    for n in number.unique().tolist():
        chosen = number == n
        accuracy = judged.hits[chosen].sum().item() / judged.labels[chosen].sum().item()
        rows.append((n, int(chosen.sum()), accuracy, share(judged.exact[chosen]), share(judged.both[chosen])))
    return rows


def by_group(judged: Judged, groups: list[str]) -> list[tuple[str, int, float]]:
    """Rows by group of objects: the group, how often its objects were asked for, their accuracy.

    `groups` [24] says in which group each label is: for example the 24 names themselves, or their colours.
    """
    rows = []
    for group in dict.fromkeys(groups):  # each once
        members = torch.tensor([other == group for other in groups])  # bool [24]
        asked = int(judged.labels[:, members].sum())
        if asked:
            rows.append((group, asked, int(judged.hits[:, members].sum()) / asked))
    return rows


# ------------------------------------------------------------------------------------------------- confusions


def confusions(names: list[str], asked: torch.Tensor, seen: torch.Tensor) -> list[tuple[str, str]]:
    """Mistakes in one picture as pairs (object asked for, object seen in its place); '' stands for nothing.

    `names` [24] are those of the labels; `asked` and `seen` are bool [24]. A missed object is paired with a
    surplus one of the same colour, else of the same shape, else with nothing.
    """
    missed = [names[i] for i in (asked & ~seen).nonzero().flatten()]
    extra = [names[i] for i in (seen & ~asked).nonzero().flatten()]
    pairs = []
    for kept in (colour_of, shape_of):
        for name in missed.copy():
            alike = [other for other in extra if kept(other) == kept(name)]
            if alike:
                pairs.append((name, alike[0]))
                missed.remove(name)
                extra.remove(alike[0])
    return pairs + [(name, "") for name in missed] + [("", name) for name in extra]


def kind_of(asked: str, seen: str) -> str:
    """The kind of mistake that a pair of `confusions` is."""
    if not seen:
        return "missed"
    if not asked:
        return "seen where there is none"
    return "shape mistaken" if colour_of(asked) == colour_of(seen) else "colour mistaken"


def all_confusions(judged: Judged, names: list[str]) -> list[tuple[str, str]]:
    """The `confusions` of all pictures, one after the other."""
    pairs = []
    for asked, seen in zip(judged.labels, judged.seen, strict=True):
        pairs += confusions(names, asked, seen)
    return pairs


def confusion_matrix(judged: Judged, names: list[str]) -> torch.Tensor:
    """Counts [25, 25]: rows are objects asked for, columns the objects that the evaluator saw in their place.

    The last row and column stand for nothing. `names` [24] are those of the labels.
    """
    matrix = torch.zeros(NUM_OBJECTS + 1, NUM_OBJECTS + 1, dtype=torch.long)
    right = (judged.labels & judged.seen).sum(0)  # [24]
    matrix[:-1, :-1] = right.diag()
    index = {name: i for i, name in enumerate([*names, ""])}
    for asked, seen in all_confusions(judged, names):
        matrix[index[asked], index[seen]] += 1
    return matrix


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
