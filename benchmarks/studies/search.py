"""The search for the preset `small`: one factor changed at a time, with equal time of one CPU core.

    OMP_NUM_THREADS=1 python benchmarks/studies/search.py train ROW   # 15 minutes of one core and scores
    python benchmarks/studies/search.py table                         # docs/search.json as Markdown

A row is `small` with the changes in ROWS. It gets as many steps as `small` in some 15 minutes. If its steps
cost more or less, which is measured, it gets as many as take the same time. The learning rate falls to 0 at
the last step. Scored on validation.json, 3 sampling seeds, DPM-Solver++ with 15 steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from baselines import bare_training

import sample
import train
from infra.device import choose_setup, join_processes
from options import NUM_OBJECTS, PRESETS

RESULTS = ROOT / "docs" / "search.json"
PARTS = ("network", "scheduler", "training")
COSTLY = {"network", "batch_size", "optimizer"}  # what changes the cost of a step
ROWS: dict[str, dict] = {
    "small": {},
    "seed 1": {"seed": 1},
    "AdamW, learning rate 1e-3": {"training": {"optimizer": "adamw", "learning_rate": 1e-3}},
    "learning rate 1.5e-3": {"training": {"learning_rate": 1.5e-3}},
    "learning rate 6e-3": {"training": {"learning_rate": 6e-3}},
    "learning rate constant": {"training": {"lr_schedule": "constant"}},
    "batch 16, learning rate 2e-3": {"training": {"batch_size": 16, "learning_rate": 2e-3}},
    "batch 64, learning rate 4e-3": {"training": {"batch_size": 64, "learning_rate": 4e-3}},
    "EMA 0.99": {"training": {"ema_decay": 0.99}},
    "EMA 0.9995": {"training": {"ema_decay": 0.9995}},
    "label dropout 0.05": {"training": {"label_dropout": 0.05}},
    "label dropout 0.2": {"training": {"label_dropout": 0.2}},
    "label and timestep added": {"network": {"resnet_time_scale_shift": "default"}},
    "noise prediction": {"scheduler": {"prediction_type": "epsilon"}},
    "zero terminal SNR": {"scheduler": {"rescale_betas_zero_snr": True}},
    "uniform timesteps": {"training": {"timestep_sampling": "uniform"}},
    "2 layers a block": {"network": {"layers_per_block": 2}},
    "attention at 16x16 too": {"network": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }},
    "channels 48, 96, 160": {"network": {"block_out_channels": (48, 96, 160)}},
    "channels 64, 128, 256": {"network": {"block_out_channels": (64, 128, 256)}},
    "channels 96, 128, 192": {"network": {"block_out_channels": (96, 128, 192)}},
    "patches 4, channels 128, 192": {"network": {
        "patch_size": 4,
        "block_out_channels": (128, 192),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }},
}  # fmt: skip
SAMPLING = ["--sampler", "dpmsolver++", "--steps", "15", "--guidance-interval", "0", "1000"]
SAMPLING += ["--negative-scale", "0", "--seeds", "3"]
GUIDANCE_SCALES = ("2", "4")
STEPS = 1105  # of `small` in 15 minutes of a core, counted once: the same machine is faster on other days
WARMUP = 3  # steps
TIMED = 5  # steps


def seconds_per_step() -> float:
    """CPU seconds of a training step of the preset `small`, as PRESETS has it now."""
    size = PRESETS["small"]["training"]["batch_size"]
    setup = choose_setup(join_processes(), "bf16", passes=1, training=True)
    step = bare_training("small", torch.randn(size, 3, 64, 64), torch.zeros(size, NUM_OBJECTS), setup)
    seconds = []
    for _ in range(WARMUP + TIMED):
        start = time.process_time()
        step(1)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[WARMUP:])


def run(name: str, out: Path):
    """Train and score a row; adds it to docs/search.json."""
    row = ROWS[name]
    preset = PRESETS["small"]
    is_costly = not COSTLY.isdisjoint([*row, *row.get("training", {})])
    before = seconds_per_step() if is_costly else 0
    for part in PARTS:
        preset[part] = {**preset[part], **row.get(part, {})}
    steps = round(STEPS * before / seconds_per_step()) if is_costly else STEPS
    folder = out / name.replace(" ", "-").replace(",", "")
    seed = str(row.get("seed", 0))
    common = ["--out", str(folder), "--mixed-precision", "bf16", "--sample-every", "0"]
    train.main(["--model", "small", *common, "--max-steps", str(steps), "--seed", seed])
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    pictures = steps * preset["training"]["batch_size"]
    result = {"row": name, "commit": commit.stdout.strip(), "steps": steps, "pictures": pictures}
    for scale in GUIDANCE_SCALES:
        images = folder / f"guidance-{scale}"
        common = ["--weights", str(folder), "--out", str(images), "--mixed-precision", "bf16"]
        sample.main(["--mode", "validation", *common, *SAMPLING, "--guidance-scale", scale])
        result[f"guidance {scale}"] = json.loads((images / "validation.json").read_text())["accuracies"]
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(r) for r in [*rows, result]) + "\n]\n")


def table():
    print("| row | commit | pictures |" + "".join(f" guidance {scale} |" for scale in GUIDANCE_SCALES))
    print("|---|---|---|" + "---|" * len(GUIDANCE_SCALES))
    for row in json.loads(RESULTS.read_text()):
        cells = []
        for scale in GUIDANCE_SCALES:
            values = row[f"guidance {scale}"]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        print(f"| {row['row']} | {row['commit']} | {row['pictures']:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("train", "table"))
    parser.add_argument("row", nargs="?", choices=ROWS)
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    args = parser.parse_args()
    if args.what == "table":
        table()
    elif args.row:
        run(args.row, args.out)
    else:
        parser.error("train which row?")
