"""Weights, runs and painted lists on disk: written whole or not at all, read without running code from them.

A folder of weights holds `unet/` and `scheduler/` (diffusers' own formats) and `metadata.json`, written last;
a checkpoint of a run adds `training/` with all that is needed to go on. What was tried against all this, and
what happened: docs/faults.md. As a script, make weights to ship:

    python checkpoint.py runs/small weights/small     # the newest checkpoint of the run, in half precision
"""

import argparse
from pathlib import Path

from commands import ROOT, InputError, Parser, command, shown
from options import PRESETS, check_options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Make weights to ship from a run: half precision, nothing to train on.")
    parser.add_argument("source", type=Path, help="a run or one of its checkpoints")
    parser.add_argument("out", type=Path, help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args(None)  # a mistake is told at once, not after the seconds that it takes to load PyTorch

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator

import filelock
import torch
from diffusers import DDPMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.utils import get_total_norm
from torchvision.transforms.functional import to_pil_image

from dataset import check_fields, load_json, read_picture
from model import ConditionalUNet, load_network, load_noise_scheduler

SHIPPED = ROOT / "weights" / "small"
METADATA_NAME = "metadata.json"
METADATA = {"model": str, "recipe": dict, "data": dict, "sampling": dict, "unseen": list}
METADATA |= {"step": int, "pictures_seen": int}  # what it holds at least
WEIGHTS_NAME = "unet/diffusion_pytorch_model.safetensors"
NETWORK_NAME, SCHEDULER_NAME = "unet/config.json", "scheduler/scheduler_config.json"
KEEP = 2  # checkpoints of a run
STOP = (signal.SIGTERM, signal.SIGINT)

# ---------------------------------------------------------------------------------------------------- reading


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. One without metadata was cut off and does not count."""
    found = {path.parent: re.fullmatch(r"checkpoint-(\d+)", path.parent.name)
             for path in run.glob(f"checkpoint-*/{METADATA_NAME}")}  # fmt: skip
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))


def newest(folder: Path) -> Path:
    """The newest checkpoint if `folder` is a run, else `folder` itself."""
    return (checkpoints(folder) or [folder])[-1]


def steps_done(run: Path) -> int:
    """Of its newest checkpoint; 0 if there is none."""
    return max((int(folder.name.rpartition("-")[2]) for folder in checkpoints(run)), default=0)


def newest_weights(runs: Path = Path("runs")) -> Path:
    """The checkpoint written last in any run, or the weights that ship when there is none."""
    found = [c for run in runs.glob("*/") for c in checkpoints(run)]
    return max(found, key=lambda c: (c / METADATA_NAME).stat().st_mtime, default=SHIPPED)


def load_metadata(folder: Path) -> dict:
    """What is noted beside weights. Raises InputError."""
    metadata = check_fields(load_json(path := folder / METADATA_NAME), METADATA, path)
    if metadata["model"] not in PRESETS:
        raise InputError(
            f"{path}, model: expected one of {', '.join(PRESETS)}, got {shown(metadata['model'])}"
        )
    check_fields(metadata["data"], {"labelled": int}, f"{path}, data")
    check_options(metadata["sampling"], f"{path}, sampling")
    return metadata


def load_weights(folder: Path) -> tuple[ConditionalUNet, DDPMScheduler, dict]:
    """Network (fp32, on CPU), noise scheduler and metadata of weights or of a run. Raises InputError."""
    folder = newest(folder)
    metadata, noise_scheduler = load_metadata(folder), load_noise_scheduler(folder / SCHEDULER_NAME)
    model = load_network(folder / NETWORK_NAME)
    load_state(model, folder / WEIGHTS_NAME, assign=True)
    return model, noise_scheduler, metadata


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises InputError, also for one that is not finite."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not a whole safetensors file ({reason})") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise InputError(f"{path}, {shown(name)}: expected finite numbers of floating point")
    return tensors


def load_state(model: torch.nn.Module, path: Path, assign: bool = False):
    """Load a safetensors file of any precision into `model`; every tensor must fit. `assign`: in place of the
    model's own tensors, which may be on the meta device. Raises InputError."""
    expected, tensors = model.state_dict(), read_tensors(path)
    for name in [*expected, *tensors]:
        ours, theirs = (list(of[name].shape) if name in of else "none" for of in (expected, tensors))
        if ours != theirs:
            raise InputError(
                f"{path}: not the weights of this network ({shown(name)}: expected {ours}, got {theirs})"
            )
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(copies, assign=assign)


def fingerprint(folder: Path) -> str:
    """SHA-256 of all that decides what the weights in `folder` predict."""
    digest = hashlib.sha256()
    for name in (NETWORK_NAME, SCHEDULER_NAME, WEIGHTS_NAME):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- writing


def write_whole(path: Path, content: bytes):
    """Write a file under a temporary name and rename it, so that it is never there in part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_picture(path: Path, image: torch.Tensor):
    """Write a picture, uint8 [3, H, W] on the CPU, as PNG."""
    to_pil_image(image).save(content := io.BytesIO(), "PNG")
    write_whole(path, content.getvalue())


def flush(path: Path):
    """Have the system put a file or folder on the disk, so that a power cut leaves it whole."""
    if os.name == "posix":  # others open no folder
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def in_order(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors on the CPU, laid out as safetensors wants them, which knows no channels_last."""
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether all numbers are finite; waits once for each device that has some of them."""
    of_device = defaultdict(list)
    for tensor in tensors:
        of_device[tensor.device].append(tensor)
    largest = [get_total_norm(group, norm_type=math.inf) for group in of_device.values()]
    return all(math.isfinite(norm) for norm in largest)


def write_weights(
    folder: Path, model: ConditionalUNet, noise_scheduler: DDPMScheduler, metadata: dict, training=None
):
    """Write weights under a temporary name, metadata last, and rename them. `training`: file name -> tensors.

    Raises InputError if the disk is full; then, as whenever this is cut off, older weights are still there.
    """
    temporary, old = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_config(temporary / "unet")  # with the next line what save_pretrained writes
        save_file(in_order(model.state_dict()), temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        noise_scheduler.save_pretrained(temporary / "scheduler")
        for name, tensors in (training or {}).items():
            (temporary / "training").mkdir(exist_ok=True)
            save_file(in_order(tensors), temporary / "training" / f"{name}.safetensors")
        for path in temporary.rglob("*"):
            flush(path)
        (temporary / METADATA_NAME).write_text(json.dumps(metadata, indent=1) + "\n")
        flush(temporary / METADATA_NAME)
        flush(temporary)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(temporary, folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be written ({' '.join(str(error).split())})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------- runs


def save(run: Path, model, ema_model, optimizer, noise_scheduler: DDPMScheduler, metadata: dict):
    """Write a checkpoint of step `metadata["step"]`, then remove all but the newest two.

    `ema_model` is `model` itself where weights are not averaged; they are then written once. Raises
    InputError, and keeps the checkpoints there are, if the disk is full or a number is not finite.
    """
    state = optimizer.state_dict()["state"]  # parameter index -> name -> tensor
    moments = {f"{i}.{name}": value for i, values in state.items() for name, value in values.items()}
    training = {"optimizer": moments}
    if ema_model is not model:
        training["model"] = model.state_dict()
    written = [*training.values(), ema_model.state_dict()]
    if not all_finite([tensor for tensors in written for tensor in tensors.values()]):
        raise InputError(f"{run}: numbers that are not finite after step {metadata['step']}, not saved")
    for left in run.glob("checkpoint-*.tmp"):  # by a run that was killed
        shutil.rmtree(left)
    write_weights(run / f"checkpoint-{metadata['step']:07d}", ema_model, noise_scheduler, metadata, training)
    for old in checkpoints(run)[:-KEEP]:
        os.replace(old, gone := old.with_name(old.name + ".tmp"))  # at once, while removing takes its time
        shutil.rmtree(gone)


def resume(folder: Path, model, ema_model, optimizer, scaler, metadata: dict) -> dict:
    """Load the checkpoint `folder`, in place, and return its metadata. `scaler`: of fp16, else None.

    Raises InputError if it is broken or, by `metadata`, of another recipe or other data than this run.
    """
    before = load_metadata(folder)
    for part in ("recipe", "data"):
        for name, value in metadata[part].items():
            if before[part].get(name) != value:
                began = shown(before[part].get(name))
                raise InputError(
                    f"{folder.parent}: began with {name} {began}, now {shown(value)}; choose another --out"
                )
    losses = before.get("losses")
    if not isinstance(losses, list) or not all(type(x) in (int, float) for x in losses):
        raise InputError(f"{folder / METADATA_NAME}, losses: expected numbers, got {shown(losses)}")
    if scaler:
        check_fields(before, {"grad_scaler": dict}, folder / METADATA_NAME)
        numbers = dict.fromkeys(scaler.state_dict(), float) | {"growth_interval": int, "_growth_tracker": int}
        scaler.load_state_dict(check_fields(before["grad_scaler"], numbers, folder / METADATA_NAME))
    try:
        load_state(ema_model, folder / WEIGHTS_NAME)
        if ema_model is not model:
            load_state(model, folder / "training" / "model.safetensors")
        load_optimizer(optimizer, list(model.parameters()), folder / "training" / "optimizer.safetensors")
    except InputError as error:
        raise InputError(f"{error}; without {folder} the run goes on from an earlier one") from None
    return before


def load_optimizer(optimizer, parameters: list[torch.nn.Parameter], path: Path):
    """Load the state that `save` wrote. Raises InputError."""
    state: dict[int, dict] = {i: {} for i in range(len(parameters))}
    for key, tensor in read_tensors(path).items():
        index, _, name = key.partition(".")
        own = parameters[int(index)] if index.isdecimal() and int(index) < len(parameters) else None
        if own is None or tensor.ndim and tensor.shape != own.shape:
            raise InputError(f"{path}, {shown(key)}: not of an optimizer of this network")
        if tensor.ndim:  # fused AdamW pairs weights and moments by their place in memory
            tensor = torch.empty_like(own).copy_(tensor)
        state[int(index)][name] = tensor
    if missing := [i for i, values in state.items() if not values]:
        raise InputError(f"{path}: nothing of parameter {missing[0]} of {len(parameters)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def open_log(path: Path, step: int):
    """Open log.jsonl to append, without what a stopped run wrote past `step`, or wrote in part."""
    path.touch()
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError):
            break
        size += len(line)
    os.truncate(path, size)  # in place, which a full disk lets through
    return path.open("a", buffering=1)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep others out of `folder`, made if need be. Raises InputError if one is in there.

    The system drops the lock of a process that ends, however it does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        raise InputError(
            f"{folder}: another process is at work in there; wait for it or choose --out"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # where an open file cannot be removed filelock does it
            (folder / ".lock").unlink()
        held.release()


@contextlib.contextmanager
def clean_stop(processes: int) -> Iterator[list[int]]:
    """Within it SIGTERM and Ctrl-C only join the list of signals, for a loop to look at and end by itself.

    A Ctrl-C after that ends the process at once. Not one of several `processes`: their launcher passes on
    what the terminal has sent them already, and ends them itself when it is asked again.
    """
    received: list[int] = []
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def watch():  # in a thread, as Python's own handlers wait for the end of a backward pass
        with ours:
            while content := ours.recv(1):
                number = content[0]
                received.extend({number}.intersection(STOP))
                if processes == 1 and number == signal.SIGINT and len(received) > 1:
                    os._exit(130)

    threading.Thread(target=watch, daemon=True).start()
    before = {number: signal.signal(number, lambda *_: None) for number in STOP}
    before_descriptor = signal.set_wakeup_fd(theirs.fileno())
    try:
        yield received
    finally:
        signal.set_wakeup_fd(before_descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        theirs.close()


# ------------------------------------------------------------------------------------------- painted pictures


def is_whole(path: Path) -> bool:
    """Whether a picture can be read."""
    try:
        read_picture(path)
    except InputError:
        return False
    return True


def missing_pictures(folder: Path, count: int) -> list[int]:
    """Which of `0.png` to `count - 1.png` are not in `folder`, or not whole."""
    return [i for i in range(count) if not is_whole(folder / f"{i}.png")]


def start_list(folder: Path, settings: dict) -> dict:
    """Make `folder` ready for pictures painted by `settings`, which are stored in `<folder>.json`.

    Pictures painted by these very settings stay, others that sample.py left there go. Returns what is stored:
    more than `settings` if the pictures were all there before, and scored.
    """
    report, grid = folder.with_suffix(".json"), folder.with_suffix(".png")
    settings = json.loads(json.dumps(settings))  # tuples are lists there
    try:
        stored = load_json(report)
    except InputError:
        stored = None
    if not isinstance(stored, dict):
        stored = {}
    differ = [name for name, value in settings.items() if stored.get(name) != value]
    wanted = set() if differ else {f"{i}.png" for i in range(settings["num_images"])}
    if differ:
        if stored:
            print(f"{folder}: painted anew, as these differ from before: {', '.join(differ)}")
        for path in (report, grid):  # the report first: without it no picture counts
            path.unlink(missing_ok=True)
    for path in [*folder.glob("*.png"), *folder.glob(".*.png.tmp")]:
        if re.fullmatch(r"\d+\.png|\.\d+\.png\.tmp", path.name) and path.name not in wanted:
            path.unlink()
    if differ:
        write_whole(report, (json.dumps(settings, indent=1) + "\n").encode())
        return settings
    return stored


@command
def main(argv: list[str] | None = None):
    args = parse_args(argv)
    model, noise_scheduler, metadata = load_weights(args.source)
    metadata["sampling"] = PRESETS[metadata["model"]]["sampling"]  # it may have been chosen after training
    metadata.pop("losses", None)  # of the steps after the last line in the log
    write_weights(args.out, model.half(), noise_scheduler, metadata)
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.rglob('*') if f.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
