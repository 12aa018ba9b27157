"""Lists of conditions to paint, and what is on disk of each: its pictures, their grid and their report.

The report is written before the first picture. It tells whose the pictures are, and whether they are the same
that would be painted now.
"""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dataset import read_picture
from infra.commands import ROOT, InputError, did_you_mean, shown
from infra.files import contents, load_json, remove_temporaries, write_json
from labels import check_condition, load_conditions
from options import RANGES

PROCESS = ["red sphere", "cyan cylinder", "cyan cube"]  # what labs want to see come out of the noise
STRIP = 10  # pictures of it
LISTS = ("test", "new_test", "validation", "train")  # label files that ship
SAMPLING_VERSION = 2  # one more whenever a change of the code changes pictures by more than rounding
# What decides about a picture, beside options of sampling. Files of weights may have another name, and the
# number of threads, the size of batches and the GPU change but rounding.
DECISIVE = ("conditions", "seed", "precision", "weights_sha256", "evaluator_sha256", "best_of", "lift_over")
DECISIVE += ("noise_from", "frames", "sampling_version")
DEFAULTS = {"guidance_interval": [0, 1000], "negative_scale": 0, "negative_interval": [0, 1000]}
DEFAULTS |= {"evaluator_scale": 0}  # of `generate`, for options that a report does not name


def decisive(report: dict) -> dict:
    """What in a report decides about its pictures, without the intervals of a guidance that there is not."""
    found = {name: report.get(name) for name in DECISIVE}
    for name in ("sampler", *RANGES):
        found[name] = report.get(name, DEFAULTS.get(name))
        if isinstance(found[name], tuple):
            found[name] = list(found[name])
    if found["guidance_scale"] == 1:
        found["guidance_interval"] = DEFAULTS["guidance_interval"]
    if not found["negative_scale"]:
        found["negative_interval"] = DEFAULTS["negative_interval"]
    return found


@dataclass
class PictureList:
    """A label list to paint: its pictures go into the folder `target`, grid and report beside it. Of the
    strip of --mode process there is the grid alone."""

    labels: str  # name of the label file
    conditions: list[list[str]]
    target: Path
    places: list[tuple[int, int]]  # of each picture: seed, index of its condition
    missing: set[int] = field(default_factory=set)  # pictures that are not there yet
    report: dict = field(default_factory=dict)  # what is to be stored
    before: dict | None = None  # what was stored, None if there was no report
    differs: bool = False  # what is there is to be painted anew
    frames: list[torch.Tensor] = field(default_factory=list)  # [3, 64, 64], of --mode process

    @property
    def is_process(self) -> bool:
        return self.labels == "process"

    @property
    def report_path(self) -> Path:
        return self.target.with_name(f"{self.target.name}.json")

    @property
    def grid_path(self) -> Path:
        return self.target.with_name(f"{self.target.name}.png")

    def picture_path(self, index: int) -> Path:
        return self.grid_path if self.is_process else self.target / f"{index}.png"

    def read_report(self):
        """Look who has been here. Raises InputError if anything there is not sample.py's."""
        if os.path.lexists(self.report_path):
            found = load_json(self.report_path)
            if not isinstance(found, dict) or not {"labels", "conditions", "weights_sha256"} <= found.keys():
                raise InputError(f"{self.report_path}: no report of sample.py; choose another --out")
            self.before = found
            return
        there = [] if self.is_process else contents(self.target)
        if there:
            raise InputError(
                f"{self.target}: not empty ({shown(there[0])}) and without the report {self.report_path}, so "
                f"it is left as it is; choose another --out"
            )
        if os.path.lexists(self.grid_path):
            raise InputError(
                f"{self.grid_path}: there is no report {self.report_path} with it, so it is left as it is; "
                f"choose another --out"
            )

    def plan(self, settings: dict, overwrite: bool):
        """Find out which pictures are missing of those to be painted by `settings`. Raises InputError if
        there are others, unless `overwrite`."""
        self.read_report()
        count, painted = len(self.places), count_painted(self.before)
        self.report = {"labels": self.labels, **self.amounts(), "conditions": self.conditions, **settings}
        if self.before is None:
            self.missing = set(range(count))
            return
        old, new = decisive(self.before), decisive(self.report)
        differences = [name for name in new if old[name] != new[name]]
        if differences and not overwrite:
            what = ", ".join(f"{name} {shown(old[name])}, now {shown(new[name])}" for name in differences)
            raise InputError(
                f"{self.target}: painted with {what}; --overwrite paints it anew, another --out keeps both"
            )
        self.differs = bool(differences)
        if self.differs:
            self.missing = set(range(count))
            self.report["pictures"] = count
            return
        self.missing = {i for i in range(count) if not is_whole(self.picture_path(i))}
        for i in range(painted, 0 if self.is_process else count):
            if os.path.lexists(self.picture_path(i)):
                raise InputError(f"{self.picture_path(i)}: not painted by sample.py; choose another --out")
        if not self.missing:  # then what was stored of how and when they were painted stays true
            self.report = {**self.before, **self.amounts()}

    def amounts(self) -> dict:
        """For the report: how many pictures are scored, and how many there are. Of a strip, its frames."""
        if self.is_process:
            return {"frames": STRIP}
        count = len(self.places)
        return {"num_images": count, "pictures": max(count, count_painted(self.before))}

    def begin(self):
        """Claim folder and files for the pictures to come: old ones that differ go, the report is stored."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if not self.is_process:
            remove_temporaries(self.target)
        if self.differs:  # pictures before the report: if this is cut off, it is still true of those left
            self.grid_path.unlink(missing_ok=True)
            for path in self.target.glob("*.png"):
                is_number = path.stem.isdecimal() and path.stem == str(int(path.stem))
                if is_number and int(path.stem) < count_painted(self.before):
                    path.unlink()
        if self.before is None or self.differs:
            write_json(self.report_path, self.report)
        elif not self.is_process and count_painted(self.before) < self.report["pictures"]:
            # The scores of what is there already stay until there are new ones.
            write_json(self.report_path, {**self.before, "pictures": self.report["pictures"]})


def count_painted(report: dict | None) -> int:
    """How many numbered pictures are sample.py's, by the report beside them."""
    if report is None:
        return 0
    found = report.get("pictures", report.get("num_images"))
    return found if type(found) is int else 0


def is_whole(path: Path) -> bool:
    """Whether a picture can be read."""
    try:
        read_picture(path)
    except InputError:
        return False
    return True


def load_list(mode: str, args: argparse.Namespace, unseen: list, objects: dict[str, int]) -> PictureList:
    """The list that `mode` stands for, a name or a label file. Raises InputError."""
    path = Path(mode).expanduser()
    if mode == "process":
        conditions = [check_condition(args.objects or PROCESS, objects, "--objects")]
    elif mode == "unseen":
        if not unseen:
            raise InputError(f"{args.weights}: does not tell which triples it has not seen; train it anew")
        where = f"{args.weights}, unseen, entry"
        conditions = [check_condition(c, objects, f"{where} {i}") for i, c in enumerate(unseen)]
    else:
        known = ROOT / f"{mode}.json"
        path = known if known.exists() else path
        if not path.exists():
            names = [*LISTS, "unseen", "process", *sorted(p.name for p in Path().glob("*.json"))]
            raise InputError(
                f"--mode {mode}: no such file, nor a list of that name{did_you_mean(mode, names)}"
            )
        conditions = load_conditions(path, objects)
    # Picture i shows condition i % N, with the seed that follows for each time through the list.
    amount = args.num_images or args.seeds * len(conditions)
    if mode == "process":
        amount = 1
    places = [(args.seed + i // len(conditions), i % len(conditions)) for i in range(amount)]
    name = path.name.removesuffix(".json") or path.name
    return PictureList(path.name, conditions, args.out / name, places)
