"""How hard to push away from two objects of a colour having one shape, by two judges: a table in Markdown.

    python benchmarks/negatives.py --out docs/negatives   # docs/negatives.json, docs/negatives.png

On validation.json, seeds 100 to 103, so that scale and interval may be chosen by it. What docs/negatives.json
holds already is not sampled again. Ten minutes on two cores.
"""

import sys
from pathlib import Path

from guidance import draw, table
from steps import sweep

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from metrics import judge_twice, load_samples

SEEDS = 4
INTERVALS = ((500, 800), (350, 1000))
RUNS = [(0.0, (0, 1000)), *((scale, interval) for interval in INTERVALS for scale in (2.0, 4.0, 6.0, 8.0))]


def main():
    runs = {}
    for scale, (low, high) in RUNS:
        negative = ["--negative-scale", scale, "--negative-interval", low, high]
        runs[f"{scale:g} {low} {high}"] = [*negative, "--seed", 100, "--seeds", SEEDS]
    results, figure_path = sweep(
        __doc__.split("\n")[0], runs, lambda folder: judge_twice(*load_samples(folder))
    )
    draw([*results.values()], "negative", figure_path)
    table([*results.values()], "negative")


if __name__ == "__main__":
    main()
