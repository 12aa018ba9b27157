"""Train one row of the study with one seed, and measure it: the process that benchmarks/study.py starts.

    OMP_NUM_THREADS=1 python benchmarks/studies/measure_row.py "no EMA" 0 runs/study/quick/no-ema-0

Leaves result.json, grid.png and the run in that folder. The same command goes on where it was stopped. Steps:
choose the number of training steps, train with train.py, sample with sample.py at each checkpoint, judge.
"""

import argparse
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torchvision.utils import make_grid

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import sample
import train
from baselines import bare_training
from bookkeeping.curves import LOG_NAME, read_log
from bookkeeping.run import is_due
from checkpoint import checkpoints, load_metadata, step_of, steps_done
from dataset import read_picture, write_picture
from infra.device import choose_setup, join_processes
from infra.files import load_json, write_json
from label_files import load_labels, load_objects
from options import NUM_OBJECTS, PRESETS
from report import metrics
from speed import device_name
from studies.rows import BASE, ROWS, Row, preset_of

POINTS = 4  # checkpoints that are measured, evenly spread over the training
SAMPLING_SEEDS = 3  # of the last one; of those before it one
EPOCHS = 40  # of the full budget, the report's
WARMUP = 2  # steps
TIMED = 5  # steps
SPIKE = 2.0  # times the median around it
AROUND = 50  # steps to each side
CURVE_POINTS = 60
DRY_SAMPLING = ["--num-images", 4, "--steps", 2]
MEASURES = ("accuracy", "exact_set", "second_judge", "both")


# -------------------------------------------------------------------------------------- how long it is trained


def stepper(preset: dict[str, dict], name: str) -> Callable[[], float]:
    """A training step of `preset`, which is put in the place of the one called `name`: does it and returns its
    CPU seconds."""
    PRESETS[name] = preset
    size = preset["training"]["batch_size"]
    setup = choose_setup(join_processes(), None, passes=1, training=True)
    step = bare_training(name, torch.randn(size, 3, 64, 64), torch.zeros(size, NUM_OBJECTS), setup)

    def timed() -> float:
        start = time.process_time()
        step(1)
        return time.process_time() - start

    return timed


def seconds_per_step(preset: dict[str, dict], name: str) -> float:
    """CPU seconds of a training step of `preset`: a median."""
    step = stepper(preset, name)
    return statistics.median([step() for _ in range(WARMUP + TIMED)][WARMUP:])


def relative_cost(row: Row) -> float:
    """CPU time of a training step of a row, in those of the base: 1 if nothing that costs time is changed."""
    preset = preset_of(row)
    is_alike = preset["network"] == BASE["network"]
    if is_alike and all(preset["training"][name] == BASE["training"][name] for name in ("batch_size", "optimizer")):
        return 1.0
    step = stepper(preset, row.preset)
    base_step = stepper(BASE, "small")
    # In turns: the machine is not equally fast all the time.
    pairs = [(step(), base_step()) for _ in range(WARMUP + TIMED)][WARMUP:]
    return statistics.median(own for own, _ in pairs) / statistics.median(base for _, base in pairs)


def steps_of(row: Row, budget: str, base_seconds: float) -> int:
    """The number of training steps of a row. Full budget: EPOCHS epochs. Quick budget: as many as take the
    row's minutes of one core.

    `base_seconds`: of a step of the base on the machine on which the study began. On another machine a row gets
    as many steps as on that one, since its cost is measured against that of the base.
    """
    preset = preset_of(row)
    if budget == "full":
        pictures = len(load_labels(ROOT / "train.json", load_objects()))
        return math.ceil(EPOCHS * pictures / preset["training"]["batch_size"])
    return max(1, round(60 * row.minutes / base_seconds / relative_cost(row)))


# -------------------------------------------------------------------------------------------- what is measured


def background_colours(pictures: torch.Tensor) -> torch.Tensor:
    """The colour [N, 3] of the background of uint8 pictures [N, 3, 64, 64], in grey levels.

    The median over all pixels: objects cover far less than half of a picture.
    """
    return pictures.flatten(2).float().median(2).values


def background_spread(pictures: torch.Tensor) -> dict[str, float]:
    """How far the background's colour lies from its mean over uint8 pictures [N, 3, 64, 64]: root mean square,
    in grey levels. `background`: of the colour; `tint`: of the colour less its mean over the channels, so that
    lighter and darker do not count."""
    colours = background_colours(pictures)
    tints = colours - colours.mean(1, keepdim=True)
    return {
        "background": colours.var(0, unbiased=False).mean().sqrt().item(),
        "tint": tints.var(0, unbiased=False).mean().sqrt().item(),
    }


def count_spikes(values: list[float]) -> int:
    """How many values are more than SPIKE times the median of the AROUND values to each side. The first AROUND
    values do not count, since loss and gradient fall fast at the start of a training."""
    medians = [statistics.median(values[max(0, i - AROUND) : i + AROUND + 1]) for i in range(len(values))]
    return sum(values[i] > SPIKE * medians[i] for i in range(AROUND, len(values)))


def curve(log: list[dict]) -> dict[str, list[float]]:
    """Loss and largest gradient norm against pictures, in CURVE_POINTS parts of the training."""
    parts = [part for part in np.array_split(np.arange(len(log)), CURVE_POINTS) if len(part)]
    return {
        "pictures": [log[part[-1]]["pictures"] for part in parts],
        "loss": [round(statistics.mean(log[i]["loss"] for i in part), 6) for part in parts],
        "gradient_norm": [round(max(log[i]["gradient_norm"] for i in part), 4) for part in parts],
    }


def measure(weights: Path, out: Path, options: list) -> dict[str, list[float]]:
    """Sample validation.json with the weights of a checkpoint and `options` of sample.py: every measure, one
    value a sampling seed."""
    sample.main(["--mode", "validation", "--weights", str(weights), "--out", str(out), *map(str, options)])
    report, judged = metrics.load_samples(out / "validation")
    runs = metrics.runs_of(judged, len(report["conditions"]))
    found = []
    for run in runs:
        measures = metrics.measure(run)
        found.append({name: measures[name] for name in MEASURES} | background_spread(run.pictures))
    return {name: [round(one[name], 4) for one in found] for name in found[0]}


def write_grid(images: Path, path: Path):
    """Every eighth of the 64 pictures of the first seed, 8 in all."""
    chosen = [images / f"{i}.png" for i in range(0, 64, 8)]
    pictures = [read_picture(one) for one in chosen if one.exists()]
    write_picture(path, make_grid(torch.stack(pictures), nrow=8))


def machine() -> str:
    """The processor or the GPU, and the threads that PyTorch uses."""
    return f"{device_name(join_processes().device)}, {torch.get_num_threads()} thread(s)"


# ----------------------------------------------------------------------------------------------------- the row


def train_row(row: Row, run: Path, seed: int, steps: int):
    """Train with train.py, and note the seconds that it takes: of the CPU, or by the clock where a GPU does the work.
    After a stop, those of the last call are extrapolated to all steps, as a process that was killed notes nothing."""
    argv = ["--model", row.preset, "--out", str(run), "--seed", str(seed), "--max-steps", str(steps)]
    # All are kept: those of a stop, which are not measured, may come between.
    argv += ["--save-every", str(math.ceil(steps / POINTS)), "--keep-checkpoints", "1000"]
    argv += ["--log-every", "1", "--sample-every", "0"]
    clock = time.process_time if join_processes().device.type == "cpu" else time.perf_counter
    done = steps_done(run)
    start = clock()
    train.main(argv)
    if done < steps:
        write_json(run.with_name("seconds.json"), (clock() - start) * steps / (steps - done))


def measure_points(row: Row, run: Path, folder: Path, steps: int, is_dry: bool) -> tuple[list[dict], dict]:
    """Sample at each checkpoint of a run, and at the last one with other guidance scales too. What is measured
    already is kept in points.json."""
    path = folder / "points.json"
    known = load_json(path) if path.exists() else {}
    saved = [one for one in checkpoints(run) if is_due(step_of(one), math.ceil(steps / POINTS), steps)]
    many = DRY_SAMPLING if is_dry else ["--seeds", SAMPLING_SEEDS]
    few = DRY_SAMPLING if is_dry else []
    wanted: list[tuple[str, Path, list]] = [(one.name, one, few) for one in saved[:-1]]
    wanted.append((saved[-1].name, saved[-1], many))
    wanted += [(f"guidance {scale:g}", saved[-1], [*many, "--guidance-scale", scale]) for scale in row.guidance_scales]
    for key, weights, options in wanted:
        if key not in known:
            images = folder / f"images-{key.replace(' ', '-')}"
            shutil.rmtree(images, ignore_errors=True)  # of an earlier call
            known[key] = measure(weights, images, options)
            if key == saved[-1].name:
                write_grid(images / "validation", folder / "grid.png")
            shutil.rmtree(images)
            write_json(path, known)
    points = [{"pictures": load_metadata(one)["pictures_seen"], **known[one.name]} for one in saved]
    return points, {f"{scale:g}": known[f"guidance {scale:g}"] for scale in row.guidance_scales}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget", choices=("quick", "full"), default="quick")
    parser.add_argument("--base-seconds", type=float, default=1.0, help="CPU seconds of a step of the base")
    parser.add_argument("--dry-run", action="store_true", help="a few steps and pictures, to try it out")
    args = parser.parse_args()
    row = ROWS[args.row]
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"

    planned = folder / "steps.json"
    if not planned.exists():  # once: it comes out a little differently each time
        write_json(planned, POINTS if args.dry_run else steps_of(row, args.budget, args.base_seconds))
    steps = load_json(planned)
    PRESETS[row.preset] = preset_of(row)
    if args.dry_run:
        PRESETS[row.preset]["training"]["batch_size"] = 4
    train_row(row, run, args.seed, steps)
    points, guidance = measure_points(row, run, folder, steps, args.dry_run)

    log, _ = read_log(run / LOG_NAME)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    result = {
        "row": args.row,
        "seed": args.seed,
        "budget": args.budget,
        "commit": commit.stdout.strip(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "steps": steps,
        "pictures": points[-1]["pictures"],
        "seconds": round(load_json(folder / "seconds.json")),
        "loss_spikes": count_spikes([entry["loss"] for entry in log]),
        "gradient_spikes": count_spikes([entry["gradient_norm"] for entry in log]),
        "points": points,
        "guidance": guidance,
        "curve": curve(log),
    }
    write_json(folder / "result.json", result)
    for old in checkpoints(run)[:-1]:  # the last one can be sampled with
        shutil.rmtree(old)


if __name__ == "__main__":
    main()
