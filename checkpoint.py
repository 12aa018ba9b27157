"""Weights on disk: written whole or not at all, read without running code from them.

A folder of weights holds `unet/` and `scheduler/` (diffusers' own formats) and `metadata.json`, written last;
a checkpoint of a run adds `training/` with all that is needed to go on. As a script, make weights to ship:

    python checkpoint.py runs/small weights/small     # the newest checkpoint of the run, in half precision
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dataset import ROOT, InputError, command, load_json
from model import PRESETS, ConditionalUNet

SHIPPED = ROOT / "weights" / "small"
METADATA_NAME = "metadata.json"
WEIGHTS_NAME = "unet/diffusion_pytorch_model.safetensors"
KEEP = 2  # checkpoints of a run


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. One without metadata was cut off and does not count."""
    return sorted(path.parent for path in run.glob(f"checkpoint-*/{METADATA_NAME}"))


def newest(folder: Path) -> Path:
    """The newest checkpoint if `folder` is a run, else `folder` itself."""
    return (checkpoints(folder) or [folder])[-1]


def newest_weights(runs: Path = Path("runs")) -> Path:
    """The checkpoint written last in any run, or the weights that ship when there is none."""
    found = [c for run in runs.glob("*/") for c in checkpoints(run)]
    return max(found, key=lambda c: (c / METADATA_NAME).stat().st_mtime, default=SHIPPED)


def load_weights(folder: Path) -> tuple[ConditionalUNet, DDPMScheduler, dict]:
    """Network (fp32, on CPU), noise scheduler and metadata of weights or of a run. Raises InputError."""
    folder = newest(folder)
    metadata = load_json(folder / METADATA_NAME)
    model = ConditionalUNet.from_config(load_json(folder / "unet" / "config.json"))
    load_state(model, folder / WEIGHTS_NAME)
    return (
        model,
        DDPMScheduler.from_config(load_json(folder / "scheduler" / "scheduler_config.json")),
        metadata,
    )


def load_state(model: torch.nn.Module, path: Path):
    """Load a safetensors file of any precision into `model`; every tensor must fit. Raises InputError."""
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not the weights of this network ({reason})") from None


def in_order(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors laid out as safetensors wants them, which knows no channels_last."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_weights(
    folder: Path, model: ConditionalUNet, noise_scheduler: DDPMScheduler, metadata: dict, training=None
):
    """Write weights under a temporary name and rename them. `training`: file name -> tensors."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_config(temporary / "unet")  # with the next line what save_pretrained writes
    save_file(in_order(model.state_dict()), temporary / WEIGHTS_NAME, metadata={"format": "pt"})
    noise_scheduler.save_pretrained(temporary / "scheduler")
    for name, tensors in (training or {}).items():
        (temporary / "training").mkdir(exist_ok=True)
        save_file(in_order(tensors), temporary / "training" / f"{name}.safetensors")
    (temporary / METADATA_NAME).write_text(json.dumps(metadata, indent=1) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def save(run: Path, model, ema_model, optimizer, noise_scheduler: DDPMScheduler, metadata: dict):
    """Write a checkpoint of step `metadata["step"]`, then remove all but the newest two."""
    state = optimizer.state_dict()["state"]  # parameter index -> name -> tensor
    training = {
        "model": model.state_dict(),
        "optimizer": {
            f"{i}.{name}": value
            for i, values in state.items()
            for name, value in values.items()
            if torch.is_tensor(value)  # Muon also keeps what it finds out anew
        },
    }
    write_weights(run / f"checkpoint-{metadata['step']:07d}", ema_model, noise_scheduler, metadata, training)
    for old in checkpoints(run)[:-KEEP]:
        shutil.rmtree(old)


def resume(folder: Path, model, ema_model, optimizer) -> int:
    """Load what `save` wrote, in place, and return its step."""
    load_state(ema_model, folder / WEIGHTS_NAME)
    load_state(model, folder / "training" / "model.safetensors")
    state: dict[int, dict] = {}
    parameters = list(model.parameters())
    for key, tensor in load_file(folder / "training" / "optimizer.safetensors").items():
        index, name = key.split(".")
        if tensor.ndim:  # fused AdamW pairs weights and moments by their place in memory
            tensor = torch.empty_like(parameters[int(index)]).copy_(tensor)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return load_json(folder / METADATA_NAME)["step"]


@command
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description="Make weights to ship from a run: half precision, nothing to train on."
    )
    parser.add_argument("source", type=Path, help="a run or one of its checkpoints")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    model, noise_scheduler, metadata = load_weights(args.source)
    metadata["sampling"] = PRESETS[metadata["model"]]["sampling"]  # it may have been chosen after training
    write_weights(args.out, model.half(), noise_scheduler, metadata)
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.rglob('*') if f.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
