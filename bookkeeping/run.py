"""What surrounds the training loop: going on where a run stopped, its numbers, its checkpoints, its end."""

import argparse
import json
import signal
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

import checkpoint
from bookkeeping import tracking
from bookkeeping.curves import CURVES_NAME, LOG_NAME, draw_curves, read_log
from bookkeeping.watch import Watch
from checkpoint import TrainingState
from dataset import ICLEVRDataset
from infra.device import Setup, seconds_per_picture
from lab import load_evaluator
from label_files import load_objects
from labels import multi_hot
from options import recipe_options

SAVE_EVERY = 600  # seconds, without --save-every


def is_due(done: int, every: int, last: int) -> bool:
    """Whether it is time after `done` steps: every `every` steps, and after the last one; never if 0."""
    return every > 0 and (done % every == 0 or done == last)


def recipe_of(args: argparse.Namespace) -> dict:
    """What decides the result of a run, but for rounding: it may not change when the run goes on."""
    names = ["model", "seed", "mixed_precision", *recipe_options(args.model)]
    recipe = {name: getattr(args, name) for name in names if name not in ("epochs", "batch_size")}
    recipe["batch_size * grad_accum"] = args.batch_size * args.grad_accum
    if args.lr_schedule != "constant":
        recipe["max_steps"] = args.max_steps
    for name in ("init", "distill", "extra"):
        folder = getattr(args, name)
        recipe[name] = str(folder) if folder else None
    return recipe


def announce(
    args: argparse.Namespace,
    data: ICLEVRDataset,
    model: torch.nn.Module,
    setup: Setup,
    accelerator: Accelerator,
    steps: int,
):
    """Say what will be trained and how, and without CUDA how long the `steps` that are left take."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    total = len(data.label_file)
    of_all = "" if len(data) == total else f"of {total:,} "
    print(f"{args.model}: {millions:.2f}M parameters, {args.data}: {len(data):,} {of_all}pictures")
    print(setup)
    print(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}))
    if accelerator.device.type != "cuda":
        pictures = steps * args.batch_size * args.grad_accum / accelerator.num_processes
        hours = seconds_per_picture(model, accelerator) * pictures / 3600
        hint = "" if args.model == "small" else "; --model small is made for this"
        duration = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
        print(f"no CUDA: {steps:,} steps will take about {duration} here{hint}")


class Run:
    """A training run in the folder `args.out`.

    `metadata`: what its checkpoints say of it, but for the step; `filenames`: of all pictures; `stop`: a list
    that holds the signals to stop that have arrived.
    """

    def __init__(
        self, args: argparse.Namespace, accelerator: Accelerator, metadata: dict, filenames: list[str], stop: list[int]
    ):
        self.args = args
        self.accelerator = accelerator
        self.stop = stop
        # Fused AdamW skips a step for which `found_inf` is 1, and fp16's gradient scaler one that overflows:
        # the numbers of a step can then be read one step late.
        self.skips_by_itself = args.optimizer == "adamw" or accelerator.scaler is not None
        self.sampling = metadata["sampling"]  # the options that the weights are made for
        self._metadata = metadata
        self._pictures_before = metadata["pictures_seen"]  # by the weights that training starts from
        self._filenames = filenames
        self._evaluator = load_evaluator(None, accelerator.device) if args.eval_every else None

    def begin(self, state: TrainingState) -> int:
        """Load the newest checkpoint into `state`, if there is one, and open the log; returns the steps done.
        Raises InputError."""
        out = self.args.out
        first_step = 0
        losses: list[float] = []
        if checkpoint.checkpoints(out):
            before = checkpoint.resume(checkpoint.newest(out), state, self._metadata)
            first_step = before["step"]
            losses = before["losses"]
            if first_step >= self.args.max_steps:
                further = f"to train it further: --init {out} --out {out}-2"
                self.accelerator.print(f"{out}: was finished, with {first_step:,} steps; {further}")
                return first_step
            self.accelerator.print(f"{out}: goes on at step {first_step:,} of {self.args.max_steps:,}")
        run_id = checkpoint.begin(out, self._metadata) if self.accelerator.is_main_process else ""
        tracking.start(self.args, self.accelerator, run_id, first_step)
        lag = 1 if self.skips_by_itself else 0
        self.watch = Watch(self.args, self._filenames, self.accelerator, lag, first_step, losses)
        self._last_saved = time.monotonic()
        return first_step

    def check(
        self,
        step: int,
        loss: torch.Tensor,
        norm: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        pictures: torch.Tensor,
    ):
        """Look whether loss [] and gradient norm [] of a step are finite in all processes, before the
        optimizer steps. Raises InputError if not; `pictures`: indices [B] to name then."""
        stops = torch.full_like(loss, len(self.stop))
        numbers = self.accelerator.reduce(torch.stack([loss, norm, stops]), "mean")
        if self.skips_by_itself:
            found_inf = 1 - numbers[:2].sum().isfinite().float()
            setattr(optimizer, "found_inf", found_inf)  # noqa: B010 - which torch does not declare
        self.watch.put(step, numbers, optimizer.param_groups[0]["lr"], pictures)

    def score(self, done: int, pictures: torch.Tensor, conditions: list[list[str]]):
        """Log what the evaluator finds in uint8 pictures [B, 3, 64, 64] of B conditions, painted after `done` steps."""
        if self._evaluator:
            labels = multi_hot(conditions, load_objects())
            found = self._evaluator.judge(pictures)
            accuracy = self._evaluator.compute_acc(found, labels)
            self.watch.note_scores(done, {"accuracy": accuracy, "exact_set": self._evaluator.exact_set(found, labels)})

    def is_time_to_save(self, done: int) -> bool:
        """As --save-every says, else after SAVE_EVERY seconds and at the end."""
        if self.args.save_every:
            return is_due(done, self.args.save_every, self.args.max_steps)
        return done == self.args.max_steps or time.monotonic() - self._last_saved >= SAVE_EVERY

    def save(self, state: TrainingState, noise_scheduler: DDPMScheduler, done: int):
        """Write a checkpoint of the state after `done` steps, in the main process. Raises InputError."""
        if not self.accelerator.is_main_process:
            return
        self.watch.read_all()  # what is saved has been looked at
        metadata = self._metadata
        metadata["step"] = done
        metadata["losses"] = self.watch.losses
        batch_size = self.args.batch_size * self.args.grad_accum
        metadata["pictures_seen"] = self._pictures_before + done * batch_size
        if state.scaler:
            metadata["grad_scaler"] = state.scaler.state_dict()
        checkpoint.save(self.args.out, state, noise_scheduler, metadata, self.args.keep_checkpoints)
        draw_curves({"": read_log(self.args.out / LOG_NAME)}, self.args.out / CURVES_NAME)
        self._last_saved = time.monotonic()

    def end(self, done: int, is_stopping: bool):
        """Close log and trackers after `done` steps, and say how it went. Exits if a signal stopped the run
        before the last step: with 130 after Ctrl-C, else with 0."""
        self.watch.read_all()
        self.accelerator.end_training()
        out = self.args.out
        last = self.args.max_steps
        if is_stopping and done < last:
            where = f"step {done:,} of {last:,}"
            self.accelerator.print(f"{out}: stopped after {where}, which is saved; the same command goes on")
            raise SystemExit(130 if signal.SIGINT in self.stop else 0)
        self.accelerator.print(f"{out}: trained to step {last:,}; python sample.py --mode test")
