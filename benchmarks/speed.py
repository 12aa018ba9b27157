"""Our training loop and sampling against plain ones, timed in turn in one run.

    python benchmarks/speed.py                     # the reference model with CUDA, both models without
    python benchmarks/speed.py --models small --json speed.json

The plain training loop is the report's: fp32, default layout, AdamW, PNG files through a data loader with
workers, the loss read out each step. Ours is train.py's own loop, run by train.py: this script takes the
place of its progress bar, times the steps in blocks, and runs the other loops between two blocks. The bare
step is forward, backward and optimizer on one batch that stays on the device, set up as ours. The plain
sampling loop is fp32, default layout, one pass after the other. Prints Markdown.
"""

import argparse
import copy
import datetime
import functools
import gc
import itertools
import json
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from baselines import bare_training, network_and_optimizer, plain_sampling, plain_training
from data.pack import PACK
from dataset import ICLEVRDataset, to_float
from diffusion import generate
from infra.commands import ROOT, number
from infra.device import Setup, batch_size_for, choose_setup, has_fast_bf16, join_processes, prepare
from label_files import load_objects
from model import build
from options import IMAGE_SIZE, NUM_OBJECTS, PRECISIONS, PRESETS

FILES = 2000  # PNGs that the plain loop reads: the system's cache would hold more of them too
STEPS = 100_000  # that our loops are told to do, so that they choose their setup as for a long run
HEADER = (
    "| model | what | batch | plain, pictures/s | ours, pictures/s | ours / plain, median (range) | "
    "GFLOP a picture | ours, share of the matrix product's FLOP/s |\n|---|---|---|---|---|---|---|---|"
)


# --------------------------------------------------------------------------------------------------- measures


def device_name(device: torch.device) -> str:
    """The GPU, or the processor with the instructions that PyTorch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    names = [platform.processor()]
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(": ")[1] for line in lines if "model name" in line] or names
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
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    seconds = [timed(lambda: a @ b, device) for _ in range(13)]
    return 2 * size**3 / min(seconds[3:])


def flop_per_picture(preset: str, backward: bool) -> float:
    """Floating point operations of one pass, a multiply-add counting as two; with its backward pass."""
    model, _ = build(preset)
    image = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with FlopCounterMode(display=False) as counter, nullcontext() if backward else torch.no_grad():
        prediction = model(image, torch.zeros(1), torch.zeros(1, NUM_OBJECTS))
        if backward:
            prediction.sum().backward()
    return counter.get_total_flops()


class Turns:
    """In place of train.py's progress bar: hands out `pairs` blocks of `block` steps, times each, and gives
    each rival its turn after it. A block before them warms up. With CUDA, one after them counts how often the
    host waits for the device. Find `seconds` of each block by name, and `synchronisations` of a step.
    """

    def __init__(self, block: int, pairs: int, rivals: dict[str, Callable], device: torch.device):
        self.block = block
        self.pairs = pairs
        self.rivals = rivals
        self.device = device
        self.seconds: dict[str, list[float]] = {name: [] for name in ("ours", *rivals)}
        self.synchronisations: float | None = None

    def __call__(self, steps: range, **options) -> "Turns":
        self.steps = iter(steps)
        return self

    def __iter__(self) -> Iterator[int]:
        for _ in range(1 + self.pairs):
            wait(self.device)
            start = time.perf_counter()
            yield from itertools.islice(self.steps, self.block)
            wait(self.device)
            self.seconds["ours"].append(time.perf_counter() - start)
            for name, rival in self.rivals.items():
                self.seconds[name].append(timed(functools.partial(rival, self.block), self.device))
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


def finite_check(model: torch.nn.Module, loss: torch.Tensor) -> bool:
    """What train.py does before each step to see that loss and gradient are finite, and to hear of a stop."""
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return all(map(math.isfinite, torch.stack([loss, norm, torch.zeros_like(loss)]).tolist()))


def check_share(preset: str, clean: torch.Tensor, label: torch.Tensor, setup: Setup, pairs: int) -> list:
    """The time of `finite_check` by that of a bare step, of `pairs` pairs of them after two to warm up."""
    model, optimizer = network_and_optimizer(preset, clean.device, setup)
    timesteps = torch.randint(1000, (len(clean),), device=clean.device)
    shares = []
    for _ in range(2 + pairs):
        wait(clean.device)
        start = time.perf_counter()
        loss = F.mse_loss(model(clean, timesteps, label).float(), clean)
        loss.backward()
        wait(clean.device)
        middle = time.perf_counter()
        finite_check(model, loss.detach())
        end = time.perf_counter()
        seconds = timed(optimizer.step, clean.device)
        optimizer.zero_grad()
        shares.append((end - middle) / (middle - start + seconds))
    return shares[2:]


# ----------------------------------------------------------------------------------------- training, sampling


def time_training(preset: str, args: argparse.Namespace, data: ICLEVRDataset, device: torch.device) -> dict:
    """Pictures a second, in `pairs` turns each, of train.py's loop, the plain loop and the bare step."""
    batch_size = args.batch_size or PRESETS[preset]["training"]["batch_size"]
    block = args.block or (20 if device.type == "cuda" else max(1, 48 // batch_size))
    setup = choose_setup(join_processes(), args.mixed_precision, passes=STEPS, training=True)
    clean = to_float(data.images[:batch_size]).to(device)
    label = data.labels[:batch_size].to(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, image in enumerate(data.images[:FILES]):
            to_pil_image(image).save(folder / f"{i}.png")
        rivals = {"plain": plain_training(preset, folder, data.labels[:FILES], batch_size, device)}
        if not setup.compile_mode:  # to compile it too takes a minute
            rivals["bare"] = bare_training(preset, clean, label, setup)
        turns = Turns(block, args.pairs, rivals, device)
        shares = check_share(preset, clean, label, setup, args.pairs)
        argv = ["--model", preset, "--data", PACK, "--out", folder / "run", "--batch-size", batch_size]
        argv += ["--max-steps", STEPS, "--save-every", STEPS + 1, "--sample-every", 0]
        argv += ["--mixed-precision", setup.precision]
        with mock.patch.object(train, "tqdm", turns), redirect_stdout(sys.stderr):
            train.main([str(a) for a in argv])
    pictures = block * batch_size
    return {
        "setup": str(setup),
        "batch_size": batch_size,
        "pictures_per_second": {name: [pictures / s for s in seconds] for name, seconds in turns.seconds.items()},
        "flop_per_picture": flop_per_picture(preset, backward=True),
        "synchronisations_per_step": turns.synchronisations,
        "finite_check": shares,
    }


def time_sampling(preset: str, args: argparse.Namespace, data: ICLEVRDataset, device: torch.device) -> dict:
    """Pictures a second of 1000 steps, scaled up from turns of a few, of our loop and the plain one."""
    batch_size = args.batch_size or 32
    steps = args.sample_steps or (200 if device.type == "cuda" else 4 if preset == "small" else 1)
    scale = PRESETS[preset]["sampling"]["guidance_scale"]
    setup = choose_setup(join_processes(), args.mixed_precision, passes=STEPS, training=False)
    plain_model, noise_scheduler = build(preset)
    plain_model.to(device).eval()
    _, model = prepare(copy.deepcopy(plain_model), setup)
    label = data.labels[:batch_size].to(device)
    seeds = list(range(batch_size))
    size = batch_size_for(device, batch_size, processes=1, most=None)

    def ours():
        for i in range(0, batch_size, size):
            part = slice(i, i + size)
            generate(model, noise_scheduler, label[part], seeds[part], "ddpm", steps, scale)

    def plain():
        plain_sampling(plain_model, noise_scheduler, label, steps, scale)

    loops = {"ours": ours, "plain": plain}
    first_run = {name: timed(loop, device) for name, loop in loops.items()}  # warms up
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(args.pairs):
        for name, loop in loops.items():
            rates[name].append(batch_size * steps / 1000 / timed(loop, device))
    passes = 1 if scale == 1 else 2
    return {
        "setup": str(setup),
        "batch_size": batch_size,
        "pictures_per_second": rates,
        "steps_timed": steps,
        "flop_per_picture": 1000 * passes * flop_per_picture(preset, backward=False),
        "first_run_seconds": first_run["ours"],
    }


# -------------------------------------------------------------------------------------------------- the table


def spread(values: list[float], form: str) -> str:
    """Median and range of `values`, each printed by the format `form`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratios(rates: dict[str, list[float]], rival: str) -> list[float]:
    """Our rate by the rival's, turn by turn."""
    return [ours / other for ours, other in zip(rates["ours"], rates[rival], strict=True)]


def table_row(preset: str, what: str, part: dict, peak: float) -> str:
    rates = part["pictures_per_second"]
    plain = statistics.median(rates["plain"])
    ours = statistics.median(rates["ours"])
    flop = part["flop_per_picture"]
    return (
        f"| `{preset}` | {what} | {part['batch_size']} | {plain:.3g} | {ours:.3g} "
        f"| {spread(ratios(rates, 'plain'), '.2f')} | {flop / 1e9:,.1f} | {ours * flop / peak:.0%} |"
    )


def training_note(part: dict) -> str:
    rates = part["pictures_per_second"]
    text = ""
    if "bare" in rates:
        text += (
            f" The whole loop runs at {spread(ratios(rates, 'bare'), '.0%')} of the bare step's "
            f"{statistics.median(rates['bare']):.3g} pictures/s."
        )
    text += f" To check that loss and gradient are finite takes {spread(part['finite_check'], '.2%')} of a step."
    if part["synchronisations_per_step"] is not None:
        text += f" Synchronisations a step: {part['synchronisations_per_step']:.2f}."
    return text


def sampling_note(part: dict) -> str:
    rates = part["pictures_per_second"]
    ours = part["batch_size"] / statistics.median(rates["ours"])
    plain = part["batch_size"] / statistics.median(rates["plain"])
    return (
        f" Extrapolated from turns of {part['steps_timed']} steps: {part['batch_size']} pictures in "
        f"{ours:,.0f} s, by the plain loop in {plain:,.0f} s. The first turn, compiling included, took "
        f"{part['first_run_seconds']:.1f} s."
    )


def table(results: dict) -> str:
    """The results as Markdown."""
    products = ", ".join(f"{name} {peak / 1e12:.2f} TFLOP/s" for name, peak in results["peak"].items())
    head = (
        f"{results['device']}, {results['threads']} threads, torch {results['torch']}, {results['date']}; "
        f"matrix product: {products}; TF32 in the plain loops: {results['tf32']}"
    )
    rows = []
    notes = []
    for preset, parts in results["models"].items():
        for what, part in parts.items():
            peak = results["peak"]["bf16" if "bf16 autocast" in part["setup"] else "fp32"]
            rows.append(table_row(preset, what, part, peak))
            note = training_note(part) if what == "training" else sampling_note(part)
            notes.append(f"- `{preset}`, {what}: {part['setup']}.{note}")
    return "\n".join([head, "", HEADER, *rows, "", *notes])


# ----------------------------------------------------------------------------------------------- command line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=PRESETS, help="default: reference, without CUDA small too")
    add("--pairs", type=number(int, 1), default=5, help="turns of each (default: %(default)s)")
    add("--block", type=number(int, 1), help="training steps a turn (default: by the device)")
    add("--sample-steps", type=number(int, 1), help="sampling steps a turn (default: by the device)")
    add("--batch-size", type=number(int, 1), help="default: the preset's, 32 for sampling")
    add("--mixed-precision", choices=PRECISIONS, help="of ours (default: by the device)")
    add("--json", type=Path, help="file to write all turns to, anew after each part")
    return parser.parse_args()


def tf32_state(device: torch.device) -> str:
    if device.type != "cuda":
        return "there is none"
    products = "on" if torch.backends.cuda.matmul.allow_tf32 else "off"
    convolutions = "on" if torch.backends.cudnn.allow_tf32 else "off"
    return f"matrix products {products}, convolutions {convolutions}"


def main():
    args = parse_args()
    device = PartialState().device
    data = ICLEVRDataset(PACK, ROOT / "train.json", load_objects())
    dtypes = {"fp32": torch.float32}
    if has_fast_bf16(device) or args.mixed_precision == "bf16":  # else a product takes minutes
        dtypes["bf16"] = torch.bfloat16
    results = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": str(datetime.date.today()),
        "tf32": tf32_state(device),
        "peak": {name: matmul_peak(device, dtype) for name, dtype in dtypes.items()},
        "models": {},
    }
    for preset in args.models or (["reference"] if device.type == "cuda" else ["small", "reference"]):
        parts = results["models"][preset] = {}
        for what, measure in {"training": time_training, "sampling, 1000 steps": time_sampling}.items():
            parts[what] = measure(preset, args, data, device)
            gc.collect()
            torch.compiler.reset()
            if args.json:  # after each part: a machine that is lent may be taken back
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
