"""The search for the preset `small`: one factor changed at a time, at equal time of one CPU core.

    OMP_NUM_THREADS=1 python benchmarks/studies/search.py train ROW   # 15 minutes of one core and its score
    python benchmarks/studies/search.py table                         # the rows in docs/search.json, as Markdown

A row changes the preset in what ROWS says. It gets as many steps as `small` in some 15 minutes, or as many as
take the same time if its steps cost more or less, which is measured; the learning rate falls to 0 at the
last. Scored on validation.json, 3 sampling seeds, DPM-Solver++ with 15 steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from speed import bare_training

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sample
import train
from infra.commands import ROOT
from infra.device import choose_setup, join_processes
from options import NUM_OBJECTS, PRESETS

RESULTS = ROOT / "docs" / "search.json"
PARTS = ("network", "scheduler", "training")
COSTLY = {"network", "batch_size", "optimizer"}  # what changes the cost of a step
ROWS = {
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
WARMUP, TIMED = 3, 5  # steps


def seconds_per_step() -> float:
    """CPU seconds of a training step of the preset `small`, as it is now."""
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
    row, steps = ROWS[name], STEPS
    costly = COSTLY & (row.keys() | row.get("training", {}).keys())
    if costly:
        seconds = seconds_per_step()  # of the preset, before the row changes it
    for part in PARTS:
        PRESETS["small"][part] = PRESETS["small"][part] | row.get(part, {})
    if costly:
        steps = round(STEPS * seconds / seconds_per_step())
    folder = out / name.replace(" ", "-").replace(",", "")
    seed = str(row.get("seed", 0))
    common = ["--out", str(folder), "--mixed-precision", "bf16", "--sample-every", "0"]
    train.main(["--model", "small", *common, "--max-steps", str(steps), "--seed", seed])
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    result = {"row": name, "commit": commit.stdout.strip(), "steps": steps}
    result["pictures"] = steps * PRESETS["small"]["training"]["batch_size"]
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
