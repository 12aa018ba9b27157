"""Shows a run in TensorBoard or Weights & Biases: its settings, numbers and sample grids."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

from infra.commands import InputError

PROJECT = "iclevr-ddpm"


@contextmanager
def wandb_errors() -> Iterator[None]:
    """Within it what wandb refuses becomes an InputError: no key, a wrong one, no network, a bad setting."""
    import wandb  # not in requirements.txt

    try:
        yield
    except (wandb.Error, ValueError) as error:
        raise InputError(
            f"--log-with wandb: {error} (`wandb login` or WANDB_API_KEY gives it a key, WANDB_MODE=offline needs none)"
        ) from None


def check(args: argparse.Namespace, accelerator: Accelerator):
    """Log in to wandb if the run is to be shown there; in a terminal wandb may ask for a key. For before
    anything is written. Raises InputError."""
    if args.log_with == "wandb" and accelerator.is_main_process:
        with wandb_errors():
            import wandb

            wandb.login()


def start(args: argparse.Namespace, accelerator: Accelerator, run_id: str, first_step: int):
    """Begin to show the run, or go on where `first_step` steps are done. `run_id`: the same each time.
    Raises InputError."""
    if not args.log_with:
        return
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    options = {
        "wandb": {"name": args.out.resolve().name, "id": run_id, "resume": "allow", "dir": args.out},
        "tensorboard": {"purge_step": first_step + 1},  # what a stopped run logged past its checkpoint
    }
    with wandb_errors() if args.log_with == "wandb" else nullcontext():
        accelerator.init_trackers(PROJECT, config, options)


def log_grid(accelerator: Accelerator, grid: torch.Tensor, step: int):
    """Give a sample grid, uint8 [3, H, W] on the CPU, to the trackers."""
    images = {"samples": grid.permute(1, 2, 0).numpy()[None]}
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images(images, step=step, **layout)
