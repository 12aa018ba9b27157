"""Draws what the log of a training run holds: loss, gradient norm, learning rate, and accuracy if it was measured.

    python -m bookkeeping.curves runs/small runs/other --out curves.png    # several runs in one picture

Training draws the curves of its run into curves.png of its folder whenever it saves.
"""

import argparse
from pathlib import Path

from infra.commands import InputError, Parser, command, read_early, to_path


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m bookkeeping.curves", description="Draw the curves of training runs.")
    parser.add_argument("runs", type=to_path, nargs="+", help="folder of a run, or its log.jsonl")
    parser.add_argument("--out", type=to_path, required=True, help="picture to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    read_early(parse_args)

import io
import json

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infra.files import write_whole

LOG_NAME = "log.jsonl"
CURVES_NAME = "curves.png"
PANELS = {"loss": "training loss", "gradient_norm": "gradient norm", "learning_rate": "learning rate"}


Log = tuple[list[dict], list[dict]]  # the lines of training steps, those of accuracies


def read_log(path: Path) -> Log:
    """The lines of a run's log: those of training steps, and those of accuracies in between. Raises InputError."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        raise InputError(f"{path}: expected the log of a run, a JSON object in each line") from None
    steps = [line for line in lines if isinstance(line, dict) and {"pictures", "loss"} <= line.keys()]
    scores = [line for line in lines if isinstance(line, dict) and {"pictures", "accuracy"} <= line.keys()]
    return steps, scores


def plot_steps(axes: Axes, steps: list[dict], name: str, **style):
    """A quantity of the training steps over the pictures seen, as a running mean over a fiftieth of the run: single
    entries are noisy."""
    if not steps:  # a run that was saved before it logged any
        return
    width = max(1, len(steps) // 50)
    values = np.convolve([step[name] for step in steps], np.ones(width) / width, "valid")
    axes.plot([step["pictures"] for step in steps][width - 1 :], values, **style)


def draw_curves(logs: dict[str, Log], out: Path):
    """Draw runs, name -> log, into the picture `out`."""
    has_scores = any(scores for _, scores in logs.values())
    figure = Figure(figsize=(10, 6 if has_scores else 3), layout="constrained")
    panels = figure.subplots(2 if has_scores else 1, 2 if has_scores else 3).flat
    for axes, (name, label) in zip(panels, PANELS.items(), strict=False):
        for run, (steps, _) in logs.items():
            plot_steps(axes, steps, name, label=run)
        axes.set(ylabel=label, yscale="linear" if name == "learning_rate" else "log")
    if has_scores:
        for index, (run, (_, scores)) in enumerate(logs.items()):
            seen = [score["pictures"] for score in scores]
            style = {"color": f"C{index}", "marker": "."}
            panels[3].plot(seen, [score["accuracy"] for score in scores], label=run, **style)
            panels[3].plot(seen, [score["exact_set"] for score in scores], linestyle="--", **style)
        panels[3].set(ylabel="accuracy (dashed: exact set)", ylim=(0, 1))
    for axes in figure.axes:
        axes.set_xlabel("pictures seen")
        axes.grid(alpha=0.3)
    if len(logs) > 1:
        figure.axes[0].legend()
    temporary = io.BytesIO()
    figure.savefig(temporary, format="png", dpi=100)
    write_whole(out, temporary.getvalue())


@command
def main(argv: list[str] | None = None):
    args = parse_args(argv)
    logs = {}
    for run in args.runs:
        path = run / LOG_NAME if run.is_dir() else run
        if not path.is_file():
            raise InputError(f"{path}: no such file; it is the log of a run of train.py")
        log = read_log(path)
        if not any(log):
            raise InputError(f"{path}: no training steps in it")
        logs[str(path.parent)] = log
    draw_curves(logs, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
