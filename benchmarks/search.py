"""The search for the `small` preset: one factor at a time, at equal time of one CPU core.

    OMP_NUM_THREADS=1 python benchmarks/search.py train ROW   # 15 minutes of one core a row, then its score
    python benchmarks/search.py table                            # the rows done so far, as Markdown

A row changes the base in what ROWS says. Steps are what fits into the time, measured before; the learning
rate falls to 0 at the last. Scored on validation.json by the EMA, 3 sampling seeds.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample
import train
from dataset import NUM_OBJECTS
from model import PRESETS, build

BASE = {
    "network": {"layers_per_block": 2, "block_out_channels": (64, 96, 128)},
    "training": {"batch_size": 32, "learning_rate": 1e-3},
}
ROWS = {
    "base": {},
    "base, seed 1": {"seed": 1},
    "noise prediction": {"scheduler": {"prediction_type": "epsilon"}},
    "min-SNR 5": {"training": {"snr_gamma": 5.0}},
    "scale-shift": {"network": {"resnet_time_scale_shift": "scale_shift"}},
    "coordinates": {"network": {"coordinates": True}},
    "stratified timesteps": {"training": {"timestep_sampling": "stratified"}},
    "logit-normal timesteps": {"training": {"timestep_sampling": "logit-normal"}},
    "batch 16": {"training": {"batch_size": 16, "learning_rate": 7e-4}},
    "batch 64": {"training": {"batch_size": 64, "learning_rate": 1.4e-3}},
    "learning rate 2e-3": {"training": {"learning_rate": 2e-3}},
    "learning rate constant": {"training": {"lr_schedule": "constant"}},
    "label dropout 0.2": {"training": {"label_dropout": 0.2}},
    "Muon": {"training": {"optimizer": "muon"}},
    "Muon, scale-shift": {
        "network": {"resnet_time_scale_shift": "scale_shift"},
        "training": {"optimizer": "muon"},
    },
    "Muon, scale-shift, learning rate 3e-3": {
        "network": {"resnet_time_scale_shift": "scale_shift"},
        "training": {"optimizer": "muon", "learning_rate": 3e-3},
    },
    "Muon, scale-shift, learning rate 1e-2": {
        "network": {"resnet_time_scale_shift": "scale_shift"},
        "training": {"optimizer": "muon", "learning_rate": 1e-2},
    },
    "1 layer a block": {"network": {"layers_per_block": 1}},
    "channels 48, 96, 160": {"network": {"block_out_channels": (48, 96, 160)}},
    "channels 96, 128, 192": {"network": {"block_out_channels": (96, 128, 192)}},
    "patches 4, channels 128, 192": {"network": {
        "patch_size": 4,
        "block_out_channels": (128, 192),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }},
}  # fmt: skip
GUIDANCE_SCALES = (2.0, 4.0)
SEEDS = 3
WARMUP, TIMED = 3, 5  # steps


def seconds_per_step() -> float:
    """CPU seconds of a training step of the preset `small`."""
    model, _ = build("small")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    size, seconds = PRESETS["small"]["training"]["batch_size"], []
    for _ in range(WARMUP + TIMED):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(
                torch.randn(size, 3, 64, 64), torch.zeros(size), torch.zeros(size, NUM_OBJECTS)
            )
        prediction.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return sorted(seconds[WARMUP:])[TIMED // 2]


def run(name: str, minutes: float, out: Path):
    """Train and score a row; leaves <out>/<row>.json."""
    change = ROWS[name]
    for part in ("network", "scheduler", "training"):
        PRESETS["small"][part] = PRESETS["small"][part] | BASE.get(part, {}) | change.get(part, {})
    steps = int(60 * minutes / seconds_per_step())
    folder = out / name.replace(" ", "-").replace(",", "")
    print(f"{name}: {steps} steps", flush=True)
    common = ["--out", str(folder), "--mixed-precision", "bf16"]
    seed = str(change.get("seed", 0))
    quiet = ["--sample-every", "0"]
    train.main(["--model", "small", *common, *quiet, "--max-steps", str(steps), "--seed", seed])
    size = PRESETS["small"]["training"]["batch_size"]
    row = {"row": name, "steps": steps, "pictures": steps * size, "validation": {}}
    for scale in GUIDANCE_SCALES:
        images = folder / f"guidance-{scale:g}"
        common = ["--weights", str(folder), "--out", str(images), "--mixed-precision", "bf16"]
        options = ["--seeds", str(SEEDS), "--guidance-scale", str(scale)]
        sample.main(["--mode", "validation", *common, *options])
        row["validation"][str(scale)] = json.loads((images / "validation.json").read_text())["accuracies"]
    folder.with_suffix(".json").write_text(json.dumps(row) + "\n")


def table(out: Path):
    rows = [json.loads(path.read_text()) for path in out.glob("*.json")]
    print("| row | pictures |" + "".join(f" guidance {scale:g} |" for scale in GUIDANCE_SCALES))
    print("|---|---|" + "---|" * len(GUIDANCE_SCALES))
    for row in sorted(rows, key=lambda row: list(ROWS).index(row["row"])):
        means = [sum(accuracies) / SEEDS for accuracies in row["validation"].values()]
        print(f"| {row['row']} | {row['pictures']:,} |" + "".join(f" {mean:.3f} |" for mean in means))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("train", "table"))
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW")
    parser.add_argument("--minutes", type=float, default=15, help="of one core (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    args = parser.parse_args()
    if args.what == "table":
        table(args.out)
    elif len(args.rows) == 1:
        run(args.rows[0], args.minutes, args.out)
    else:
        raise SystemExit("one row at a time: presets change with it")
