"""Paint the scenes of a label list with a trained model and score them.

python sample.py --mode test           # images/test/0.png ..., images/test.png, images/test.json, accuracy
python sample.py --mode new_test
python sample.py --mode my_list.json --weights runs/reference --steps 50 --sampler ddim
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from checkpoint import SHIPPED, load_weights, newest_weights
from dataset import (
    IMAGE_SIZE,
    ROOT,
    InputError,
    command,
    load_conditions,
    load_objects,
    multi_hot,
    number,
    to_float,
    to_uint8,
)  # fmt: skip
from evaluator import evaluation_model
from model import ConditionalUNet

# `from_config` does not carry `clip_sample` to the last two: thresholding at 1 clamps x_0 just so.
_CLAMP = {"thresholding": True, "sample_max_value": 1.0}
SAMPLERS = {
    "ddpm": (DDPMScheduler, {}),  # arXiv 2006.11239
    "ddim": (DDIMScheduler, {}),  # arXiv 2010.02502, eta 0
    "dpmsolver++": (DPMSolverMultistepScheduler, _CLAMP | {"lambda_min_clipped": -5.1}),  # arXiv 2211.01095
    "unipc": (UniPCMultistepScheduler, _CLAMP),  # arXiv 2302.04867
}


@torch.no_grad()
def generate(
    model: ConditionalUNet,
    noise_scheduler: DDPMScheduler,
    labels: torch.Tensor,
    seeds: list[int],
    sampler: str,
    steps: int,
    guidance_scale: float,
    progress: bool = False,
) -> torch.Tensor:
    """Samples [B, 3, 64, 64] in [-1, 1] for multi-hot labels [B, 24], on the device of `labels`.

    Each picture draws its noise from its own seed, so it does not depend on its neighbours in the batch.
    `guidance_scale` w: unconditional + w (conditional - unconditional) prediction (arXiv 2207.12598); at 1
    the unconditional one is not computed.
    """
    scheduler_class, options = SAMPLERS[sampler]
    scheduler = scheduler_class.from_config(noise_scheduler.config, **options)
    scheduler.set_timesteps(steps, device=labels.device)
    generators = [
        torch.Generator().manual_seed(seed) for seed in seeds
    ]  # on CPU: the same noise on any device
    noise_source = {"generator": generators} if sampler == "ddpm" else {}  # the others draw none
    images = randn_tensor(
        (len(labels), 3, IMAGE_SIZE, IMAGE_SIZE), generator=generators, device=labels.device
    )
    for t in tqdm(scheduler.timesteps, disable=not progress, unit="step", leave=False):
        inputs = scheduler.scale_model_input(images, t)
        if guidance_scale == 1:
            prediction = model(inputs, t.expand(len(inputs)), labels)
        else:
            both = torch.cat([torch.zeros_like(labels), labels])
            unconditional, conditional = model(
                torch.cat([inputs, inputs]), t.expand(2 * len(inputs)), both
            ).chunk(2)  # fmt: skip
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        images = scheduler.step(prediction, t, images, **noise_source).prev_sample
    return images.clamp(-1, 1)


def picture_seed(seed: int, index: int) -> int:
    """The seed of picture `index` of a run with `seed`."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)


def save_pictures(images: torch.Tensor, folder: Path, grid: Path):
    """Write uint8 images [N, 3, 64, 64] as `folder`/0.png ... and as one grid, 8 a row."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        if old.stem.isdigit() and int(old.stem) >= len(images):
            old.unlink()  # of a longer list: they would pass for pictures of this one
    for i, image in enumerate(images):
        to_pil_image(image).save(folder / f"{i}.png")
    to_pil_image(make_grid(images, nrow=8)).save(grid)


def describe(folder: Path, metadata: dict) -> str:
    seen = metadata["pictures_seen"]
    epoch = metadata["data"]["labelled"]
    line = f"weights: {folder} ({metadata['model']}, trained on {seen:,} pictures"
    if seen < epoch:
        line += f", less than one epoch of {epoch:,}; trained ones ship in {SHIPPED.relative_to(ROOT)}"
    return line + ")"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mode", required=True, help="test, new_test, validation, or a file like test.json")
    parser.add_argument(
        "--weights", type=Path, help="folder (default: the newest run, else the weights that ship)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("images"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: what the weights were made for")
    parser.add_argument(
        "--steps", type=number(int, 1, 1000), help="denoising steps, 1 to 1000 (default: as above)"
    )
    parser.add_argument(
        "--guidance-scale", type=number(float, 0, 100), help="1: no guidance (default: as above)"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="default: %(default)s")
    parser.add_argument(
        "--seeds",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="sample and score N times, "
        "with --seed and those after it; pictures of the first are written (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), default=64, help="pictures at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--evaluator", type=Path, help="default: checkpoint.pth if it is there, else weights/evaluator.pth"
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None):
    args = parse_args(argv)
    accelerator = Accelerator()
    folder = args.weights or newest_weights()
    model, noise_scheduler, metadata = load_weights(folder)
    print(describe(folder, metadata))
    options = {"sampler": args.sampler, "steps": args.steps, "guidance_scale": args.guidance_scale}
    options = metadata["sampling"] | {name: value for name, value in options.items() if value is not None}

    objects = load_objects()
    known = ROOT / f"{args.mode}.json"
    labels_path = known if known.exists() else Path(args.mode)
    conditions = load_conditions(labels_path, objects)
    target = args.out / labels_path.stem  # folder of pictures; grid and report beside it
    if target.with_suffix(".json").resolve() == labels_path.resolve():
        raise InputError(f"{labels_path}: the report of this list would overwrite it; choose another --out")
    labels = multi_hot(conditions, objects)  # [N, 24]
    seeds = [
        picture_seed(seed, i) for seed in range(args.seed, args.seed + args.seeds) for i in range(len(labels))
    ]
    wanted = labels.repeat(args.seeds, 1).to(accelerator.device)  # [seeds * N, 24]
    evaluator = evaluation_model(args.evaluator, accelerator.device)

    model.to(accelerator.device).eval()
    images = []
    for i in range(0, len(wanted), args.batch_size):
        batch = slice(i, i + args.batch_size)
        images.append(generate(model, noise_scheduler, wanted[batch], seeds[batch], **options, progress=True))
    images = to_uint8(torch.cat(images)).cpu().split(len(labels))  # for each seed [N, 3, 64, 64]
    save_pictures(images[0], target, target.with_suffix(".png"))
    # Scored are the 8-bit pictures as written, so `python evaluator.py` on the folder gives the same digits.
    accuracies = [evaluator.eval(to_float(pictures), labels) for pictures in images]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies) if args.seeds > 1 else None
    report = {"accuracy": mean, "standard_deviation": deviation, "accuracies": accuracies, "seed": args.seed}
    report |= {
        "labels": labels_path.name,
        **options,
        "weights": str(folder),
        "evaluator": str(evaluator.path),
    }
    report |= {"model": metadata["model"], "pictures_seen": metadata["pictures_seen"]}
    target.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"pictures: {target}/0.png to {len(labels) - 1}.png, grid: {target.with_suffix('.png')}")
    print(f"evaluator: {evaluator.path}; {json.dumps(options)}")
    spread = f" (mean of {args.seeds} seeds, standard deviation {deviation:.4f})" if args.seeds > 1 else ""
    print(f"accuracy: {mean:.4f}{spread}")


if __name__ == "__main__":
    main()
