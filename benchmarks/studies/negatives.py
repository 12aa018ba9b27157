"""How hard to push away from two objects of a colour having one shape, by two judges: a table and a figure.

    python benchmarks/studies/negatives.py --out docs/negatives   # docs/negatives.json, docs/negatives.png

On validation.json, seeds 100 to 103, so that scale and interval may be chosen by it. What docs/negatives.json
holds already is not sampled again. Ten minutes on two cores.
"""

from guidance import compare

RUNS = [(0.0, 0, 1000)]  # negative scale, interval
RUNS += [(scale, *interval) for interval in ((500, 800), (350, 1000)) for scale in (2.0, 4.0, 6.0, 8.0)]

if __name__ == "__main__":
    compare(__doc__.split("\n")[0], "negative", RUNS, ["--seed", 100, "--seeds", 4])
