"""Weights and runs on disk: written whole or not at all, read without running code from them.

A folder of weights holds `unet/` and `scheduler/` (diffusers' own formats) and `metadata.json`, written last;
a checkpoint of a run adds `training/` with all that is needed to go on. What was tried against all this, and
what happened: docs/faults.md. As a script, make weights to ship, which open in diffusers and on the Hub as well:

    python checkpoint.py runs/small DIR                       # the newest checkpoint of the run, in half precision
    python checkpoint.py DIR DIR --scores images/test         # the model card with scores of pictures painted by DIR
    python checkpoint.py DIR DIR                              # with the code of today; the card stays
    python checkpoint.py DIR DIR --push-to-hub you/your-model
"""

import argparse
from pathlib import Path

from infra.commands import ROOT, InputError, Parser, command, did_you_mean, read_early, shown, to_path
from options import PRESETS, check_options, recipe_options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Make weights to ship from a run: half precision, a pipeline of diffusers, a model card."
    )
    parser.add_argument("source", type=to_path, help="a run or one of its checkpoints")
    parser.add_argument("out", type=to_path, help="folder to write")
    parser.add_argument("--scores", type=to_path, nargs="+", default=[], metavar="FOLDER",
                        help="pictures that sample.py painted with these weights, for the model card")  # fmt: skip
    parser.add_argument("--push-to-hub", metavar="NAME", help="upload the folder, as you/your-model")
    return parser.parse_args(argv)


if __name__ == "__main__":
    read_early(parse_args)

import hashlib
import json
import math
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.utils import get_total_norm

from infra.files import check_fields, flush, load_json, refuse_foreign, remove_temporaries, temporary_beside, write_json
from label_files import load_objects
from model import load_network, load_noise_scheduler
from network import ConditionalUNet

SHIPPED = ROOT / "weights" / "small"
METADATA_NAME = "metadata.json"
METADATA: dict[str, type] = {  # what it holds at least
    "model": str, "recipe": dict, "data": dict, "sampling": dict, "unseen": list, "step": int,
    "pictures_seen": int,
}  # fmt: skip
WEIGHTS_NAME = "unet/diffusion_pytorch_model.safetensors"
NETWORK_NAME = "unet/config.json"
SCHEDULER_NAME = "scheduler/scheduler_config.json"
# Of a folder of weights to ship. Those of the second line are for diffusers and the Hub.
SHIPPED_FILES = (
    METADATA_NAME, WEIGHTS_NAME, NETWORK_NAME, SCHEDULER_NAME,
    "model_index.json", "pipeline.py", "unet/network.py", "README.md", "samples.png",
)  # fmt: skip
RUN_NAME = "run.json"  # says whose folder it is, from the start of a run on

# ---------------------------------------------------------------------------------------------------- reading


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. One without metadata was cut off and does not count."""
    found = [path.parent for path in run.glob(f"checkpoint-*/{METADATA_NAME}")]
    found = [folder for folder in found if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=step_of)


def newest(folder: Path) -> Path:
    """The newest checkpoint if `folder` is a run, else `folder` itself."""
    return (checkpoints(folder) or [folder])[-1]


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(folder.name.rpartition("-")[2])


def steps_done(run: Path) -> int:
    """Of its newest checkpoint; 0 if there is none."""
    return max((step_of(folder) for folder in checkpoints(run)), default=0)


def newest_weights(runs: Path = Path("runs")) -> Path:
    """The checkpoint written last in any run, or the weights that ship when there is none."""
    found = [checkpoint for run in runs.glob("*/") for checkpoint in checkpoints(run)]
    return max(found, key=lambda checkpoint: (checkpoint / METADATA_NAME).stat().st_mtime, default=SHIPPED)


def known_weights(runs: Path = Path("runs")) -> list[Path]:
    """The runs that have a checkpoint, and the weights that ship."""
    return [*sorted(run for run in runs.glob("*/") if checkpoints(run)), SHIPPED]


def load_metadata(folder: Path) -> dict:
    """What is noted beside weights. Raises InputError."""
    path = folder / METADATA_NAME
    if not folder.exists():
        here = Path.cwd()
        known = [str(p.relative_to(here) if p.is_relative_to(here) else p) for p in known_weights()]
        raise InputError(f"{path}: no such file{did_you_mean(str(folder), known)}")
    metadata = check_fields(load_json(path), METADATA, path)
    if metadata["model"] not in PRESETS:
        raise InputError(f"{path}, model: expected one of {', '.join(PRESETS)}, got {shown(metadata['model'])}")
    check_fields(metadata["data"], {"labelled": int}, f"{path}, data")
    check_options(metadata["sampling"], f"{path}, sampling")
    return metadata


def describe(folder: Path, metadata: dict) -> str:
    """Whose weights are taken, and on how much they were trained."""
    seen = metadata["pictures_seen"]
    epoch = metadata["data"]["labelled"]
    line = f"weights: {folder} ({metadata['model']}, trained on {seen:,} pictures"
    if seen < epoch:
        line += f", less than one epoch of {epoch:,}; trained ones ship in {SHIPPED.relative_to(ROOT)}"
    return line + ")"


def load_weights(folder: Path) -> tuple[ConditionalUNet, DDPMScheduler, dict]:
    """Network (fp32, on CPU), noise scheduler and metadata of weights or of a run. Raises InputError."""
    folder = newest(folder)
    metadata = load_metadata(folder)
    noise_scheduler = load_noise_scheduler(folder / SCHEDULER_NAME)
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
    expected = model.state_dict()
    tensors = read_tensors(path)
    for name in [*expected, *tensors]:
        ours = list(expected[name].shape) if name in expected else "none"
        theirs = list(tensors[name].shape) if name in tensors else "none"
        if ours != theirs:
            raise InputError(f"{path}: not the weights of this network ({shown(name)}: expected {ours}, got {theirs})")
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(copies, assign=assign)


def fingerprint(folder: Path) -> str:
    """SHA-256 of all that decides what the weights in `folder` predict."""
    digest = hashlib.sha256()
    for name in (NETWORK_NAME, SCHEDULER_NAME, WEIGHTS_NAME):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- writing


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
    folder: Path,
    model: ConditionalUNet,
    noise_scheduler: DDPMScheduler,
    metadata: dict,
    training: dict[str, dict[str, torch.Tensor]] | None = None,
    complete: Callable[[Path], None] | None = None,
):
    """Write weights under a temporary name, metadata last, and rename them; a folder of that name goes.
    `training`: file name -> tensors. `complete` is given the folder, whole but for the metadata, to add files to.

    Raises InputError if the disk is full; then, as whenever this is cut off, older weights are still there.
    """
    folder = folder.resolve()  # of a link what it leads to
    temporary = temporary_beside(folder)
    new = temporary / "new"
    old = temporary / "old"
    try:
        model.save_config(new / "unet")  # with the next line what save_pretrained writes
        save_file(in_order(model.state_dict()), new / WEIGHTS_NAME, metadata={"format": "pt"})
        noise_scheduler.save_pretrained(new / "scheduler")
        for name, tensors in (training or {}).items():
            (new / "training").mkdir(exist_ok=True)
            save_file(in_order(tensors), new / "training" / f"{name}.safetensors")
        if complete:
            complete(new)
        for path in new.rglob("*"):
            flush(path)
        (new / METADATA_NAME).write_text(json.dumps(metadata, indent=1) + "\n")
        flush(new / METADATA_NAME)
        flush(new)
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be written ({' '.join(str(error).split())})") from None
    finally:
        if old.exists() and not folder.exists():
            old.replace(folder)
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_other_weights(folder: Path):
    """Raise InputError if `folder` holds anything but weights to ship, which may be written anew."""
    metadata = folder / METADATA_NAME
    is_ours = metadata.is_file() and check_fields(load_json(metadata), METADATA, metadata)
    refuse_foreign(folder, bool(is_ours), METADATA_NAME)
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name not in SHIPPED_FILES and name not in ("unet", "scheduler"):
            raise InputError(f"{folder}: holds {name}, which would be lost; choose another folder")


# ------------------------------------------------------------------------------------------------------- runs


def refuse_other_run(run: Path):
    """Raise InputError if the folder `run` holds anything, and not what train.py left there."""
    path = run / RUN_NAME
    is_ours = bool(checkpoints(run))
    if not is_ours and path.is_file():
        found = load_json(path)
        is_ours = isinstance(found, dict) and {"id", "recipe"} <= found.keys()
    refuse_foreign(run, is_ours, f"{RUN_NAME} or a checkpoint of train.py")


def begin(run: Path, metadata: dict) -> str:
    """Note in the folder of a run whose it is; returns the run's id, the same whenever it goes on."""
    path = run / RUN_NAME
    if path.is_file():
        found = load_json(path)
        if found.get("recipe") == metadata["recipe"]:
            return str(found["id"])
    run_id = secrets.token_hex(4)
    write_json(path, {"id": run_id, "model": metadata["model"], "recipe": metadata["recipe"]})
    return run_id


@dataclass
class TrainingState:
    """All that training changes. `ema_model` is `model` itself where weights are not averaged; `scaler` is
    fp16's gradient scaler, else None."""

    model: ConditionalUNet
    ema_model: ConditionalUNet
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None


def save(run: Path, state: TrainingState, noise_scheduler: DDPMScheduler, metadata: dict, keep: int):
    """Write a checkpoint of step `metadata["step"]`, then remove all but the newest `keep`.

    Weights that are not averaged are written once. Raises InputError, and keeps the checkpoints there are,
    if the disk is full or a number is not finite.
    """
    moments = {}
    for index, values in state.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            moments[f"{index}.{name}"] = value
    training = {"optimizer": moments}
    if state.ema_model is not state.model:
        training["model"] = state.model.state_dict()
    tensors = list(state.ema_model.state_dict().values())
    for part in training.values():
        tensors.extend(part.values())
    if not all_finite(tensors):
        raise InputError(f"{run}: numbers that are not finite after step {metadata['step']}, not saved")
    remove_temporaries(run)
    folder = run / f"checkpoint-{metadata['step']:07d}"
    write_weights(folder, state.ema_model, noise_scheduler, metadata, training)
    for old in checkpoints(run)[:-keep]:
        gone = temporary_beside(old)
        old.replace(gone)  # at once, while removing takes its time
        shutil.rmtree(gone)


def resume(folder: Path, state: TrainingState, metadata: dict) -> dict:
    """Load the checkpoint `folder` into `state`, in place, and return its metadata.

    Raises InputError if it is broken or, by `metadata`, of another recipe or other data than this run.
    """
    before = load_metadata(folder)
    older = recipe_options(metadata["model"])  # what a run did before there was an option for it
    for part in ("recipe", "data"):
        for name, value in metadata[part].items():
            found = before[part].get(name, older.get(name))
            if found != value:
                began = shown(found)
                raise InputError(
                    f"{folder.parent}: began with {name} {began}, now {shown(value)}; choose another --out"
                )
    losses = before.get("losses")
    if not isinstance(losses, list) or not all(type(x) in (int, float) for x in losses):
        raise InputError(f"{folder / METADATA_NAME}, losses: expected numbers, got {shown(losses)}")
    if state.scaler:
        check_fields(before, {"grad_scaler": dict}, folder / METADATA_NAME)
        kinds: dict[str, type] = dict.fromkeys(state.scaler.state_dict(), float)
        kinds["growth_interval"] = int
        kinds["_growth_tracker"] = int
        state.scaler.load_state_dict(check_fields(before["grad_scaler"], kinds, folder / METADATA_NAME))
    try:
        load_state(state.ema_model, folder / WEIGHTS_NAME)
        if state.ema_model is not state.model:
            load_state(state.model, folder / "training" / "model.safetensors")
        parameters = list(state.model.parameters())
        load_optimizer(state.optimizer, parameters, folder / "training" / "optimizer.safetensors")
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
    for i, values in state.items():
        if not values:
            raise InputError(f"{path}: nothing of parameter {i} of {len(parameters)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@command
def main(argv: list[str] | None = None):
    # Not at the top: training and sampling import this file too, and need nothing of these.
    from bookkeeping.hub import pipeline_files, push
    from report.card import CARD_NAME, GRID_NAME, load_scored, model_card, write_card

    args = parse_args(argv)
    refuse_other_weights(args.out)
    model, noise_scheduler, metadata = load_weights(args.source)
    if not metadata["recipe"].get("distill"):  # a student of guidance distillation brings options of its own
        metadata["sampling"] = PRESETS[metadata["model"]]["sampling"]  # they may have been chosen after training
    metadata.pop("losses", None)  # of the steps after the last line in the log
    objects = load_objects()

    def complete(folder: Path):
        for name, text in pipeline_files(metadata, objects).items():
            (folder / name).write_text(text)
        weights = fingerprint(folder)
        # Scores of the same weights stay, so that new code needs no new pictures.
        if not args.scores and (args.out / CARD_NAME).is_file() and fingerprint(args.out) == weights:
            for name in (CARD_NAME, GRID_NAME):
                if (args.out / name).is_file():
                    shutil.copyfile(args.out / name, folder / name)
            return
        scored = [load_scored(pictures, weights) for pictures in args.scores]
        write_card(folder, model_card(args.out.resolve().name, metadata, scored, list(objects)), scored)

    write_weights(args.out, model.half(), noise_scheduler, metadata, complete=complete)
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.rglob('*') if f.is_file()) / 1e6:.1f} MB")
    if args.push_to_hub:
        push(args.out, args.push_to_hub)


if __name__ == "__main__":
    main()
