"""Score the newest checkpoint of a long training, and keep it as a point of docs/study/results.json.

    python benchmarks/studies/long_run.py ~/iclevr-runs/reference
    python benchmarks/studies/long_run.py runs/reference --sampler ddpm --steps 1000 --seeds 1

Called now and then while a training goes on, it gives accuracy against pictures seen. On validation.json.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from checkpoint import load_metadata, newest
from infra.commands import command
from infra.files import load_json, write_json
from studies.measure_row import machine, measure, write_grid


@command
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "study" / "results.json")
    parser.add_argument("--sampler", default="dpmsolver++")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-images", type=int, help="in place of --seeds: only so many pictures")
    args = parser.parse_args(argv)
    weights = newest(args.run)
    metadata = load_metadata(weights)
    amount = ["--num-images", args.num_images] if args.num_images else ["--seeds", args.seeds]
    point = {
        "row": metadata["model"],
        "pictures": metadata["pictures_seen"],
        "sampler": args.sampler,
        "steps": args.steps,
        "num_images": args.num_images or 64 * args.seeds,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        point = point | measure(weights, images, ["--sampler", args.sampler, "--steps", args.steps, *amount])
        write_grid(images / "validation", Path(folder, "grid.png"))
        name = f"long-{point['row']}-{point['pictures']}-{args.steps}-steps.png"
        args.results.with_name("grids").mkdir(exist_ok=True)
        shutil.copy(Path(folder, "grid.png"), args.results.with_name("grids") / name)
    # Read now: the study may have added rows meanwhile.
    results = load_json(args.results)
    results.setdefault("long_runs", []).append(point)
    write_json(args.results, results)
    print(point)


if __name__ == "__main__":
    main()
