"""The report's experiments, repeated: one factor changed at a time, with equal computing time.

    python benchmarks/study.py                           # all rows that docs/study/results.json lacks
    python benchmarks/study.py "no EMA" "base" --out mine   # some rows, into files of your own
    python benchmarks/study.py --budget full             # one CUDA GPU, the report's 40 epochs

Rows are entries of ROWS in benchmarks/studies/rows.py. Each is trained with train.py and scored on validation.json.
The same command goes on where it stopped. Ends by writing the table, the figures and the grids of all results in
--out; `--figures` does only that.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from tqdm import tqdm

from bookkeeping.curves import LOG_NAME
from dataset import load_data
from infra.commands import InputError, command, number
from infra.files import load_json, lock, write_json
from infra.signals import signals_interrupt
from label_files import load_objects
from studies.measure_row import background_spread, seconds_per_step
from studies.rows import BASE, ROWS
from studies.study_page import draw, guidance_table, search_table, seeds_table, table

SCRIPT = ROOT / "benchmarks" / "studies" / "measure_row.py"
POLL = 5.0  # seconds
TABLES = (table, seeds_table, guidance_table)


@dataclass
class Job:
    """A row with a training seed, in a folder of its own. `minutes`: what it is expected to take of one core, or
    on a GPU in comparison with the others."""

    row: str
    seed: int
    folder: Path
    minutes: float

    def minutes_done(self) -> float:
        """By the log of its training. Sampling and judging are not counted."""
        log = self.folder / "run" / LOG_NAME
        planned = self.folder / "steps.json"
        if not log.exists() or not planned.exists():
            return 0.0
        return self.minutes * min(1.0, log.read_bytes().count(b"\n") / load_json(planned))

    def start(self, args: argparse.Namespace, base_seconds: float) -> subprocess.Popen:
        """Start its process, which writes what it has to say into output.txt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = [self.row, self.seed, self.folder, "--budget", args.budget, "--base-seconds", base_seconds]
        if args.dry_run:
            line.append("--dry-run")
        threads = {"OMP_NUM_THREADS": "1"} if args.budget == "quick" else {}
        with (self.folder / "output.txt").open("a") as output:
            return subprocess.Popen(
                [sys.executable, SCRIPT, *map(str, line)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | threads,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the others
            )


def slug(*parts) -> str:
    """A name for a file or folder made of these words and numbers."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-")


def jobs_of(args: argparse.Namespace, results: dict) -> list[Job]:
    """The rows asked for that `results` lacks, each with all its training seeds."""
    known = {(one["row"], one["seed"], one["budget"]) for one in results["rows"]}
    jobs = []
    for name in args.rows or [name for name in ROWS if args.budget in ROWS[name].budgets]:
        for seed in range(ROWS[name].training_seeds):
            if (name, seed, args.budget) not in known:
                folder = args.work / ("dry-run" if args.dry_run else args.budget) / slug(name, seed)
                jobs.append(Job(name, seed, folder, ROWS[name].minutes))
    return jobs


def finish(job: Job, code: int, args: argparse.Namespace) -> bool:
    """Take in what a process with this exit code has left: whether it came to its end."""
    result = job.folder / "result.json"
    if code != 0 or not result.exists():
        last = (job.folder / "output.txt").read_text().splitlines()[-1:]
        tqdm.write(f"{job.row}, seed {job.seed}: exit code {code}: {' '.join(last)}")
        return False
    path = args.out / "results.json"
    results = load_json(path)  # now: long_run.py may have added to it meanwhile
    results["rows"].append(load_json(result))
    write_json(path, results)
    if job.seed == 0:
        (args.out / "grids").mkdir(exist_ok=True)
        shutil.copy(job.folder / "grid.png", args.out / "grids" / f"{slug(job.row, args.budget)}.png")
    tqdm.write(f"{job.row}, seed {job.seed}: accuracy {results['rows'][-1]['points'][-1]['accuracy']}")
    return True


def run(jobs: list[Job], args: argparse.Namespace, base_seconds: float) -> int:
    """Run all jobs, --workers at a time; returns how many failed. When it is interrupted, their processes are
    asked to save and to end."""
    waiting = list(jobs)
    running: list[tuple[Job, subprocess.Popen]] = []
    failed = 0
    total = sum(job.minutes for job in jobs)
    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} minutes of training [{elapsed}<{remaining}]"
    with tqdm(total=total, bar_format=form) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < args.workers:
                    job = waiting.pop(0)
                    running.append((job, job.start(args, base_seconds)))
                time.sleep(POLL)
                for job, process in running.copy():
                    code = process.poll()
                    if code is not None:
                        running.remove((job, process))
                        failed += not finish(job, code, args)
                left = [*waiting, *(job for job, _ in running)]
                bar.n = total - sum(job.minutes - job.minutes_done() for job in left)
                bar.set_description(", ".join(f"{job.row} {job.seed}" for job, _ in running))
        finally:
            for _, process in running:
                process.terminate()
            for _, process in running:
                process.wait()
    return failed


def spread_of_data() -> dict[str, float]:
    """That of the background's colour over data/held_out.npz: the last picture of each scene."""
    data, _ = load_data(ROOT / "data" / "held_out.npz", ROOT / "train.json", load_objects())
    return background_spread(data.images[2::3])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: those of the budget")
    parser.add_argument("--budget", choices=("quick", "full"), default="quick",
                        help="quick: each row its minutes of one core; full: 40 epochs, on a GPU")  # fmt: skip
    parser.add_argument("--workers", type=number(int, 1), help="rows at a time (default: quick 2, full 1)")
    parser.add_argument("--out", type=Path, help="results (default: docs/study, of a dry run runs/dry-run)")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="runs (default: runs/study)")
    parser.add_argument("--dry-run", action="store_true", help="a few steps and pictures a row, to try it out")
    parser.add_argument("--figures", action="store_true", help="only the table, the figures and the grids")
    args = parser.parse_args(argv)
    for name in args.rows:
        if name not in ROWS:
            parser.error(f"no row {name!r}; expected some of: {', '.join(ROWS)}")
        if ROWS[name].commit:
            parser.error(f"{name!r} did not pay and is no longer in the code; git checkout {ROWS[name].commit} has it")
    args.out = args.out or (Path("runs/dry-run") if args.dry_run else ROOT / "docs" / "study")
    args.workers = args.workers or (2 if args.budget == "quick" else 1)
    return args


@command
def main(argv: list[str] | None = None):
    args = parse_args(argv)
    path = args.out / "results.json"
    results = load_json(path) if path.exists() else {"rows": []}
    failed = 0
    if not args.figures:
        args.out.mkdir(parents=True, exist_ok=True)
        if "base_seconds_per_step" not in results:
            torch.set_num_threads(1)
            results["base_seconds_per_step"] = 1.0 if args.dry_run else seconds_per_step(BASE, "small")
            write_json(path, results)
        with lock(args.work), signals_interrupt():
            failed = run(jobs_of(args, results), args, results["base_seconds_per_step"])
    results = load_json(path)
    if "data" not in results:
        results["data"] = spread_of_data()
        write_json(path, results)
    if any(one["budget"] == args.budget for one in results["rows"]):
        draw(results, args.budget, args.out)
        for make in TABLES:
            print(make(results, args.budget), end="\n\n")
    if any(one["budget"] == "search" for one in results["rows"]):
        print(search_table(results))
    if failed:
        raise InputError(f"{failed} rows failed; their last words are above, all of them in {args.work}/*/*/output.txt")


if __name__ == "__main__":
    main()
