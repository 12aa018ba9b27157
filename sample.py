"""Paint the scenes of a label list with a trained model and score them.

python sample.py --mode test           # images/test/0.png ..., images/test.png, images/test.json, accuracy
python sample.py --mode new_test
python sample.py --mode my_list.json --weights runs/reference --steps 50 --sampler ddim
accelerate launch sample.py --mode test --num-images 50000   # several GPUs: the same pictures, shared out
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
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
    check_condition,
    command,
    load_conditions,
    load_objects,
    multi_hot,
    number,
    read_picture,
    to_float,
    to_uint8,
    twin_labels,
)
from evaluator import evaluation_model
from model import ConditionalUNet, Setup, choose_setup

# `from_config` does not carry `clip_sample` to the others: thresholding at 1 clamps x_0 just so.
_CLAMP = {"thresholding": True, "sample_max_value": 1.0}
_DPM = _CLAMP | {"lambda_min_clipped": -5.1}
SAMPLERS = {
    "ddpm": (DDPMScheduler, {}),  # arXiv 2006.11239
    "ddim": (DDIMScheduler, {}),  # arXiv 2010.02502, eta 0
    "dpmsolver++": (DPMSolverMultistepScheduler, _DPM),  # arXiv 2211.01095
    "sde-dpmsolver++": (DPMSolverMultistepScheduler, _DPM | {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, _CLAMP),  # arXiv 2302.04867
}
STOCHASTIC = ("ddpm", "sde-dpmsolver++")  # these draw noise on their way; from their mistakes they recover


def prepare(model: ConditionalUNet, setup: Setup) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The network on its device to sample with, plain and compiled; twice the same if not to be compiled."""
    model = model.to(memory_format=setup.memory_format).eval()
    model = Accelerator(mixed_precision=setup.precision).prepare_model(model, evaluation_mode=True)
    if not setup.compile_mode:
        return model, model
    return model, torch.compile(model, mode=setup.compile_mode, dynamic=False)


@torch.no_grad()
def generate(
    model: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    noise_scheduler: DDPMScheduler,
    labels: torch.Tensor,
    seeds: list[int],
    sampler: str,
    steps: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float] = (0, 1000),
    negative_labels: Sequence[torch.Tensor] = (),
    negative_scale: float = 0.0,
    negative_interval: tuple[float, float] = (0, 1000),
    bar: tqdm | None = None,
) -> torch.Tensor:
    """Samples [B, 3, 64, 64] in [-1, 1] for multi-hot labels [B, 24], on the device of `labels`.

    Each picture draws its noise from its own seed, so it does not depend on its neighbours in the batch.
    `guidance_scale` w: unconditional + w (conditional - unconditional) prediction (arXiv 2207.12598), at
    timesteps within `guidance_interval`, bounds included (arXiv 2404.07724); outside of it and for w 1 the
    unconditional one is not computed.

    `negative_labels`: for each picture those [K, 24], K >= 0, of what it might become by mistake. Within
    `negative_interval`, `negative_scale` (conditional - negative) is added, for the negative label whose
    prediction lies nearest to the conditional one: the mistake that the picture is about to make.
    """
    device, count = labels.device, len(labels)
    scheduler_class, options = SAMPLERS[sampler]
    scheduler = scheduler_class.from_config(noise_scheduler.config, **options)
    scheduler.set_timesteps(steps)  # kept on the CPU: a step then waits for nothing on a GPU
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # the same start on any device
    images = randn_tensor((count, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generators).to(device)
    noise_source = {}
    if sampler in STOCHASTIC:
        noise_source["generator"] = [torch.Generator(device).manual_seed(seed + 1) for seed in seeds]
    everyone = torch.arange(count, device=device)
    mistakes = [(i, label) for i, own in enumerate(negative_labels) for label in own]
    mistakes += mistakes[:1] * (-len(mistakes) % count)  # a compiled network wants few sizes of batches
    owners = torch.tensor([i for i, _ in mistakes], dtype=torch.long, device=device)  # [K]
    negatives = (
        torch.stack([label for _, label in mistakes]).to(device) if mistakes else labels[:0]
    )  # [K, 24]
    owned = owners == everyone[:, None]  # [B, K]
    for t in scheduler.timesteps:
        guided = guidance_scale != 1 and guidance_interval[0] <= t <= guidance_interval[1]
        negated = negative_scale > 0 and mistakes and negative_interval[0] <= t <= negative_interval[1]
        parts = {"conditional": (everyone, labels)}
        if guided:
            parts["unconditional"] = (everyone, torch.zeros_like(labels))
        if negated:
            parts["negative"] = (owners, negatives)
        rows, batch_labels = (torch.cat(column) for column in zip(*parts.values(), strict=True))
        inputs, timesteps = scheduler.scale_model_input(images, t), torch.full_like(rows, t.item())
        predictions = model(inputs[rows], timesteps, batch_labels).float()
        predictions = predictions.split([len(part) for part, _ in parts.values()])
        predictions = dict(zip(parts, predictions, strict=True))
        prediction = conditional = predictions["conditional"]
        if guided:
            unconditional = predictions["unconditional"]
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        if negated:
            negative = predictions["negative"]
            distances = (negative - conditional[owners]).square().mean((1, 2, 3))  # [K]
            nearest = torch.where(owned, distances, torch.inf).argmin(1)  # [B]
            away = (conditional - negative[nearest]) * owned.any(1)[:, None, None, None]
            prediction = prediction + negative_scale * away
        images = scheduler.step(prediction, t, images, **noise_source).prev_sample
        if bar is not None:
            bar.update()
    return images.clamp(-1, 1)


def picture_seed(seed: int, index: int) -> int:
    """The seed of picture `index` of a run with `seed`."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)


def batch_size_for(device: torch.device) -> int:
    """Pictures at a time. Guidance doubles it, and more than 32 at once are slower on a CPU."""
    return 16 if device.type == "cpu" else 64


def describe(folder: Path, metadata: dict) -> str:
    seen = metadata["pictures_seen"]
    epoch = metadata["data"]["labelled"]
    line = f"weights: {folder} ({metadata['model']}, trained on {seen:,} pictures"
    if seen < epoch:
        line += f", less than one epoch of {epoch:,}; trained ones ship in {SHIPPED.relative_to(ROOT)}"
    return line + ")"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--mode",
        required=True,
        help="test, new_test, validation, unseen (triples that occur nowhere in what the weights were "
        "trained on), or a file like test.json",
    )
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
    interval = {"type": number(float, 0, 1000), "nargs": 2, "metavar": ("LOW", "HIGH")}
    parser.add_argument(
        "--guidance-interval",
        **interval,
        help="timesteps from LOW (clear) to HIGH (noise) that are guided (default: as above, else 0 1000)",
    )
    parser.add_argument(
        "--negative-scale",
        type=number(float, 0, 100),
        help="push away from two objects of a colour having one shape; 0: do not (default: as above, else 0)",
    )
    parser.add_argument("--negative-interval", **interval, help="timesteps of that (default: likewise)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="default: %(default)s")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--seeds",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="paint the list N times, with --seed and those after it (default: %(default)s)",
    )
    amount.add_argument(
        "--num-images", type=number(int, 1), metavar="N", help="the same, up to N pictures altogether"
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), help="pictures at a time (default: 64, on a CPU 16)"
    )
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), help="default: bf16 on CUDA, else no")
    parser.add_argument(
        "--evaluator", type=Path, help="default: checkpoint.pth if it is there, else weights/evaluator.pth"
    )
    return parser.parse_args(argv)


def load_list(
    mode: str, unseen: list, weights: Path, objects: dict[str, int]
) -> tuple[Path, list[list[str]]]:
    """Label file and conditions that `mode` stands for, given those `unseen` by the weights, which have no
    file. Raises InputError."""
    if mode == "unseen":
        if not unseen:
            raise InputError(f"{weights}: does not tell which triples it has not seen; train it anew")
        where = f"{weights}, unseen, entry"
        return Path(mode), [check_condition(c, objects, f"{where} {i}") for i, c in enumerate(unseen)]
    known = ROOT / f"{mode}.json"
    path = known if known.exists() else Path(mode)
    return path, load_conditions(path, objects)


def score(
    evaluator: evaluation_model, folder: Path, labels: torch.Tensor, count: int, grid: Path
) -> tuple[list[float], list[float]]:
    """Accuracy and exact set of each whole time through the list `labels` [N, 24] in the `count` pictures of
    `folder`, and the first of them as a grid, 8 a row.

    Scored are the pictures as written, so `python evaluator.py` on the folder gives the same digits.
    """
    accuracies, exact_sets = [], []
    for k in range(max(1, count // len(labels))):
        indices = range(k * len(labels), min((k + 1) * len(labels), count))
        images = torch.stack([read_picture(folder / f"{i}.png") for i in indices])  # [N, 3, 64, 64]
        found = evaluator.probabilities(to_float(images))
        accuracies.append(evaluator.compute_acc(found, labels[: len(indices)]))
        exact_sets.append(evaluator.exact_set(found, labels[: len(indices)]))
        if k == 0:
            to_pil_image(make_grid(images, nrow=8)).save(grid)
    return accuracies, exact_sets


@command
def main(argv: list[str] | None = None):
    args, state = parse_args(argv), PartialState()  # the devices and processes there are
    folder = args.weights or newest_weights()
    model, noise_scheduler, metadata = load_weights(folder)
    state.print(describe(folder, metadata))
    names = ("sampler", "steps", "guidance_scale", "guidance_interval", "negative_scale", "negative_interval")
    options = metadata["sampling"] | {n: getattr(args, n) for n in names if getattr(args, n) is not None}

    objects = load_objects()
    labels_path, conditions = load_list(args.mode, metadata.get("unseen", []), folder, objects)
    target = args.out / labels_path.stem  # folder of pictures; grid and report beside it
    report_path, grid_path = target.with_suffix(".json"), target.with_suffix(".png")
    if report_path.resolve() == labels_path.resolve():
        raise InputError(f"{labels_path}: the report of this list would overwrite it; choose another --out")
    labels = multi_hot(conditions, objects)  # [N, 24]
    twins = [twin_labels(condition, objects) for condition in conditions]
    # Picture i shows condition i % N, with the seed that follows for each time through the list.
    wanted = range(args.num_images or args.seeds * len(labels))
    size = args.batch_size or batch_size_for(state.device)
    size = min(size, math.ceil(len(wanted) / state.num_processes))
    batches = [wanted[i : i + size] for i in range(0, len(wanted), size)]
    mine = batches[state.process_index :: state.num_processes]
    evaluator = evaluation_model(args.evaluator, state.device)

    passes = options["steps"] * len(mine)
    setup = choose_setup(state.device, args.mixed_precision, passes, training=False)
    state.print(setup)
    eager_model, compiled_model = prepare(model, setup)
    if state.is_main_process:
        target.mkdir(parents=True, exist_ok=True)
        for old in [report_path, grid_path, *target.glob("*.png")]:
            if old.parent != target or old.stem.isdigit():
                old.unlink(missing_ok=True)  # of an earlier list: they would pass for pictures of this one
    state.wait_for_everyone()

    start = time.perf_counter()
    with tqdm(total=passes, unit="step", disable=not state.is_main_process, leave=False) as bar:
        for indices in mine:
            # Compiling once more for a smaller last batch would not pay.
            network = compiled_model if len(indices) == size else eager_model
            rows = [i % len(labels) for i in indices]
            seeds = [picture_seed(args.seed + i // len(labels), i % len(labels)) for i in indices]
            wanted_labels, negatives = labels[rows].to(state.device), [twins[i] for i in rows]
            images = generate(
                network, noise_scheduler, wanted_labels, seeds, **options, negative_labels=negatives, bar=bar
            )
            for i, image in zip(indices, to_uint8(images).cpu(), strict=True):
                to_pil_image(image).save(target / f"{i}.png")
    state.wait_for_everyone()
    seconds = time.perf_counter() - start
    if not state.is_main_process:
        return

    accuracies, exact_sets = score(evaluator, target, labels, len(wanted), grid_path)
    mean = statistics.mean(accuracies)
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    report = {"accuracy": mean, "standard_deviation": deviation, "exact_set": statistics.mean(exact_sets)}
    report |= {"accuracies": accuracies, "exact_sets": exact_sets, "seed": args.seed}
    report |= {"labels": labels_path.name, "num_images": len(wanted), **options, "precision": setup.precision}
    report |= {"weights": str(folder), "model": metadata["model"], "pictures_seen": metadata["pictures_seen"]}
    report |= {"evaluator": str(evaluator.path), "seconds": round(seconds, 2)}
    report |= {"conditions": conditions}
    report_path.write_text(json.dumps(report, indent=1) + "\n")
    rate = f"{seconds:.1f} s, {len(wanted) / seconds:.2f} a second"
    print(f"pictures: {target}/0.png to {wanted[-1]}.png ({rate}), grid: {grid_path}")
    print(f"evaluator: {evaluator.path}; {json.dumps(options)}")
    runs = len(accuracies)
    spread = f" (mean of {runs} seeds, standard deviation {deviation:.4f})" if deviation is not None else ""
    print(f"accuracy: {mean:.4f}{spread}, exact set: {report['exact_set']:.4f}")


if __name__ == "__main__":
    main()
