"""Scale and interval of negative prompting against two judges: a table in Markdown and a figure.

    python benchmarks/studies/negatives.py --weights DIR --out docs/negatives   # docs/negatives.json and .png

The negatives are labels in which two objects of one colour have the same shape. On validation.json, seeds 100
to 103, so that scale and interval may be chosen by it. What docs/negatives.json already holds is not sampled
again. Ten minutes on two cores.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from infra.commands import command
from studies.guidance import compare

RUNS = [(0.0, 0, 1000)]  # negative scale, interval
RUNS += [(scale, low, high) for low, high in ((500, 800), (350, 1000)) for scale in (2.0, 4.0, 6.0, 8.0)]


@command
def main(argv: list[str] | None = None):
    compare(argv, __doc__.split("\n")[0], "negative", RUNS, ["--seed", 100, "--seeds", 4])


if __name__ == "__main__":
    main()
