"""Draw the loss of runs against the pictures they have seen.

python benchmarks/curve.py runs/small/log.jsonl [...] --out curve.png
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", type=Path, nargs="+", help="log.jsonl of a run")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for path in args.logs:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        pictures = np.array([entry["pictures"] for entry in entries])
        loss = np.array([entry["loss"] for entry in entries])
        width = max(1, len(loss) // 50)  # a mean over a fiftieth of the run: single entries are noisy
        smooth = np.convolve(loss, np.ones(width) / width, "valid")
        axes.plot(pictures[width - 1 :], smooth, label=path.parent.name)
    axes.set(xlabel="pictures seen", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
