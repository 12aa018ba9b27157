"""What training shows of the pictures it can paint by now: a sample grid, and the accuracy of the evaluator."""

import argparse

import torch
from diffusers import DDPMScheduler
from torchvision.utils import make_grid

from bookkeeping import tracking
from bookkeeping.run import Run, is_due
from dataset import to_uint8, write_picture
from infra.commands import ROOT
from label_files import load_conditions, load_objects
from pipeline import Painter


def paint(
    conditions: list[list[str]], chosen: range, model: torch.nn.Module, noise_scheduler: DDPMScheduler, run: Run
) -> torch.Tensor:
    """Pictures of the `chosen` conditions, uint8 [B, 3, 64, 64], with few steps and from the same noise each time.
    Raises FloatingPointError."""
    options = run.sampling | {"sampler": "dpmsolver++", "steps": 15}
    painter = Painter(model, model, noise_scheduler, load_objects(), options, run.accelerator.device)
    images = []
    model.eval()
    try:
        with run.accelerator.autocast():
            for start in range(0, len(chosen), 16):
                part = chosen[start : start + 16]
                images.append(painter.paint([conditions[i] for i in part], [(0, i) for i in part]))
    finally:
        model.train()
    return to_uint8(torch.cat(images)).cpu()


def preview(args: argparse.Namespace, step: int, model: torch.nn.Module, noise_scheduler: DDPMScheduler, run: Run):
    """Where it is time: paint eight validation conditions into the run's folder, and let the evaluator score all 64;
    both are shown by the trackers too."""
    is_grid_due = is_due(step, args.sample_every, args.max_steps)
    is_score_due = is_due(step, args.eval_every, args.max_steps)
    if not is_grid_due and not is_score_due:
        return
    # Conditions of neither test list, since nothing may be chosen by those.
    conditions = load_conditions(ROOT / "validation.json", load_objects())
    chosen = range(0, len(conditions), 1 if is_score_due else 8)
    try:
        pictures = paint(conditions, chosen, model, noise_scheduler, run)
    except FloatingPointError as error:  # which the loss may not show
        print(f"{args.out}: no samples of step {step:,}: {error}")
        return
    if is_score_due:
        run.score(step, pictures, conditions)
        pictures = pictures[::8]
    if is_grid_due:
        grid = make_grid(pictures, nrow=8)
        (args.out / "samples").mkdir(exist_ok=True)
        write_picture(args.out / "samples" / f"{step:07d}.png", grid)
        tracking.log_grid(run.accelerator, grid, step)
