"""Guidance scale and interval against two judges: a table in Markdown and a figure.

    python benchmarks/studies/guidance.py --weights DIR --out docs/guidance   # docs/guidance.json and .png

On validation.json, seeds 100 and 101, so that scale and interval may be chosen by it; all other options are
those that come with the weights. The evaluator is blind to a second copy of an object; the second judge
(report/judge.py) counts them. What docs/guidance.json already holds is not sampled again.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from infra.commands import command
from report.metrics import load_samples, runs_of, scores
from studies.steps import sweep

RUNS = [(1.0, 0, 1000)]  # guidance scale, interval
RUNS += [(scale, 0, high) for scale in (2.0, 3.0, 4.0, 6.0) for high in (550, 750, 1000)]


def judge_twice(folder: Path) -> dict[str, float]:
    """What both judges hold right of the pictures in `folder`."""
    report, judged = load_samples(folder)
    found = scores(runs_of(judged, len(report["conditions"])))
    return {name: found[name].mean for name in ("exact_set", "second_judge", "both")}


def table(results: list[dict], kind: str):
    """One row for each scale and interval of `kind`, "guidance" or "negative"."""
    print(f"| {kind} scale | interval | accuracy | exact set | second judge | both |\n" + "|---" * 6 + "|")
    for result in results:
        low, high = result[f"{kind}_interval"]
        scores = " | ".join(f"{result[n]:.4f}" for n in ("accuracy", "exact_set", "second_judge", "both"))
        print(f"| {result[f'{kind}_scale']:g} | {low:g} to {high:g} | {scores} |")


def draw(results: list[dict], kind: str, path: Path):
    """The scores by scale, a curve for each interval; all start where the scale changes nothing."""
    unchanged = {"guidance": 1, "negative": 0}[kind]
    results = sorted(results, key=lambda result: result[f"{kind}_scale"])
    start = [result for result in results if result[f"{kind}_scale"] == unchanged]
    others = [result for result in results if result[f"{kind}_scale"] != unchanged]
    figure, sides = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, name in zip(sides, ("accuracy", "both"), strict=True):
        title = {"accuracy": "accuracy", "both": "right for both judges"}[name]
        for interval in sorted({tuple(result[f"{kind}_interval"]) for result in others}):
            rows = start + [result for result in others if tuple(result[f"{kind}_interval"]) == interval]
            scales = [row[f"{kind}_scale"] for row in rows]
            label = f"timesteps {interval[0]:g} to {interval[1]:g}"
            axes.plot(scales, [row[name] for row in rows], marker="o", label=label)
        axes.set(xlabel=f"{kind} scale", ylabel=f"{title}, validation.json")
        axes.grid(alpha=0.3)
    sides[0].legend()
    figure.savefig(path, dpi=90)


def compare(argv: list[str] | None, description: str, kind: str, runs: list[tuple[float, int, int]], common: list):
    """Sample with each scale and interval (low, high) of `kind` and the `common` options; draw and print. `argv`: as
    for `sweep`."""
    options = {}
    for scale, low, high in runs:
        own = [f"--{kind}-scale", scale, f"--{kind}-interval", low, high]
        options[f"{scale:g} {low} {high}"] = own + common
    results, figure_path = sweep(argv, description, options, judge_twice)
    draw(results, kind, figure_path)
    table(results, kind)


@command
def main(argv: list[str] | None = None):
    compare(argv, __doc__.split("\n")[0], "guidance", RUNS, ["--seed", 100, "--seeds", 2])


if __name__ == "__main__":
    main()
