"""Accuracy against sampling steps: a table in Markdown and a figure.

    python benchmarks/studies/steps.py --out docs/steps     # docs/steps.json, docs/steps.png; half an hour on 2 cores

On validation.json, so that a sampler may be chosen by it; with 1000 steps on its first 32 conditions alone.
What docs/steps.json holds already is not sampled again.
"""

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sample
from checkpoint import SHIPPED, WEIGHTS_NAME
from evaluator import default_weights
from infra.files import file_sha256

RUNS = {  # options of sample.py
    f"{sampler} {steps}": ["--sampler", sampler, "--steps", steps, "--seeds", 2]
    for sampler in ("ddim", "dpmsolver++", "unipc")
    for steps in (5, 10, 15, 20, 30)
}
RUNS["ddpm 100"] = ["--sampler", "ddpm", "--steps", 100, "--seeds", 1]
RUNS["ddpm 1000"] = ["--sampler", "ddpm", "--steps", 1000, "--num-images", 32]


def sweep(description: str, runs: dict[str, list], measure=lambda folder: {}) -> tuple[dict[str, dict], Path]:
    """Read --weights and --out, sample validation.json once for each of `runs`, key -> options of sample.py,
    and return key -> report and where the figure belongs.

    Reports are kept in a file; what it holds of these weights is not sampled again. `measure(folder)` adds to
    a report what it finds in the folder of pictures.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="default: those that ship")
    parser.add_argument("--out", type=Path, required=True, help="path of the results, less .json and .png")
    args = parser.parse_args()
    path, weights = Path(f"{args.out}.json"), args.weights
    files = {"weights": weights / WEIGHTS_NAME, "evaluator": default_weights()}
    judged = {f"{name}_sha256": file_sha256(file) for name, file in files.items()}
    stored = json.loads(path.read_text()) if path.exists() else {}
    results = stored["results"] if judged.items() <= stored.items() else {}
    for key in [key for key in runs if key not in results]:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            argv = ["--mode", "validation", "--weights", weights, "--out", folder, *runs[key]]
            sample.main([str(a) for a in argv])
            report = json.loads(Path(folder, "validation.json").read_text())
            report |= measure(Path(folder, "validation"))
        results[key] = {k: v for k, v in report.items() if k not in (*files, "conditions")}
        path.write_text(json.dumps(judged | {"results": results}, indent=1) + "\n")
    return {key: results[key] for key in runs}, Path(f"{args.out}.png")


def table(results: dict[str, dict]) -> str:
    """Rows of steps, columns of samplers, mean and standard deviation over the seeds."""
    cells = {}
    for result in results.values():
        mean, deviation = result["accuracy"], result["standard_deviation"]
        spread = f" ± {deviation:.3f}" if deviation is not None else ""
        cells[result["sampler"], result["steps"]] = f"{mean:.3f}{spread}"
    samplers = list(dict.fromkeys(sampler for sampler, _ in cells))
    lines = [f"| steps | {' | '.join(samplers)} |", "|---" * (len(samplers) + 1) + "|"]
    for steps in sorted({steps for _, steps in cells}):
        lines.append(f"| {steps} | {' | '.join(cells.get((s, steps), '') for s in samplers)} |")
    return "\n".join(lines)


def draw(results: dict[str, dict], path: Path):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for sampler in dict.fromkeys(r["sampler"] for r in results.values()):
        rows = [r for r in results.values() if r["sampler"] == sampler]
        deviations = [r["standard_deviation"] or 0 for r in rows]
        x, y = [r["steps"] for r in rows], [r["accuracy"] for r in rows]
        axes.errorbar(x, y, deviations, marker="o", capsize=3, label=sampler)
    axes.set(xlabel="steps", ylabel="accuracy on validation.json", xscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    results, figure_path = sweep(__doc__.split("\n")[0], RUNS)
    draw(results, figure_path)
    print(table(results))


if __name__ == "__main__":
    main()
