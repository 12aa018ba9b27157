"""Paint the scenes of label lists with a trained model and score them.

python sample.py --mode test             # images/test/0.png ..., images/test.png, images/test.json, accuracy
python sample.py --mode test new_test process          # what a lab asks for: both lists and a denoising strip
python sample.py --mode process --objects "red sphere" "cyan cube"          # images/process.png
python sample.py --mode my_list.json --weights runs/reference --steps 50 --sampler ddim
accelerate launch sample.py --mode test --num-images 50000   # several GPUs: the same pictures, shared out
"""

import argparse
from pathlib import Path
from typing import Any

from infra.commands import InputError, Parser, command, number, read_early, to_path, to_seed
from infra.signals import signals_interrupt
from options import PRECISIONS, RANGES, SAMPLERS


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Paint the scenes of label lists with a trained model and score them.")
    add = parser.add_argument
    add("--mode", required=True, nargs="+", help="test, new_test, validation, train, unseen (triples that "
        "occur nowhere in what the weights were trained on), files like test.json, or process: a picture "
        "coming out of the noise")  # fmt: skip
    add("--objects", nargs="+", metavar="OBJECT", help="of process (default: what labs ask for)")
    add("--weights", type=to_path, help="folder (default: the newest run, else the weights that ship)")
    add("--out", type=to_path, default=Path("images"), help="folder to write to (default: %(default)s)")
    add("--overwrite", action="store_true", help="paint lists anew that are there with other settings")
    add("--seed", type=to_seed, default=0, help="default: %(default)s")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--seeds", type=number(int, 1), default=1, metavar="N",
                        help="paint a list N times, with --seed and those after it (default: 1)")  # fmt: skip
    amount.add_argument("--num-images", type=number(int, 1), metavar="N", help="the same, up to N pictures")
    add("--batch-size", type=number(int, 1), help="pictures at a time (default: 64, on a CPU 16)")
    add("--mixed-precision", choices=PRECISIONS, help="default: what is fastest here")
    add("--evaluator", type=to_path, help="default: checkpoint.pth if it is there, else weights/evaluator.pth")

    group = parser.add_argument_group("sampling (defaults: what the weights were made for)")
    add = group.add_argument
    kinds = {name: number(float, *RANGES[name]) for name in RANGES}
    interval: dict[str, Any] = {"nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--sampler", choices=SAMPLERS)
    add("--steps", type=number(int, *RANGES["steps"]), help="denoising steps, 1 to 1000")
    add("--guidance-scale", type=kinds["guidance_scale"], help="1: no guidance")
    add("--guidance-interval", type=kinds["guidance_interval"], **interval,
        help="timesteps from LOW (clear) to HIGH (noise) that are guided")  # fmt: skip
    add("--negative-scale", type=kinds["negative_scale"],
        help="push away from two objects of a colour having one shape; 0: do not")  # fmt: skip
    add("--negative-interval", type=kinds["negative_interval"], **interval, help="timesteps of that")
    add("--best-of", type=number(int, 1, 100), default=1, metavar="N",
        help="paint N candidates and keep the one that fits its label best by the model's own denoising "
        "error, without the evaluator (default: 1)")  # fmt: skip
    add("--lift-over", choices=("mistakes", "unconditional"), default="mistakes",
        help="of what --best-of compares a label's error with: labels with an object in another shape or "
        "twice, or none at all, which is blind to copies (default: %(default)s)")  # fmt: skip
    add("--evaluator-scale", type=kinds["evaluator_scale"],
        help="steer by the evaluator: the accuracy then says nothing about the model; 0: do not")  # fmt: skip
    args = parser.parse_args(argv)
    if args.objects and "process" not in args.mode:
        parser.error("--objects is for --mode process; a list of conditions is a file like test.json")
    return args


if __name__ == "__main__":
    read_early(parse_args)

import contextlib
import json
import statistics
import sys
import time

import torch
from accelerate import PartialState
from torchvision.utils import make_grid
from tqdm import tqdm

from bookkeeping.lists import PictureList, claim, load_lists, settings_of, strip
from checkpoint import describe, load_weights, newest, newest_weights
from dataset import read_pictures, to_uint8, write_picture
from infra.device import batch_size_for, choose_setup, explained, join_processes, prepare
from infra.files import write_json
from lab import load_evaluator
from label_files import load_objects
from labels import multi_hot
from pipeline import Painter
from scoring import Scoring

# ----------------------------------------------------------------------------------------- lists to pictures


Batch = list[tuple[PictureList, int]]  # pictures as (list, index)


def batches_of(lists: list[PictureList], size: int) -> list[Batch]:
    """All pictures in one queue, in batches of `size`, less those that are all there.

    A batch of which some are missing is painted whole, so that what is written does not depend on where an
    earlier run was stopped.
    """
    queue = [(one, i) for one in lists for i in range(len(one.places))]
    batches = [queue[start : start + size] for start in range(0, len(queue), size)]
    return [batch for batch in batches if any(i in one.missing for one, i in batch)]


def paint_batch(batch: Batch, size: int, painter: Painter, bar: tqdm) -> torch.Tensor:
    """The pictures of a batch, uint8 [B, 3, 64, 64] on the CPU. `size`: what it is filled up to.

    Of a strip, the frames are kept on the way.
    """
    filled = batch + batch[-1:] * (size - len(batch))
    strips = [(place, one) for place, (one, i) in enumerate(batch) if one.is_process and i in one.missing]

    def look(images: torch.Tensor) -> torch.Tensor:
        bar.update()
        for place, one in strips:
            if len(one.frames) <= painter.options["steps"]:  # of the first candidate
                one.frames.append(images[place].clone())  # a part of the batch would keep the whole of it
        return images

    conditions = [one.conditions[one.places[i][1]] for one, i in filled]
    images = painter.paint(conditions, [one.places[i] for one, i in filled], callback=look)
    return to_uint8(images[: len(batch)]).cpu()


def begin(lists: list[PictureList], state: PartialState):
    """Claim files and folders of the lists on disk. Once all processes have painted a batch, so that nothing
    is lost where that fails."""
    state.wait_for_everyone()
    if state.is_main_process:
        for one in lists:
            one.begin()
    state.wait_for_everyone()


def paint_lists(
    lists: list[PictureList], batches: list[Batch], size: int, painter: Painter, bar: tqdm, state: PartialState
):
    """Paint the `batches` of this process and write the pictures that are missing."""
    has_begun = False
    for batch in batches:
        images = paint_batch(batch, size, painter, bar)
        if not has_begun:
            begin(lists, state)
            has_begun = True
        for image, (one, i) in zip(images, batch, strict=True):
            if i in one.missing and not one.is_process:
                write_picture(one.picture_path(i), image)
    if not has_begun:
        begin(lists, state)


# ---------------------------------------------------------------------------------------- pictures to scores


def score(evaluator: Scoring, one: PictureList):
    """Score the pictures of a list, write their report and the grid of the first of them.

    Scored are the pictures as written, so `python evaluator.py` on the folder gives the same digits. A list
    that was painted several times gives as many accuracies; a part of it at the end is not scored.
    """
    pictures = read_pictures(one.target, len(one.places))
    labels = multi_hot(one.conditions, load_objects())
    accuracies: list[float] = []
    exact_sets: list[float] = []
    for part in pictures.split(len(labels)):  # [N, 3, 64, 64]
        if len(part) == len(labels) or not accuracies:
            found = evaluator.judge(part)
            accuracies.append(evaluator.compute_acc(found, labels[: len(part)]))
            exact_sets.append(evaluator.exact_set(found, labels[: len(part)]))
    write_picture(one.grid_path, make_grid(pictures[: len(labels)], nrow=8))
    scores = {
        "accuracy": statistics.mean(accuracies),
        "standard_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "exact_set": statistics.mean(exact_sets),
        "accuracies": accuracies,
        "exact_sets": exact_sets,
        "evaluator": str(evaluator.path),
    }
    report = scores | {name: value for name, value in one.report.items() if name not in scores}
    write_json(one.report_path, report)

    print(f"grid: {one.grid_path}, report: {one.report_path}")
    spread = ""
    if len(accuracies) > 1:
        deviation = scores["standard_deviation"]
        spread = f" (mean of {len(accuracies)} seeds, standard deviation {deviation:.4f})"
    by = ", guided by the evaluator: no measure of the model" if report.get("evaluator_scale") else ""
    print(f"accuracy: {scores['accuracy']:.4f}{spread}, exact set: {scores['exact_set']:.4f}{by}")


def finish(lists: list[PictureList], evaluator: Scoring, start: float, state: PartialState):
    """Write the strip and score the lists; `start`: when painting began, by time.perf_counter()."""
    for one in lists:
        if one.frames:  # in the process that painted it
            write_picture(one.grid_path, strip(one.frames))
    state.wait_for_everyone()
    seconds = time.perf_counter() - start
    if not state.is_main_process:
        return
    painted = sum(len(one.missing) for one in lists)
    for one in lists:
        if one.is_process:
            print(f"process: {one.grid_path}, {', '.join(one.conditions[0])}")
        else:
            one.note_painting(seconds / max(1, painted))
            score(evaluator, one)


# --------------------------------------------------------------------------------------------------- command


@contextlib.contextmanager
def endings_explained(lists: list[PictureList], weights: Path):
    """Say where Ctrl-C, or a signal of the system, ended the painting, and how it goes on; say which weights
    give numbers that are no picture."""
    try:
        with signals_interrupt():
            yield
    except KeyboardInterrupt:
        where = ", ".join(str(one.target) for one in lists)
        print(f"{where}: stopped; the same command paints what is missing", file=sys.stderr)
        raise SystemExit(130) from None
    except FloatingPointError as error:
        raise InputError(f"{weights}: {error}; of these pictures none is written") from None


@command
def main(argv: list[str] | None = None):
    args = parse_args(argv)
    state = join_processes()
    args.weights = newest(args.weights or newest_weights())  # now: a run may be saving newer ones
    model, noise_scheduler, metadata = load_weights(args.weights)
    state.print(describe(args.weights, metadata))
    given = {name: getattr(args, name) for name in ("sampler", *RANGES)}
    options = metadata["sampling"] | {name: value for name, value in given.items() if value is not None}
    evaluator = load_evaluator(args.evaluator, state.device)
    lists = load_lists(args, metadata["unseen"])
    amount = sum(len(one.places) for one in lists)
    size = batch_size_for(state.device, amount, state.num_processes, args.batch_size)
    settings = settings_of(args, options, size, metadata, evaluator, state.device)

    with contextlib.ExitStack() as stack:
        smaller = f"; try --batch-size {size // 2}" if size > 1 else ""
        stack.enter_context(explained(state.device, f"with --batch-size {size}{smaller}"))
        stack.enter_context(endings_explained(lists, args.weights))
        claim(lists, settings, args.overwrite, state, stack)
        batches = batches_of(lists, size)[state.process_index :: state.num_processes]
        setup = choose_setup(
            state, args.mixed_precision, options["steps"] * args.best_of * len(batches), training=False
        )
        state.print(setup)
        state.print(f"evaluator: {evaluator.path}; {json.dumps(options)}")
        plain_network, network = prepare(model, setup)
        painter = Painter(
            network, plain_network, noise_scheduler, load_objects(), options, state.device, evaluator.resnet18,
            args.best_of, args.lift_over,
        )  # fmt: skip
        start = time.perf_counter()
        calls = (options["steps"] + 1) * args.best_of * len(batches)
        # On a CPU no batch is filled up: that costs time, and nothing there wants batches of one size.
        filled = 0 if state.device.type == "cpu" else size
        with tqdm(total=calls, unit="step", disable=not state.is_main_process, leave=False) as bar:
            paint_lists(lists, batches, filled, painter, bar, state)
        finish(lists, evaluator, start, state)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
