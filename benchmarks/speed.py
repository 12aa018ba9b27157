"""Our training loop and sampling against plain ones, timed in turn in one run.

    python benchmarks/speed.py                     # the reference model with CUDA, both models without
    python benchmarks/speed.py --models small --json speed.json

The plain training loop is the report's: fp32, default layout, AdamW, PNG files through a data loader with
workers, the loss read out each step. Ours is train.py's own loop, run by train.py: this script only takes the
place of its progress bar, hands out the steps in turns, and lets the others work in between. The bare step is
forward, backward and optimizer on one batch that stays on the device, set up as ours. The plain sampling loop
is fp32, default layout, one pass after the other. Prints Markdown.
"""

import argparse
import copy
import datetime
import gc
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DDPMScheduler
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data.pack import PACK
from dataset import ICLEVRDataset, read_picture, to_float
from diffusion import batch_size_for, generate
from infra.commands import ROOT, number
from infra.device import Setup, choose_setup, has_fast_bf16, join_processes, new_accelerator, prepare
from labels import load_objects
from model import build
from options import PRECISIONS, PRESETS

FILES = 2000  # PNGs that the plain loop reads: more would all be in the system's cache just so


STEPS = 100_000  # that train.py is told to do, so that it decides as for a long run, and so in sampling


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    names = [x.split(": ")[1] for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return f"{names[0]} ({torch.backends.cpu.get_cpu_capability()})"


def wait(device: torch.device):
    """Let the device finish, so that the clock sees all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of ten square matrix products of random numbers, after three to warm up."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device) for _ in range(13)]
    return 2 * size**3 / min(seconds[3:])


class Turns:
    """In place of train.py's progress bar: hands out `pairs` blocks of `block` steps, times each, and gives
    each rival its turn after it. A block before them warms up; with CUDA, one after them counts
    synchronisations.
    """

    def __init__(
        self, steps: range, block: int, pairs: int, rivals: dict[str, Callable[[int], None]], device
    ):
        self.steps, self.block, self.pairs, self.rivals, self.device = (
            iter(steps),
            block,
            pairs,
            rivals,
            device,
        )
        self.seconds: dict[str, list[float]] = {name: [] for name in ("ours", *rivals)}  # a block
        self.synchronisations = None  # a step

    def __iter__(self) -> Iterator[int]:
        for _ in range(1 + self.pairs):
            wait(self.device)
            start = time.perf_counter()
            yield from itertools.islice(self.steps, self.block)
            wait(self.device)
            self.seconds["ours"].append(time.perf_counter() - start)
            for name, rival in self.rivals.items():
                self.seconds[name].append(timed(lambda rival=rival: rival(self.block), self.device))
        self.seconds = {name: seconds[1:] for name, seconds in self.seconds.items()}
        if self.device.type == "cuda":
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                yield from itertools.islice(self.steps, self.block)
                torch.cuda.set_sync_debug_mode("default")
            self.synchronisations = sum("synchroniz" in str(w.message) for w in caught) / self.block

    def set_postfix(self, **values):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass


class Files(Dataset):
    """Pictures from PNG files, decoded each time."""

    def __init__(self, folder: Path, labels: torch.Tensor):
        self.folder, self.labels = folder, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return to_float(read_picture(self.folder / f"{index}.png")), self.labels[index]


def loss_of(model, noise_scheduler: DDPMScheduler, clean: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(clean)
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
    target = noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(clean, noise, timesteps)
    prediction = model(noise_scheduler.add_noise(clean, noise, timesteps), timesteps, label)
    return F.mse_loss(prediction.float(), target)


def plain_training(preset: str, folder: Path, labels: torch.Tensor, batch_size: int, device: torch.device):
    """The report's loop, as a function that does so many steps of it."""
    model, noise_scheduler = build(preset)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = DataLoader(
        Files(folder, labels), batch_size, shuffle=True, drop_last=True, persistent_workers=True,
        num_workers=min(4, os.cpu_count()), pin_memory=device.type == "cuda",
    )  # fmt: skip
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def run(steps: int):
        for clean, label in itertools.islice(batches, steps):
            loss = loss_of(model, noise_scheduler, clean.to(device), label.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return run


def finite_check(model: torch.nn.Module, loss: torch.Tensor) -> bool:
    """What train.py does before each step to see that loss and gradient are finite, and to hear of a stop."""
    norm = get_total_norm([p.grad for p in model.parameters()])
    return all(map(math.isfinite, torch.stack([loss, norm, torch.zeros_like(loss)]).tolist()))


def check_share(
    preset: str, clean: torch.Tensor, label: torch.Tensor, setup: Setup, pairs: int
) -> list[float]:
    """The time of `finite_check` by that of a bare step, of `pairs` pairs of them after two to warm up."""
    model, _ = build(preset)
    model.to(clean.device, memory_format=setup.memory_format).train()
    optimizer = train.OPTIMIZER_CLASSES[PRESETS[preset]["training"]["optimizer"]](model.parameters(), lr=1e-4)
    prepared = new_accelerator(mixed_precision=setup.precision).prepare_model(model)
    timesteps, shares = torch.randint(1000, (len(clean),), device=clean.device), []
    for _ in range(2 + pairs):
        wait(clean.device)
        start = time.perf_counter()
        loss = F.mse_loss(prepared(clean, timesteps, label).float(), clean)
        loss.backward()
        wait(clean.device)
        middle = time.perf_counter()
        finite_check(model, loss.detach())
        end = time.perf_counter()
        seconds = timed(optimizer.step, clean.device)
        optimizer.zero_grad()
        shares.append((end - middle) / (middle - start + seconds))
    return shares[2:]


def bare_training(preset: str, clean: torch.Tensor, label: torch.Tensor, setup: Setup):
    """Forward, backward and optimizer on one batch, set up as ours, as a function that does so many steps."""
    model, _ = build(preset)
    model.to(clean.device, memory_format=setup.memory_format).train()
    optimizer = train.OPTIMIZER_CLASSES[PRESETS[preset]["training"]["optimizer"]](model.parameters(), lr=1e-4)
    model = new_accelerator(mixed_precision=setup.precision).prepare_model(model)
    timesteps = torch.randint(1000, (len(clean),), device=clean.device)

    def run(steps: int):
        for _ in range(steps):
            F.mse_loss(model(clean, timesteps, label).float(), clean).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


@torch.no_grad()
def plain_sampling(model, noise_scheduler: DDPMScheduler, label: torch.Tensor, steps: int, scale: float):
    """The plain loop over the first `steps` of 1000, guided by two passes."""
    scheduler = DDPMScheduler.from_config(noise_scheduler.config)
    scheduler.set_timesteps(1000)
    images = torch.randn(len(label), 3, 64, 64, device=label.device)
    for t in scheduler.timesteps[:steps]:
        timesteps = t.to(label.device).expand(len(label))
        prediction = model(images, timesteps, label)
        if scale != 1:
            unconditional = model(images, timesteps, torch.zeros_like(label))
            prediction = unconditional + scale * (prediction - unconditional)
        images = scheduler.step(prediction, t, images).prev_sample


def flop_per_picture(preset: str, backward: bool) -> float:
    """Floating point operations of one pass, a multiply-add counting as two; with its backward pass."""
    model, _ = build(preset)
    inputs = torch.zeros(1, 3, 64, 64), torch.zeros(1), torch.zeros(1, 24)
    with FlopCounterMode(display=False) as counter, nullcontext() if backward else torch.no_grad():
        prediction = model(*inputs)
        if backward:
            prediction.sum().backward()
    return counter.get_total_flops()


def time_training(preset: str, args: argparse.Namespace, data: ICLEVRDataset, device: torch.device) -> dict:
    """Pictures a second, in `pairs` turns each, of train.py's loop, the plain loop and the bare step."""
    batch_size = args.batch_size or PRESETS[preset]["training"]["batch_size"]
    block = args.block or (20 if device.type == "cuda" else max(1, 48 // batch_size))
    setup = choose_setup(join_processes(), args.mixed_precision, passes=STEPS, training=True)
    clean, label = (t[:batch_size].to(device) for t in (to_float(data.images[:batch_size]), data.labels))
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(data.images[:FILES]):
            to_pil_image(image).save(Path(folder, f"{i}.png"))
        rivals = {"plain": plain_training(preset, Path(folder), data.labels[:FILES], batch_size, device)}
        if not setup.compile_mode:  # to compile it too takes a minute
            rivals["bare"] = bare_training(preset, clean, label, setup)
        turns = []

        def bar(steps: range, **kwargs) -> Turns:
            turns.append(Turns(steps, block, args.pairs, rivals, device))
            return turns[0]

        shares = check_share(preset, clean, label, setup, args.pairs)

        argv = ["--model", preset, "--data", PACK, "--out", Path(folder, "run"), "--batch-size", batch_size]
        argv += ["--max-steps", STEPS, "--save-every", STEPS + 1, "--sample-every", 0]
        argv += ["--mixed-precision", setup.precision]
        original, train.tqdm = train.tqdm, bar
        with redirect_stdout(sys.stderr):
            train.main([str(a) for a in argv])
        train.tqdm = original
    flop = flop_per_picture(preset, backward=True)
    rates = {name: [block * batch_size / s for s in seconds] for name, seconds in turns[0].seconds.items()}
    return {"setup": str(setup), "batch_size": batch_size, "pictures_per_second": rates,
            "flop_per_picture": flop, "synchronisations_per_step": turns[0].synchronisations,
            "finite_check": shares}  # fmt: skip


def time_sampling(preset: str, args: argparse.Namespace, data: ICLEVRDataset, device: torch.device) -> dict:
    """Pictures a second of 1000 steps, scaled up from turns of a few, of our loop and the plain one."""
    batch_size = args.batch_size or 32
    steps = args.sample_steps or (200 if device.type == "cuda" else 4 if preset == "small" else 1)
    scale = PRESETS[preset]["sampling"]["guidance_scale"]
    setup = choose_setup(join_processes(), args.mixed_precision, passes=STEPS, training=False)
    plain_model, noise_scheduler = build(preset)
    plain_model.to(device).eval()
    _, model = prepare(copy.deepcopy(plain_model), setup)
    label, seeds = data.labels[:batch_size].to(device), list(range(batch_size))
    size = batch_size_for(device, batch_size, processes=1, most=None)

    def ours():
        for i in range(0, batch_size, size):
            part = slice(i, i + size)
            generate(model, noise_scheduler, label[part], seeds[part], "ddpm", steps, scale)

    work = {
        "ours": ours,
        "plain": lambda: plain_sampling(plain_model, noise_scheduler, label, steps, scale),
    }
    first_run = {name: timed(w, device) for name, w in work.items()}  # warms up
    seconds = {name: [] for name in work}
    for _ in range(args.pairs):
        for name, w in work.items():
            seconds[name].append(timed(w, device))
    rates = {name: [batch_size * steps / 1000 / s for s in taken] for name, taken in seconds.items()}
    passes = 1 if scale == 1 else 2
    return {"setup": str(setup), "batch_size": batch_size, "pictures_per_second": rates, "steps_timed": steps,
            "flop_per_picture": 1000 * passes * flop_per_picture(preset, backward=False),
            "first_run_seconds": first_run["ours"]}  # fmt: skip


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        f"{results['device']}, {results['threads']} threads, torch {results['torch']}, {results['date']}; "
        f"matrix product: {', '.join(f'{k} {v / 1e12:.2f} TFLOP/s' for k, v in results['peak'].items())}; "
        f"TF32 in the plain loops: {results['tf32']}",
        "",
        "| model | what | batch | plain, pictures/s | ours, pictures/s | ours / plain, median (range) | "
        "GFLOP a picture | ours, share of the matrix product's FLOP/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for preset, parts in results["models"].items():
        for what, part in parts.items():
            rates = part["pictures_per_second"]
            ratios = [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)]
            middle = {name: statistics.median(values) for name, values in rates.items()}
            peak = results["peak"]["bf16" if "bf16 autocast" in part["setup"] else "fp32"]
            lines.append(
                f"| `{preset}` | {what} | {part['batch_size']} | {middle['plain']:.3g} | "
                f"{middle['ours']:.3g} | "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
                f"{part['flop_per_picture'] / 1e9:,.1f} | "
                f"{middle['ours'] * part['flop_per_picture'] / peak:.0%} |"
            )
            notes.append(f"- `{preset}`, {what}: {part['setup']}.")
            if "bare" in rates:
                shares = [a / b for a, b in zip(rates["ours"], rates["bare"], strict=True)]
                notes[-1] += (
                    f" The whole loop runs at {statistics.median(shares):.0%} ({min(shares):.0%} to "
                    f"{max(shares):.0%}) of the bare step's {middle['bare']:.3g} pictures/s."
                )
            if "finite_check" in part:
                shares = part["finite_check"]
                notes[-1] += (
                    f" Looking whether loss and gradient are finite takes {statistics.median(shares):.2%} "
                    f"({min(shares):.2%} to {max(shares):.2%}) of a step."
                )
                if part["synchronisations_per_step"] is not None:
                    notes[-1] += f" Synchronisations a step: {part['synchronisations_per_step']:.2f}."
            else:
                seconds = {name: part["batch_size"] / rate for name, rate in middle.items()}
                notes[-1] += (
                    f" Extrapolated from turns of {part['steps_timed']} steps: {part['batch_size']} pictures "
                    f"in {seconds['ours']:,.0f} s, by the plain loop in {seconds['plain']:,.0f} s. "
                    f"The first turn, compiling included, took {part['first_run_seconds']:.1f} s."
                )
    return "\n".join([*lines, "", *notes])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", choices=PRESETS, help="default: reference, without CUDA small too"
    )
    parser.add_argument(
        "--pairs", type=number(int, 1), default=5, help="turns of each (default: %(default)s)"
    )
    parser.add_argument("--block", type=number(int, 1), help="training steps a turn (default: by the device)")
    parser.add_argument(
        "--sample-steps", type=number(int, 1), help="sampling steps a turn (default: likewise)"
    )
    parser.add_argument("--batch-size", type=number(int, 1), help="default: the preset's, 32 for sampling")
    parser.add_argument("--mixed-precision", choices=PRECISIONS, help="of ours (default: theirs)")
    parser.add_argument("--json", type=Path, help="file to write all turns to")
    args = parser.parse_args()
    device = PartialState().device
    data = ICLEVRDataset(PACK, ROOT / "train.json", load_objects())
    dtypes = {"fp32": torch.float32}
    if has_fast_bf16(device) or args.mixed_precision == "bf16":  # else a product takes minutes
        dtypes["bf16"] = torch.bfloat16
    results = {
        "device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "date": str(datetime.date.today()),
        "tf32": f"matrix products {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}, convolutions "
        f"{'on' if torch.backends.cudnn.allow_tf32 else 'off'}" if device.type == "cuda" else "there is none",
        "peak": {name: matmul_peak(device, dtype) for name, dtype in dtypes.items()},
        "models": {},
    }  # fmt: skip
    for preset in args.models or (["reference"] if device.type == "cuda" else ["small", "reference"]):
        results["models"][preset] = {}
        for what, function in {"training": time_training, "sampling, 1000 steps": time_sampling}.items():
            results["models"][preset][what] = function(preset, args, data, device)
            gc.collect()
            torch.compiler.reset()
            if args.json:  # after each part: a machine that is lent may be taken back
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
