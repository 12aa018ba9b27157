"""One HTML page about samples on disk: scores, what is wrong in each picture, likeness to the data, copies.

    python sample.py --mode test new_test process --seeds 10   # what a lab asks for, in images/
    python sample.py --mode train --num-images 2100            # to compare with renders of the same scenes
    python -m report                                           # images/report.html, all in one file

Each list in images/ gets a row in the table of scores and a section of its own. Lists one folder deeper, such
as images/best_of_4/test, get a row only. images/train is compared with the data: likeness and copies.
`benchmarks/page.sh` makes docs/report.html.
"""

import argparse
from pathlib import Path

from infra.commands import ROOT, InputError, Parser, command, read_early, to_path


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m report", description="One page about samples on disk: what is wrong in them, scores, likeness."
    )
    add = parser.add_argument
    add("images", type=to_path, nargs="?", default=Path("images"),
        help="folder that sample.py wrote to (default: %(default)s)")  # fmt: skip
    add("--out", type=to_path, help="page to write (default: IMAGES/report.html)")
    add("--data", type=to_path, help="training pictures (default: iclevr/, else the pack that ships)")
    add("--labels", type=to_path, default=ROOT / "train.json", help="their labels (default: train.json)")
    add("--held-out", type=to_path,
        help="renders of the same labels, not trained on (default: data/held_out.npz)")  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    read_early(parse_args)

import datetime
import os
import sys
from collections.abc import Callable

import jinja2
from tqdm import tqdm

from data.pack import HELD_OUT
from dataset import ICLEVRDataset, load_data
from infra.files import write_whole
from lab import load_evaluator
from label_files import load_objects
from report import figures, sections
from report.metrics import judge, load_samples

TITLE = b"<title>i-CLEVR samples</title>"  # of every page, in page.jinja
FIRST = ("test", "new_test", "unseen", "validation")  # the order of sections; other lists follow by name


def sample_folders(images: Path) -> list[Path]:
    """The folders of pictures with a report beside them in `images` and one level below, in order."""
    reports = [*images.glob("*.json"), *images.glob("*/*.json")]
    folders = [path.with_name(path.name.removesuffix(".json")) for path in reports]

    def place(folder: Path) -> tuple:
        rank = FIRST.index(folder.name) if folder.name in FIRST else len(FIRST)
        return folder.parent != images, folder.parent, rank, folder.name

    return sorted((folder for folder in folders if folder.is_dir()), key=place)


def load_held_out(path: Path | None, labels: Path, objects: dict[str, int]) -> ICLEVRDataset | None:
    """Renders that were not trained on.

    Without `path` these are the renders that ship, or None, with a line on stderr, if they do not belong to
    `labels`. Raises InputError for a `path` that does not belong to them.
    """
    try:
        return ICLEVRDataset(path or HELD_OUT, labels, objects)
    except InputError as error:
        if path:
            raise
        print(f"no comparison with held-out renders; give some with --held-out ({error})", file=sys.stderr)
        return None


def build(images: Path, held_out: ICLEVRDataset | None, training: Callable[[], ICLEVRDataset]) -> dict:
    """All that page.jinja shows of the samples in `images`. Raises InputError.

    `training` loads the training pictures. It is called only if there is something to compare with them.
    """
    folders = sample_folders(images)
    if not folders:
        raise InputError(f"{images}: no samples; make some with `python sample.py --mode test new_test`")
    samples = {}
    for folder in tqdm(folders, "judging", unit="list", delay=1, leave=False):
        samples[folder.relative_to(images).as_posix()] = load_samples(folder)
    reports = [report for report, _ in samples.values()]
    objects = load_objects()
    names = sorted(objects, key=objects.__getitem__)

    page: dict = {"rows": [], "lists": [], "judges": {}, "held_out": None, "likeness": None, "copies": None}
    if held_out:
        evaluator = load_evaluator(reports[0]["evaluator"])
        judged = judge(held_out.images, held_out.conditions, evaluator)
        page["held_out"] = sections.disagreements(judged, names)
        page["judges"]["held-out renders"] = page["held_out"]
        if "train" in samples:
            _, painted = samples["train"]
            page.update(sections.comparison(images / "train", painted, judged, training(), evaluator))

    accuracies = {}
    for name, (report, judged) in samples.items():
        if name == "train":
            continue
        page["rows"].append(sections.score_row(name, report, judged))
        if "/" not in name:
            page["lists"].append(sections.list_section(name, report, judged, names))
            page["judges"][name] = sections.disagreements(judged, names)
            accuracies[name] = report["accuracies"]
    strip = images / "process.png"
    return page | {
        "seeds": figures.draw_seeds(accuracies),
        "strip": figures.png_url(strip) if strip.exists() else None,
        "weights": sections.weights_section(reports),
        "options": {name: sections.shown_options(report) for name, (report, _) in samples.items()},
        "versions": sections.versions(),
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
    }


def refuse_other_page(path: Path):
    """Raise InputError if there is a file at `path` that is not a page of report."""
    if os.path.lexists(path) and TITLE not in path.read_bytes()[:1000]:
        raise InputError(f"{path}: there already, and no page of report; choose another --out")


@command
def main(argv: list[str] | None = None):
    args = parse_args(argv)
    out = args.out or args.images / "report.html"
    objects = load_objects()
    refuse_other_page(out)
    held_out = load_held_out(args.held_out, args.labels, objects)
    page = build(args.images, held_out, lambda: load_data(args.data, args.labels, objects)[0])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((ROOT / "report" / "page.jinja").read_text(encoding="utf-8"))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, template.render(page).encode())
    print(f"{out}: {len(page['rows'])} lists, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
