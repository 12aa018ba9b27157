"""What a training step and a sampling step cost a GPU's host: kernels, waits, bytes. Counted, not timed.

    python benchmarks/launches.py                  # two minutes; needs no GPU, but a C compiler
    python benchmarks/launches.py --tree DIR       # the scripts of another checkout of this project

The scripts run uncompiled on a CUDA device that is not there (tests/fakecuda.py). A training step is the
third of a run. A sampling step, of 32 pictures without guidance, is what one step more adds. Prints Markdown.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import fakecuda

CARD = ("NVIDIA H100", 9, 0)


def training_step(train, model: str, folder: Path) -> tuple[int, int, int]:
    argv = ["--model", model, "--data", str(ROOT / "data" / "held_out.npz"), "--out", str(folder / model)]
    argv += ["--max-steps", "9", "--batch-size", "32", "--sample-every", "0", "--save-every", "5"]
    with fakecuda.Cuda(), contextlib.suppress(RuntimeError, SystemExit):  # some trees fail when they save
        train.main(argv)
    third = fakecuda.Steps.last.counts[2]
    return third["kernels"], sum(third["waits"].values()), third["bytes"]


def sampling_step(sample, weights: Path, folder: Path) -> tuple[int, int, int]:
    costs = []
    for steps in ("2", "3"):
        argv = ["--mode", "test", "--weights", str(weights), "--out", str(folder / f"{weights.name}-{steps}")]
        argv += ["--steps", steps, "--sampler", "ddim", "--batch-size", "32"]
        argv += ["--guidance-scale", "1", "--negative-scale", "0"]
        with fakecuda.Cuda() as cuda:
            sample.main(argv)
        costs.append((cuda.kernels.total(), cuda.waits.total(), cuda.bytes))
    return tuple(more - less for less, more in zip(*costs, strict=True))


def count():
    """In the process that has no GPU to see: print the rows."""
    fakecuda.install(*CARD)
    warnings.simplefilter("ignore")  # of tensors without numbers
    sys.path.insert(0, str(Path.cwd()))
    import torch

    import sample
    import train
    from checkpoint import write_weights
    from model import build

    train.tqdm = fakecuda.Steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in ("small", "reference"):
            metadata = {"model": model, "recipe": {}, "data": {"labelled": 1}, "unseen": [], "step": 1}
            metadata |= {"pictures_seen": 1, "sampling": {"sampler": "ddim", "steps": 2, "guidance_scale": 1}}
            torch.manual_seed(0)
            write_weights(folder / "weights" / model, *build(model), metadata)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                rows = {"training step": training_step(train, model, folder)}
                rows["sampling step"] = sampling_step(sample, folder / "weights" / model, folder)
            for what, (kernels, waits, copied) in rows.items():
                print(f"| `{model}` | {what} | {kernels:,} | {waits} | {copied:,} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to count in (default: this one)")
    args = parser.parse_args()
    print("| model | what | kernels | waits | bytes copied |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = fakecuda.environment(Path(folder))
        here = str(Path(__file__).resolve().parent)
        code = f"import sys; sys.path.insert(0, {here!r}); import launches; launches.count()"
        subprocess.run([sys.executable, "-c", code], cwd=args.tree, env=environment, check=True)


if __name__ == "__main__":
    main()
