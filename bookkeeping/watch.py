"""What the host knows of the steps of a training run, which the device may not have finished yet; the log."""

import argparse
import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from accelerate import Accelerator

import checkpoint
from bookkeeping.curves import LOG_NAME
from infra.commands import InputError
from infra.device import start_copy

MOST_SKIPPED = 50  # steps in a row that fp16 may leave out as their gradients overflow


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


class Step(NamedTuple):
    """A step whose numbers are on their way from the device."""

    number: int  # from 0
    read: Callable[[], list[float]]  # gives them, and waits for them if need be
    learning_rate: float
    pictures: torch.Tensor  # indices [B]


class Watch:
    """Reads loss and gradient norm of each step, stops the run if they are not finite, and writes the log.

    The numbers of a step are read `lag` steps later, so that the host, which by then has given the device the
    next steps to do, need not wait. A lag of 1 is for an optimizer that by itself leaves the weights alone
    where a number is not finite. `losses`: of the steps since the last line in the log, from a checkpoint.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        filenames: list[str],
        accelerator: Accelerator,
        lag: int,
        first_step: int,
        losses: list[float],
    ):
        self.args = args
        self.accelerator = accelerator
        self.lag = lag
        self.filenames = filenames  # of all pictures
        self.losses = losses  # since the last line in the log
        self.bar: Any = None  # to show the loss in
        self._steps: deque[Step] = deque()
        self._stop_step: int | None = None  # in which a signal to stop had arrived, in any process
        self._skipped = 0  # steps in a row
        self._batch_size = args.batch_size * args.grad_accum
        self._last_logged = first_step
        self._last_time = time.perf_counter()
        self._shown: dict[str, str] = {}  # in the bar
        self._log: TextIO | None = None
        if accelerator.is_main_process:
            self._log = open_log(args.out / LOG_NAME, first_step)

    def put(self, index: int, numbers: torch.Tensor, learning_rate: float, pictures: torch.Tensor):
        """Give it loss, gradient norm, and above 0 if a process is to stop: [3] on the device; `pictures`:
        which ones the step was of, indices [B] on the CPU."""
        self._steps.append(Step(index, start_copy(numbers), learning_rate, pictures))
        self._read(self.lag)

    def read_all(self):
        """Take in the numbers of all steps. Raises InputError if some are not finite, as `put` does."""
        self._read(0)

    def is_stopping(self, index: int) -> bool:
        """Whether to stop after this step: the same in all processes, also where one has read more."""
        return self._stop_step is not None and index >= self._stop_step + self.lag

    def _read(self, lag: int):
        while len(self._steps) > lag:
            step = self._steps.popleft()
            loss, norm, stops = step.read()
            self._check(step, loss, norm)
            self.losses.append(loss)
            if stops and self._stop_step is None:
                self._stop_step = step.number
            if (step.number + 1) % self.args.log_every == 0 or step.number + 1 == self.args.max_steps:
                self._write(step, norm)

    def _check(self, step: Step, loss: float, norm: float):
        # In fp16 the gradient scaler leaves out a step whose gradient overflows, and then scales less.
        overflows = self.accelerator.scaler is not None and math.isfinite(loss) and not math.isfinite(norm)
        self._skipped = self._skipped + 1 if overflows else 0
        if math.isfinite(loss + norm) or overflows and self._skipped <= MOST_SKIPPED:
            return
        saved = checkpoint.checkpoints(self.args.out)
        filenames = ", ".join(self.filenames[i] for i in step.pictures)
        raise InputError(
            f"{self.args.out}: loss {loss:.4g}, gradient norm {norm:.4g} in step {step.number + 1:,}, "
            f"stopped before the weights were touched; last good checkpoint: "
            f"{saved[-1] if saved else 'none yet'}; try a lower --learning-rate in another --out; "
            f"pictures of the step: {filenames}"
        )

    def _write(self, step: Step, norm: float):
        done = step.number + 1
        now = time.perf_counter()
        pictures = (done - self._last_logged) * self._batch_size
        entry = {
            "step": done,
            "pictures": done * self._batch_size,
            "loss": statistics.mean(self.losses),
            "gradient_norm": norm,
            "learning_rate": step.learning_rate,
            "pictures_per_second": pictures / (now - self._last_time),
        }
        self.losses = []
        self._last_logged = done
        self._last_time = now
        self._store(entry)

    def note_scores(self, done: int, scores: dict[str, float]):
        """Log what the evaluator found after `done` steps: a line of its own."""
        self._store({"step": done, "pictures": done * self._batch_size, **scores})

    def _store(self, entry: dict):
        self.accelerator.log(entry, step=entry["step"])
        if self._log:
            self._log.write(json.dumps(entry) + "\n")
            shown = {name: entry[name] for name in ("loss", "accuracy") if name in entry}
            self._shown.update({name: f"{value:.4f}" for name, value in shown.items()})
            self.bar.set_postfix(**self._shown)
