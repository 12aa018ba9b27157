"""Paint the scenes of label lists with a trained model and score them.

python sample.py --mode test             # images/test/0.png ..., images/test.png, images/test.json, accuracy
python sample.py --mode test new_test process          # what a lab asks for: both lists and a denoising strip
python sample.py --mode process --objects "red sphere" "cyan cube"          # images/process.png
python sample.py --mode my_list.json --weights runs/reference --steps 50 --sampler ddim
accelerate launch sample.py --mode test --num-images 50000   # several GPUs: the same pictures, shared out
"""

import argparse
from pathlib import Path

from infra.commands import ROOT, InputError, Parser, command, number, read_early, to_path, to_seed
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
    add(
        "--evaluator", type=to_path, help="default: checkpoint.pth if it is there, else weights/evaluator.pth"
    )

    group = parser.add_argument_group("sampling (defaults: what the weights were made for)")
    add, kinds = group.add_argument, {name: number(float, *RANGES[name]) for name in RANGES}
    interval = {"nargs": 2, "metavar": ("LOW", "HIGH")}
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
import datetime
import functools
import json
import statistics
import sys
import time
from importlib.metadata import version

import torch
from torchvision.utils import make_grid
from tqdm import tqdm

from checkpoint import SHIPPED, fingerprint, load_weights, newest, newest_weights
from dataset import read_pictures, to_uint8, write_picture
from diffusion import STOCHASTIC, batch_size_for, paint
from infra.device import choose_precision, choose_setup, explained, join_processes, prepare
from infra.files import file_sha256, lock, write_json
from infra.lists import SAMPLING_VERSION, STRIP, PictureList, load_list
from labels import load_objects, multi_hot
from scoring import Scoring, load_evaluator


def describe(folder: Path, metadata: dict) -> str:
    seen = metadata["pictures_seen"]
    epoch = metadata["data"]["labelled"]
    line = f"weights: {folder} ({metadata['model']}, trained on {seen:,} pictures"
    if seen < epoch:
        line += f", less than one epoch of {epoch:,}; trained ones ship in {SHIPPED.relative_to(ROOT)}"
    return line + ")"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def batches_of(lists: list[PictureList], size: int) -> list[list[tuple[PictureList, int]]]:
    """All pictures in one queue, as (list, index), in batches of `size`, less those that are all there.

    A batch of which some are missing is painted whole, so that what is written does not depend on where an
    earlier run was stopped.
    """
    queue = [(one, i) for one in lists for i in range(len(one.places))]
    batches = [queue[start : start + size] for start in range(0, len(queue), size)]
    return [batch for batch in batches if any(i in one.missing for one, i in batch)]


def paint_batches(batches: list, size: int, painter, begin, bar: tqdm):
    """Paint `batches_of` lists and write what was missing. `size`: what each is filled up to.

    `painter(conditions, places, callback)` gives pictures [B, 3, 64, 64], as `sampling.paint` does. `begin()`
    is called once, before the first picture is written.
    """
    has_begun = False
    for batch in batches:
        filled = batch + batch[-1:] * (size - len(batch))
        strips = [(place, one) for place, (one, i) in enumerate(batch) if one.is_process and i in one.missing]

        def look(images: torch.Tensor, strips=strips):
            bar.update()
            for place, one in strips:
                one.frames.append(images[place].clone())  # a part of the batch would keep the whole of it

        conditions = [one.conditions[one.places[i][1]] for one, i in filled]
        images = painter(conditions, [one.places[i] for one, i in filled], callback=look)
        if not has_begun:
            begin()
            has_begun = True
        for image, (one, i) in zip(to_uint8(images).cpu(), batch, strict=False):
            if i in one.missing and not one.is_process:
                write_picture(one.picture_path(i), image)
    if not has_begun:
        begin()


def strip(frames: list[torch.Tensor]) -> torch.Tensor:
    """`STRIP` of the frames [3, 64, 64] as a row: the first, the last, and more of the later ones, in which
    there is more to see."""
    way = 1 - torch.linspace(1, 0, min(STRIP, len(frames))) ** 1.7
    chosen = (way * (len(frames) - 1)).round().int().tolist()
    return make_grid(to_uint8(torch.stack([frames[i] for i in chosen])).cpu(), nrow=STRIP)


def note_painting(one: PictureList, seconds: float):
    """Note in the report how many pictures were painted, how long that took at `seconds` a picture of all
    lists, and the date: of the newest run that had any to paint."""
    how, count = "all there before", len(one.missing)
    if count or "date" not in one.report:
        one.report["painted"] = count
        one.report["seconds"] = round(count * seconds, 2)
        one.report["date"] = datetime.date.today().isoformat()
    if count:
        how = f"{count} painted in {count * seconds:.1f} s, {1 / seconds:.2f} a second"
    print(f"pictures: {one.target}/0.png to {len(one.places) - 1}.png ({how})")


def score(evaluator: Scoring, one: PictureList):
    """Score the pictures of a list, write their report and the grid of the first of them.

    Scored are the pictures as written, so `python evaluator.py` on the folder gives the same digits. A list
    that was painted several times gives as many accuracies; a part of it at the end is not scored.
    """
    pictures = read_pictures(one.target, len(one.places))
    labels = multi_hot(one.conditions, load_objects())
    accuracies, exact_sets = [], []
    for part in pictures.split(len(labels)):  # [N, 3, 64, 64]
        if len(part) == len(labels) or not accuracies:
            found = evaluator.judge(part)
            accuracies.append(evaluator.compute_acc(found, labels[: len(part)]))
            exact_sets.append(evaluator.exact_set(found, labels[: len(part)]))
    write_picture(one.grid_path, make_grid(pictures[: len(labels)], nrow=8))
    mean, exact_set, runs = statistics.mean(accuracies), statistics.mean(exact_sets), len(accuracies)
    deviation = statistics.stdev(accuracies) if runs > 1 else None
    scores = {"accuracy": mean, "standard_deviation": deviation, "exact_set": exact_set}
    scores |= {"accuracies": accuracies, "exact_sets": exact_sets, "evaluator": str(evaluator.path)}
    report = scores | {name: value for name, value in one.report.items() if name not in scores}
    write_json(one.report_path, report)

    print(f"grid: {one.grid_path}, report: {one.report_path}")
    spread = f" (mean of {runs} seeds, standard deviation {deviation:.4f})" if deviation is not None else ""
    by = ", guided by the evaluator: no measure of the model" if report.get("evaluator_scale") else ""
    print(f"accuracy: {mean:.4f}{spread}, exact set: {exact_set:.4f}{by}")


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


def claim(lists: list[PictureList], settings: dict, overwrite: bool, state, stack: contextlib.ExitStack):
    """Lock the folders of the lists until `stack` ends, and find out what is missing. Raises InputError."""
    if state.is_main_process:
        for one in lists:
            one.read_report()  # refuses before the lock makes a folder
            if not one.is_process:
                stack.enter_context(lock(one.target))
    with state.main_process_first():  # so that a mistake is told once
        for one in lists:
            one.plan(settings, overwrite)


def settings_of(
    args: argparse.Namespace, options: dict, size: int, metadata: dict, evaluator: Scoring, device
) -> dict:
    """How the pictures of any list are painted, for the reports; lists.DECISIVE names what decides."""
    precision, _ = choose_precision(device, args.mixed_precision)
    settings = {
        "seed": args.seed,
        **options,
        "precision": precision,
        "batch_size": size,
        "weights": str(args.weights),
        "model": metadata["model"],
        "pictures_seen": metadata["pictures_seen"],
        "device": device_name(device),
        "weights_sha256": fingerprint(args.weights),
        "sampling_version": SAMPLING_VERSION,
    }
    if options["sampler"] in STOCHASTIC:  # each kind of device has random numbers of its own
        settings["noise_from"] = device.type
    if args.best_of > 1:
        settings["best_of"] = args.best_of
        settings["lift_over"] = args.lift_over
    if options.get("evaluator_scale"):
        settings["evaluator_sha256"] = file_sha256(evaluator.path)
    for name in ("torch", "diffusers"):
        settings[name] = version(name)
    return settings


@command
def main(argv: list[str] | None = None):
    args, state = parse_args(argv), join_processes()
    is_main = state.is_main_process
    args.weights = newest(args.weights or newest_weights())  # now: a run may be saving newer ones
    model, noise_scheduler, metadata = load_weights(args.weights)
    state.print(describe(args.weights, metadata))
    given = {name: getattr(args, name) for name in ("sampler", *RANGES)}
    options = metadata["sampling"] | {name: value for name, value in given.items() if value is not None}
    objects, evaluator = load_objects(), load_evaluator(args.evaluator, state.device)
    lists = [load_list(mode, args, metadata["unseen"], objects) for mode in args.mode]
    names = [one.target.name for one in lists]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--mode: two lists named {repeated[0]} would share one folder; sample them apart")
    amount = sum(len(one.places) for one in lists)
    size = batch_size_for(state.device, amount, state.num_processes, args.batch_size)
    settings = settings_of(args, options, size, metadata, evaluator, state.device)

    with contextlib.ExitStack() as stack:
        smaller = f"; try --batch-size {size // 2}" if size > 1 else ""
        stack.enter_context(explained(state.device, f"with --batch-size {size}{smaller}"))
        stack.enter_context(endings_explained(lists, args.weights))
        claim(lists, settings, args.overwrite, state, stack)

        def begin():
            state.wait_for_everyone()  # all have painted a batch, so nothing is lost where that fails
            if is_main:
                for one in lists:
                    one.begin()
            state.wait_for_everyone()

        batches = batches_of(lists, size)
        mine = batches[state.process_index :: state.num_processes]
        passes = options["steps"] * args.best_of * len(mine)
        setup = choose_setup(state, args.mixed_precision, passes, training=False)
        state.print(setup)
        state.print(f"evaluator: {evaluator.path}; {json.dumps(options)}")
        plain_network, network = prepare(model, setup)
        painter = functools.partial(
            paint, network, plain_network, noise_scheduler, options=options, device=state.device,
            evaluator=evaluator.resnet18, best_of=args.best_of, lift_over=args.lift_over,
        )  # fmt: skip
        start = time.perf_counter()
        calls = (options["steps"] + 1) * args.best_of * len(mine)
        with tqdm(total=calls, unit="step", disable=not is_main, leave=False) as bar:
            # On a CPU no batch is filled up: that costs time, and nothing there wants batches of one size.
            paint_batches(mine, 0 if state.device.type == "cpu" else size, painter, begin, bar)
        for one in lists:
            if one.frames:  # in the process that painted it, of the first candidate
                write_picture(one.grid_path, strip(one.frames[: options["steps"] + 1]))
        state.wait_for_everyone()
        seconds = (time.perf_counter() - start) / max(1, sum(len(one.missing) for one in lists))
        for one in lists:
            if is_main and one.is_process:
                print(f"process: {one.grid_path}, {', '.join(one.conditions[0])}")
            elif is_main:
                note_painting(one, seconds)
                score(evaluator, one)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
