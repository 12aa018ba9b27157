"""Accuracy against sampling steps: a table in Markdown and a figure.

    python benchmarks/studies/steps.py --weights DIR --out docs/steps   # docs/steps.json and .png, in half an hour

On validation.json, so that a sampler may be chosen by it; with 1000 steps only on its first 32 conditions.
What docs/steps.json already holds is not sampled again.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sample
from checkpoint import SHIPPED, WEIGHTS_NAME
from evaluator import default_weights
from infra.commands import Parser, command
from infra.files import file_sha256, load_json, write_json

RUNS = {  # options of sample.py
    f"{sampler} {steps}": ["--sampler", sampler, "--steps", steps, "--seeds", 2]
    for sampler in ("ddim", "dpmsolver++", "unipc")
    for steps in (5, 10, 15, 20, 30)
}
RUNS["ddpm 100"] = ["--sampler", "ddpm", "--steps", 100, "--seeds", 1]
RUNS["ddpm 1000"] = ["--sampler", "ddpm", "--steps", 1000, "--num-images", 32]


def sweep(
    argv: list[str] | None, description: str, runs: dict[str, list], measure: Callable | None = None
) -> tuple[list, Path]:
    """Sample validation.json once for each of `runs`, key -> options of sample.py. Reads --weights, --out, --figures
    from `argv`. Returns the reports, in the order of `runs`, and the path of the figure. Raises InputError.

    Reports are kept in a file; what it holds of these weights is not sampled again. `measure(folder)`, where
    given, looks at the folder of pictures and returns what to add to the report.
    """
    parser = Parser(description=description)
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="default: those that ship")
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without .json and .png")
    parser.add_argument("--figures", action="store_true", help="only the table and the figure of what --out holds")
    args = parser.parse_args(argv)
    path = Path(f"{args.out}.json")
    if args.figures:
        results = load_json(path)["results"]
    else:
        stored = stored_results(path, args.weights)
        results = stored["results"]
        for key, options in runs.items():
            if key not in results:
                results[key] = paint(args.weights, options, measure)
                write_json(path, stored)
    return [results[key] for key in runs if key in results], Path(f"{args.out}.png")


def stored_results(path: Path, weights: Path) -> dict:
    """What a study's file holds, with its `results` if they are of these weights and this evaluator, else none."""
    judged = {"weights_sha256": file_sha256(weights / WEIGHTS_NAME), "evaluator_sha256": file_sha256(default_weights())}
    if path.exists():
        stored = load_json(path)
        if all(stored.get(name) == value for name, value in judged.items()):
            return stored
    return {**judged, "results": {}}


def paint(weights: Path, options: list, measure: Callable | None) -> dict:
    """Sample validation.json with `options` of sample.py; its report, and what `measure` adds."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        argv = ["--mode", "validation", "--weights", weights, "--out", folder, *options]
        sample.main([str(a) for a in argv])
        report = json.loads(Path(folder, "validation.json").read_text())
        if measure:
            report.update(measure(Path(folder, "validation")))
    for name in ("weights", "evaluator", "conditions"):
        del report[name]
    return report


def table(results: list[dict]) -> str:
    """Rows of steps, columns of samplers, mean and standard deviation over the seeds."""
    cells = {}
    for result in results:
        deviation = result["standard_deviation"]
        spread = f" ± {deviation:.3f}" if deviation is not None else ""
        cells[result["sampler"], result["steps"]] = f"{result['accuracy']:.3f}{spread}"
    samplers = list(dict.fromkeys(result["sampler"] for result in results))
    lines = [f"| steps | {' | '.join(samplers)} |", "|---" * (len(samplers) + 1) + "|"]
    for steps in sorted({result["steps"] for result in results}):
        lines.append(f"| {steps} | {' | '.join(cells.get((s, steps), '') for s in samplers)} |")
    return "\n".join(lines)


def draw(results: list[dict], path: Path):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for sampler in dict.fromkeys(result["sampler"] for result in results):
        rows = [result for result in results if result["sampler"] == sampler]
        steps = [row["steps"] for row in rows]
        accuracies = [row["accuracy"] for row in rows]
        deviations = [row["standard_deviation"] or 0 for row in rows]
        axes.errorbar(steps, accuracies, deviations, marker="o", capsize=3, label=sampler)
    axes.set(xlabel="steps", ylabel="accuracy on validation.json", xscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=90)


@command
def main(argv: list[str] | None = None):
    results, figure_path = sweep(argv, __doc__.split("\n")[0], RUNS)
    draw(results, figure_path)
    print(table(results))


if __name__ == "__main__":
    main()
