"""Train a conditional DDPM on i-CLEVR.

    python train.py                               # the reference recipe; wants a CUDA GPU
    python train.py --model small                 # a model for two CPU cores
    accelerate launch train.py                    # several GPUs: the same batches, shared out

The same command again goes on where the run in --out stopped. Denoising diffusion (Ho et al., arXiv
2006.11239) with a multi-hot label; presets may add velocity prediction (arXiv 2202.00512) and
classifier-free guidance (arXiv 2207.12598).
"""

import argparse
from pathlib import Path

from infra.commands import ROOT, InputError, Parser, command, number, read_early, to_path, to_seed
from options import OPTIMIZERS, PRECISIONS, PRESETS


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Train a conditional DDPM on i-CLEVR.")
    add = parser.add_argument_group("run").add_argument
    add("--model", choices=PRESETS, default="reference", help="preset (default: %(default)s)")
    add("--data", type=to_path, help="folder or .npz of pictures (default: iclevr/, else what ships)")
    add("--labels", type=to_path, default=ROOT / "train.json", help="label file (default: train.json)")
    add("--out", type=to_path, help="folder of the run (default: runs/<model>)")
    add("--init", type=to_path, metavar="DIR", help="start from these weights, with a new optimizer")
    add("--seed", type=to_seed, default=0, help="default: %(default)s")
    add("--dry-run", action="store_true", help="print what would be trained on what, and stop")
    add("--mixed-precision", choices=PRECISIONS, help="default: what is fastest here")

    add = parser.add_argument_group("recipe (defaults: the preset's)").add_argument
    add("--epochs", type=number(float, 1e-6), help="passes over the pictures")
    add("--max-steps", type=number(int, 1), help="optimizer steps, in place of --epochs")
    add("--batch-size", type=number(int, 1), help="pictures at a time, over all processes")
    add("--grad-accum", type=number(int, 1), default=1, help="batches per step (default: 1)")
    add("--learning-rate", "--lr", type=number(float, 0))
    add("--lr-schedule", choices=("constant", "linear"), help="linear: down to 0 at the end")
    add("--warmup-steps", type=number(int, 0), help="linear warm-up of the learning rate")
    add("--ema-decay", type=number(float, 0, 1), help="of the averaged weights; 0: none")
    add("--label-dropout", type=number(float, 0, 1), help="share trained without label")
    add("--optimizer", choices=OPTIMIZERS)
    add("--timestep-sampling", choices=("uniform", "logit-normal"))

    add = parser.add_argument_group("output").add_argument
    add("--save-every", type=number(int, 1), metavar="STEPS", help="default: every 10 minutes, at the end")
    add("--sample-every", type=number(int, 0), default=1000, metavar="STEPS", help="default: 1000; 0: never")
    add("--log-with", choices=("tensorboard", "wandb"), help="besides <out>/log.jsonl")
    args = parser.parse_args(argv)
    for name, value in PRESETS[args.model]["training"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs", args.model)
    return args


if __name__ == "__main__":
    read_early(parse_args)

import copy
import functools
import json
import math
import signal
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torchvision.utils import make_grid
from tqdm import tqdm

import checkpoint
from dataset import ICLEVRDataset, load_data, to_float, to_uint8
from diffusion import generate, picture_seed
from infra import tracking
from infra.device import Setup, choose_setup, explained, join_processes, new_accelerator
from infra.files import lock, text_sha256
from infra.watch import Watch
from labels import load_conditions, load_labels, load_objects, multi_hot, twin_labels, unseen_triples
from model import build
from muon import Muon
from options import NUM_OBJECTS

OPTIMIZER_CLASSES = {"adamw": functools.partial(torch.optim.AdamW, fused=True), "muon": Muon}
SAVE_EVERY = 600  # seconds, without --save-every


def seed_of(*key: int) -> int:
    """One 64-bit seed from several numbers: what is drawn at a step depends on (seed, step) alone."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@functools.lru_cache(maxsize=2)  # the same for all steps of an epoch
def epoch_order(epoch: int, size: int, seed: int) -> torch.Tensor:
    """The order [size] of the pictures in an epoch."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(seed, epoch, 1)))


def batch_indices(step: int, batch_size: int, size: int, seed: int) -> torch.Tensor:
    """Indices [batch_size] of the pictures of a step.

    Epochs follow each other without a gap, each a permutation of its own, so every picture is seen equally
    often and every batch is full.
    """
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    indices = torch.empty_like(positions)
    for epoch in torch.unique(positions // size).tolist():
        inside = positions // size == epoch
        indices[inside] = epoch_order(epoch, size, seed)[positions[inside] % size]
    return indices


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up from 0, then constant, or linear down to 0 at the last step."""
    warmup = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    decay = 1 - step / args.max_steps if args.lr_schedule == "linear" else 1.0
    return args.learning_rate * warmup * decay


def recipe_of(args: argparse.Namespace) -> dict:
    """What decides the result of a run, but for rounding: it may not change when the run goes on."""
    names = ["model", "seed", "mixed_precision", *PRESETS[args.model]["training"]]
    recipe = {name: getattr(args, name) for name in names if name not in ("epochs", "batch_size")}
    recipe["batch_size * grad_accum"] = args.batch_size * args.grad_accum
    if args.lr_schedule != "constant":
        recipe["max_steps"] = args.max_steps
    return recipe | {"init": str(args.init) if args.init else None}


def announce(
    args: argparse.Namespace,
    data: ICLEVRDataset,
    model: torch.nn.Module,
    setup: Setup,
    accelerator: Accelerator,
    steps: int,
):
    """Say what will be trained and how, and without CUDA how long the `steps` that are left take, measured on
    four pictures."""
    device, millions = accelerator.device, sum(p.numel() for p in model.parameters()) / 1e6
    of_all = "" if len(data) == data.total else f"of {data.total:,} "
    print(f"{args.model}: {millions:.2f}M parameters, {args.data}: {len(data):,} {of_all}pictures")
    print(setup)
    print(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}))
    if device.type != "cuda":
        images, timesteps = torch.zeros(4, 3, 64, 64, device=device), torch.zeros(4, device=device)
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            with accelerator.autocast():
                prediction = model(images, timesteps, torch.zeros(4, NUM_OBJECTS, device=device))
            prediction.float().square().mean().backward()
            seconds = (time.perf_counter() - start) / 4
        model.zero_grad()
        pictures = steps * args.batch_size * args.grad_accum / accelerator.num_processes
        hours = seconds * pictures / 3600
        hint = "" if args.model == "small" else "; --model small is made for this"
        duration = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
        print(f"no CUDA: {steps:,} steps will take about {duration} here{hint}")


def is_due(done: int, every: int, args: argparse.Namespace) -> bool:
    """Every `every` steps and at the end; never if 0."""
    return every > 0 and (done % every == 0 or done == args.max_steps)


def is_time_to_save(done: int, last_saved: float, args: argparse.Namespace) -> bool:
    """As --save-every says, else after SAVE_EVERY seconds and at the end."""
    if args.save_every:
        return is_due(done, args.save_every, args)
    return done == args.max_steps or time.monotonic() - last_saved >= SAVE_EVERY


def sample_grid(
    out: Path, step: int, model: torch.nn.Module, noise_scheduler, sampling: dict, accelerator: Accelerator
):
    """Paint eight validation conditions from the same noise each time: a quick look, with few steps, for the
    run's folder and for trackers."""
    conditions = load_conditions(ROOT / "validation.json", objects := load_objects())[::8]
    labels = multi_hot(conditions, objects).to(accelerator.device)
    negatives = [twin_labels(condition, objects) for condition in conditions]
    seeds = [picture_seed(0, i) for i in range(len(labels))]
    model.eval()
    options = sampling | {"sampler": "dpmsolver++", "steps": 15}
    try:
        with accelerator.autocast():
            images = generate(model, noise_scheduler, labels, seeds, **options, negative_labels=negatives)
    except FloatingPointError as error:  # which the loss may not show
        print(f"{out}: no sample grid of step {step:,}: {error}")
        return
    finally:
        model.train()
    grid = make_grid(to_uint8(images).cpu(), nrow=8)
    (out / "samples").mkdir(exist_ok=True)
    checkpoint.write_picture(out / "samples" / f"{step:07d}.png", grid)
    tracking.log_grid(accelerator, grid, step)


@contextmanager
def disk_errors(out: Path):
    """Say in an InputError how to go on where the disk ended a run."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{out}: {error}; the same command goes on from the last checkpoint") from None


def smaller_batch(args: argparse.Namespace, processes: int) -> str:
    """What to try where a batch did not fit into memory."""
    share = args.batch_size // processes
    parts = next((n for n in range(2, share + 1) if share % n == 0), None)
    line = f"with --batch-size {args.batch_size}; "
    if not parts:
        return line + "not even one picture at a time fits"
    smaller = f"--batch-size {args.batch_size // parts} --grad-accum {args.grad_accum * parts}"
    return f"{line}try {smaller}, which gives the same result"


# --------------------------------------------------------------------------------------------------- training


def train(
    args: argparse.Namespace,
    data: ICLEVRDataset,
    model: torch.nn.Module,
    noise_scheduler: DDPMScheduler,
    metadata: dict,
    setup: Setup,
    accelerator: Accelerator,
    stop: list[int],
):
    """Train `model` in args.out, from its newest checkpoint on, until the last step or until `stop` holds a
    signal. `metadata`: what checkpoints are to say of the run, but for the step."""
    device, is_main, processes = accelerator.device, accelerator.is_main_process, accelerator.num_processes
    ema_model = copy.deepcopy(model).requires_grad_(False) if args.ema_decay else model
    bare_model = model  # not wrapped for several processes, not compiled
    bare_optimizer = OPTIMIZER_CLASSES[args.optimizer](model.parameters(), lr=args.learning_rate)
    model, optimizer = accelerator.prepare(bare_model, bare_optimizer)
    first_step, losses, pictures_before = 0, [], metadata["pictures_seen"]
    if checkpoint.checkpoints(args.out):  # after prepare, which moves all that an optimizer has to the device
        newest = checkpoint.newest(args.out)
        state = (bare_model, ema_model, bare_optimizer, accelerator.scaler)
        before = checkpoint.resume(newest, *state, metadata)
        first_step, losses = before["step"], before["losses"]
        if first_step >= args.max_steps:
            further = f"to train it further: --init {args.out} --out {args.out}-2"
            accelerator.print(f"{args.out}: was finished, with {first_step:,} steps; {further}")
            return
        accelerator.print(f"{args.out}: goes on at step {first_step:,} of {args.max_steps:,}")
    if setup.compile_mode:
        model = torch.compile(model, mode=setup.compile_mode, dynamic=False)
    run_id = checkpoint.begin(args.out, metadata) if is_main else None
    tracking.start(args, accelerator, run_id, first_step)
    # Fused AdamW skips a step for which `found_inf` is 1, and fp16's gradient scaler one that overflows: the
    # numbers of a step can then be read one step late.
    skips_by_itself = args.optimizer == "adamw" or accelerator.scaler is not None
    watch = Watch(args, data.filenames, accelerator, 1 if skips_by_itself else 0, first_step, losses)
    images, labels = data.images.to(device), data.labels.to(device)  # uint8 [N, 3, 64, 64], float32 [N, 24]
    batch_size = args.batch_size * args.grad_accum  # of a step, over all processes
    num_timesteps, steps = noise_scheduler.config.num_train_timesteps, range(first_step, args.max_steps)
    last_saved = time.monotonic()

    with tqdm(steps, initial=first_step, total=args.max_steps, disable=not is_main, unit="step") as watch.bar:
        for step in watch.bar:
            # All draws of a step follow from (seed, step). Every process draws the whole batch and works on
            # its share, so the number of processes changes nothing.
            torch.manual_seed(seed_of(args.seed, step))
            indices = batch_indices(step, batch_size, len(images), args.seed)
            batch = indices.to(device, non_blocking=True)
            clean, label = to_float(images[batch]), labels[batch]  # [B, 3, 64, 64] in [-1, 1], [B, 24]
            noise = torch.randn_like(clean)
            timesteps = torch.randint(num_timesteps, (batch_size,), device=device)
            if args.timestep_sampling == "logit-normal":  # more of the middle (arXiv 2403.03206, section 3.1)
                timesteps = (num_timesteps * torch.randn(batch_size, device=device).sigmoid()).long()
            label = label * (torch.rand(batch_size, 1, device=device) >= args.label_dropout)  # zeros: none
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            target = noise
            if noise_scheduler.config.prediction_type == "v_prediction":
                target = noise_scheduler.get_velocity(clean, noise, timesteps)

            rate = learning_rate(step, args)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, size = torch.zeros((), device=device), args.batch_size // processes
            for start in range(accelerator.process_index * size, batch_size, args.batch_size):
                share = slice(start, start + size)
                with accelerator.accumulate(model):
                    prediction = model(noisy[share], timesteps[share], label[share])
                    part = F.mse_loss(prediction.float(), target[share])
                    accelerator.backward(part)
                loss += part.detach() / args.grad_accum
            accelerator.unscale_gradients()  # in fp16
            norm = get_total_norm([p.grad for p in bare_model.parameters()])
            found = torch.stack([loss, norm, torch.full_like(loss, len(stop))])
            found = accelerator.reduce(found, "mean")
            if skips_by_itself:
                bare_optimizer.found_inf = 1 - found[:2].sum().isfinite().float()
            watch.put(step, found, rate, indices)
            optimizer.step()
            optimizer.zero_grad()
            if args.ema_decay:
                decay = min(args.ema_decay, (step + 1) / (step + 10))  # forgets the initial weights
                torch._foreach_lerp_(list(ema_model.parameters()), list(bare_model.parameters()), 1 - decay)

            done, is_stopping = step + 1, watch.is_stopping(step)
            if is_main and is_due(done, args.sample_every, args):
                sampling = metadata["sampling"]
                sample_grid(args.out, done, ema_model, noise_scheduler, sampling, accelerator)
            if is_main and (is_stopping or is_time_to_save(done, last_saved, args)):
                watch.read_all()  # what is saved has been looked at
                metadata["step"], metadata["losses"] = done, watch.losses
                metadata["pictures_seen"] = pictures_before + done * batch_size
                if accelerator.scaler:
                    metadata["grad_scaler"] = accelerator.scaler.state_dict()
                checkpoint.save(args.out, bare_model, ema_model, bare_optimizer, noise_scheduler, metadata)
                last_saved = time.monotonic()
            if is_stopping:
                break

    watch.read_all()
    accelerator.end_training()
    if is_stopping and done < args.max_steps:
        where = f"step {done:,} of {args.max_steps:,}"
        accelerator.print(f"{args.out}: stopped after {where}, which is saved; the same command goes on")
        raise SystemExit(130 if signal.SIGINT in stop else 0)
    accelerator.print(f"{args.out}: trained to step {args.max_steps:,}; python sample.py --mode test")


@command
def main(argv: list[str] | None = None):
    args, state = parse_args(argv), join_processes()
    if state.is_main_process:
        checkpoint.refuse_other_run(args.out)
    with state.main_process_first():  # the first decodes the pictures, the others read what it kept
        data, args.data = load_data(args.data, args.labels, load_objects())
    facts = {"labels_sha256": text_sha256(args.labels), "pictures_sha256": data.sha256()}
    facts |= {"pictures": len(data), "labelled": data.total}
    batch_size = args.batch_size * args.grad_accum  # of a step, over all processes
    args.max_steps = args.max_steps or math.ceil(args.epochs * len(data) / batch_size)
    # A CUDA graph writes the gradients of each pass to the same place: they can't be added up, nor shared.
    graphs = args.grad_accum == 1 and state.num_processes == 1
    left = args.max_steps - checkpoint.steps_done(args.out)
    setup = choose_setup(state, args.mixed_precision, left * args.grad_accum, training=True, graphs=graphs)
    args.mixed_precision = setup.precision
    accelerator = new_accelerator(
        mixed_precision=setup.precision,
        gradient_accumulation_steps=args.grad_accum,
        log_with=args.log_with,
        project_dir=args.out,
    )
    is_main, processes = accelerator.is_main_process, accelerator.num_processes
    if args.batch_size % processes:
        raise InputError(f"--batch-size {args.batch_size}: expected a multiple of the {processes} processes")
    if args.log_with and not accelerator.log_with:
        raise InputError(f"--log-with {args.log_with}: not installed; pip install {args.log_with}")
    tracking.check(args, accelerator)

    torch.manual_seed(args.seed)
    pictures_before, unseen = 0, unseen_triples(load_labels(args.labels, data.objects), data.objects)
    if args.init:
        model, noise_scheduler, before = checkpoint.load_weights(args.init)
        if before["model"] != args.model:
            raise InputError(f"{args.init}: weights of --model {before['model']}, not of {args.model}")
        pictures_before, unseen = before["pictures_seen"], [c for c in unseen if c in before["unseen"]]
    else:
        model, noise_scheduler = build(args.model)
    metadata = {"model": args.model, "recipe": recipe_of(args), "data": facts, "unseen": unseen}
    metadata |= {"sampling": PRESETS[args.model]["sampling"], "pictures_seen": pictures_before}
    with explained(state.device, smaller_batch(args, processes)):
        model.to(accelerator.device, memory_format=setup.memory_format).train()
        if is_main:
            announce(args, data, model, setup, accelerator, max(0, left))
        if args.dry_run:
            return
        own_folder = lock(args.out) if is_main else nullcontext()
        with own_folder, checkpoint.clean_stop(processes) as stop, disk_errors(args.out):
            train(args, data, model, noise_scheduler, metadata, setup, accelerator, stop)


if __name__ == "__main__":
    main()
