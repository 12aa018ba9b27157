"""Lists of conditions to paint, and what is on disk of each: its pictures, their grid and their report.

The report is written before the first picture. It tells whose the pictures are, and whether they are the same
that would be painted now.
"""

import argparse
import contextlib
import datetime
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torchvision.utils import make_grid

from checkpoint import fingerprint
from dataset import read_picture, to_uint8
from diffusion import STOCHASTIC
from infra.commands import ROOT, InputError, did_you_mean, shown
from infra.device import choose_precision, device_name
from infra.files import contents, file_sha256, load_json, lock, remove_temporaries, write_json
from label_files import check_condition, load_conditions, load_objects
from options import LEARNED_RANGES, RANGES
from scoring import Scoring

PROCESS = ["red sphere", "cyan cylinder", "cyan cube"]  # what labs want to see come out of the noise
STRIP = 10  # pictures of it
LISTS = ("test", "new_test", "validation", "train")  # label files that ship
SAMPLING_VERSION = 2  # one more whenever a change of the code changes pictures by more than rounding
# What decides about a picture, beside options of sampling. Files of weights may have another name, and the
# number of threads, the size of batches and the GPU change but rounding.
DECISIVE = (
    "conditions", "seed", "precision", "weights_sha256", "evaluator_sha256", "best_of", "lift_over",
    "noise_from", "frames", "sampling_version",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {  # of a Painter, for options that a report does not name
    "guidance_interval": [0, 1000], "negative_scale": 0, "negative_interval": [0, 1000], "evaluator_scale": 0,
    "learned_scale": 1, "learned_interval": [0, 1000],
}  # fmt: skip


def decisive(report: dict) -> dict:
    """What in a report decides about its pictures, without the intervals of a guidance that there is not."""
    found: dict[str, Any] = {name: report.get(name) for name in DECISIVE}
    for name in ("sampler", *RANGES, *LEARNED_RANGES):
        found[name] = report.get(name, DEFAULTS.get(name))
        if isinstance(found[name], tuple):
            found[name] = list(found[name])
    if found["guidance_scale"] == 1:
        found["guidance_interval"] = DEFAULTS["guidance_interval"]
    if not found["negative_scale"]:
        found["negative_interval"] = DEFAULTS["negative_interval"]
    if not found["best_of"]:  # the lift alone needs what a student has learned
        for name in LEARNED_RANGES:
            found[name] = DEFAULTS[name]
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
        count = len(self.places)
        painted = count_painted(self.before)
        self.report = {"labels": self.labels, **self.amounts(), "conditions": self.conditions, **settings}
        if self.before is None:
            self.missing = set(range(count))
            return
        old = decisive(self.before)
        new = decisive(self.report)
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

    def note_painting(self, seconds: float):
        """Note in the report how many pictures were painted, how long that took at `seconds` a picture of all
        lists, and the date: of the newest run that had any to paint."""
        how = "all there before"
        count = len(self.missing)
        if count or "date" not in self.report:
            self.report["painted"] = count
            self.report["seconds"] = round(count * seconds, 2)
            self.report["date"] = datetime.date.today().isoformat()
        if count:
            how = f"{count} painted in {count * seconds:.1f} s, {1 / seconds:.2f} a second"
        print(f"pictures: {self.target}/0.png to {len(self.places) - 1}.png ({how})")


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
            raise InputError(f"--mode {mode}: no such file, nor a list of that name{did_you_mean(mode, names)}")
        conditions = load_conditions(path, objects)
    # Picture i shows condition i % N, with the seed that follows for each time through the list.
    amount = args.num_images or args.seeds * len(conditions)
    if mode == "process":
        amount = 1
    places = [(args.seed + i // len(conditions), i % len(conditions)) for i in range(amount)]
    name = path.name.removesuffix(".json") or path.name
    return PictureList(path.name, conditions, args.out / name, places)


def load_lists(args: argparse.Namespace, unseen: list) -> list[PictureList]:
    """The lists that --mode names. Raises InputError, also for two of one name."""
    objects = load_objects()
    lists = [load_list(mode, args, unseen, objects) for mode in args.mode]
    names = [one.target.name for one in lists]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--mode: two lists named {name} would share one folder; sample them apart")
    return lists


def settings_of(
    args: argparse.Namespace, options: dict, size: int, metadata: dict, evaluator: Scoring, device: torch.device
) -> dict[str, Any]:
    """How the pictures of any list are painted, for the reports; DECISIVE names what decides."""
    precision, _ = choose_precision(device, args.mixed_precision)
    settings: dict[str, Any] = {
        "seed": args.seed,
        **options,
        "precision": precision,
        "batch_size": size,
        "weights": str(args.weights),
        "model": metadata["model"],
        "pictures_seen": metadata["pictures_seen"],
        "device": device_name(device),
        "weights_sha256": fingerprint(args.weights),
        "sampling_version": SAMPLING_VERSION,
    }
    if options["sampler"] in STOCHASTIC:  # each kind of device has random numbers of its own
        settings["noise_from"] = device.type
    if args.best_of > 1:
        settings["best_of"] = args.best_of
        settings["lift_over"] = args.lift_over
    if options.get("evaluator_scale"):
        settings["evaluator_sha256"] = file_sha256(evaluator.path)
    for name in ("torch", "diffusers"):
        settings[name] = version(name)
    return settings


def claim(lists: list[PictureList], settings: dict, overwrite: bool, state: PartialState, stack: contextlib.ExitStack):
    """Lock the folders of the lists until `stack` ends, and find out what is missing. Raises InputError."""
    if state.is_main_process:
        for one in lists:
            one.read_report()  # refuses before the lock makes a folder
            if not one.is_process:
                stack.enter_context(lock(one.target))
    with state.main_process_first():  # so that a mistake is told once
        for one in lists:
            one.plan(settings, overwrite)


def strip(frames: list[torch.Tensor]) -> torch.Tensor:
    """`STRIP` of the frames [3, 64, 64] as a row: the first, the last, and more of the later ones, in which
    there is more to see."""
    way = 1 - torch.linspace(1, 0, min(STRIP, len(frames))) ** 1.7
    chosen = (way * (len(frames) - 1)).round().int().tolist()
    return make_grid(to_uint8(torch.stack([frames[i] for i in chosen])).cpu(), nrow=STRIP)
