"""At which timesteps pictures go wrong: how many right pictures stay right if they get noise and are denoised again.

    python benchmarks/checks/check_noised.py weights/small

Each row takes the same hard pictures of data/held_out.npz (three objects, two or three of them in one colour), adds the
noise of its timestep, and samples from there with the label of the picture (SDEdit, arXiv 2108.01073). The noisy
picture comes from a right one, so a mistake is made below that timestep. Guidance and negative prompting are those of
the weights, if not given; the sampler is always DPM-Solver++ with 15 steps. Two minutes on two cores without guidance.
"""

import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from checkpoint import load_weights
from data.pack import HELD_OUT
from dataset import ICLEVRDataset, to_float, to_uint8
from diffusion import Negatives, Network, guided_prediction, make_scheduler
from infra.commands import ROOT, Parser, command, number, to_path
from infra.device import choose_setup, join_processes, prepare
from lab import load_evaluator
from label_files import load_objects
from labels import hard_negatives, pairs_of_one_colour
from options import PRECISIONS, RANGES
from report.metrics import judge, measure

STEPS = 15  # of DPM-Solver++, from pure noise
FIRST_STEPS = (1, 4, 7, 10)  # with which the rows begin
BATCH_SIZE = 32
GUIDANCE = ("guidance_scale", "guidance_interval", "negative_scale", "negative_interval")  # the options looked at
COLUMNS = {"accuracy": "accuracy", "exact_set": "exact set", "second_judge": "second judge", "both": "both"}


@torch.inference_mode()
def denoise(
    network: Network,
    noise_scheduler: DDPMScheduler,
    clean: torch.Tensor,
    labels: torch.Tensor,
    first_step: int,
    negatives: list[torch.Tensor],
    options: dict,
) -> tuple[int, torch.Tensor]:
    """Add the noise of a step's timestep to clean pictures [N, 3, 64, 64] in [-1, 1] and sample from that step on: the
    timestep, and what becomes of them."""
    is_guided = options["guidance_scale"] != 1 or options.get("negative_scale", 0) > 0
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    parts = []
    for start in range(0, len(clean), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        scheduler = make_scheduler(noise_scheduler, "dpmsolver++", STEPS)
        scheduler.set_begin_index(first_step)
        own = Negatives(negatives[part], labels.device)
        remaining = scheduler.timesteps[first_step:]
        images = noise_scheduler.add_noise(clean[part], noise[part].to(labels.device), remaining[:1])
        for timestep in remaining:
            timesteps = torch.full((len(images),), timestep.item(), device=labels.device)
            if is_guided:
                prediction = guided_prediction(network, images, timesteps, labels[part], own, **options)
            else:
                prediction = network(images, timesteps, labels[part])
            images = scheduler.step(prediction, timestep, images).prev_sample
        parts.append(images)
    return remaining[0].item(), torch.cat(parts).clamp(-1, 1)


@command
def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=to_path, help="folder of weights, or of a run")
    parser.add_argument("--num-images", type=number(int, 1), default=128, help="default: %(default)s")
    parser.add_argument("--mixed-precision", choices=PRECISIONS, help="default: what is fastest here")
    for name in GUIDANCE:
        count = 2 if name.endswith("_interval") else None
        kind = number(float, *RANGES[name])
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs=count, help="default: that of the weights")
    args = parser.parse_args(argv)
    model, noise_scheduler, metadata = load_weights(args.weights)
    given = {name: value for name, value in vars(args).items() if value is not None}
    options = metadata["sampling"] | given
    options = {name: options[name] for name in GUIDANCE if name in options}
    setup = choose_setup(join_processes(), args.mixed_precision, 0, training=False)
    network, _ = prepare(model, setup)
    evaluator = load_evaluator(None, setup.device)
    objects = load_objects()

    data = ICLEVRDataset(HELD_OUT, ROOT / "train.json", objects)
    hard = [i for i, condition in enumerate(data.conditions) if len(condition) == 3 and pairs_of_one_colour(condition)]
    hard = hard[: args.num_images]
    right = judge(data.images[hard], [data.conditions[i] for i in hard], evaluator).both.tolist()
    kept = [i for i, is_right in zip(hard, right, strict=True) if is_right]
    conditions = [data.conditions[i] for i in kept]
    clean = to_float(data.images[kept]).to(setup.device)
    labels = data.labels[kept].to(setup.device)
    negatives = [hard_negatives(condition, objects) for condition in conditions]
    print(f"{args.weights}, {len(kept)} pictures, {options}\n\n| noise of timestep | {' | '.join(COLUMNS.values())} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for first_step in FIRST_STEPS:
        timestep, images = denoise(network, noise_scheduler, clean, labels, first_step, negatives, options)
        found = measure(judge(to_uint8(images).cpu(), conditions, evaluator))
        print(f"| {timestep} | {' | '.join(f'{found[name]:.3f}' for name in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
