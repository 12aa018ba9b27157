"""Paint the scenes of label lists with a trained model and score them.

python sample.py --mode test             # images/test/0.png ..., images/test.png, images/test.json, accuracy
python sample.py --mode test new_test process          # what a lab asks for: both lists and a denoising strip
python sample.py --mode process --objects "red sphere" "cyan cube"          # images/process.png
python sample.py --mode my_list.json --weights runs/reference --steps 50 --sampler ddim
accelerate launch sample.py --mode test --num-images 50000   # several GPUs: the same pictures, shared out
"""

import argparse
import datetime
import json
import math
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from checkpoint import SHIPPED, load_weights, newest_weights
from dataset import (
    NUM_OBJECTS,
    ROOT,
    InputError,
    check_condition,
    command,
    load_conditions,
    load_objects,
    mistaken_labels,
    multi_hot,
    number,
    read_pictures,
    to_float,
    to_uint8,
    twin_labels,
)
from evaluator import evaluation_model
from model import choose_setup
from sampling import SAMPLERS, batch_size_for, generate, lift, picture_seed, prepare

PROCESS = ["red sphere", "cyan cylinder", "cyan cube"]  # what labs want to see come out of the noise
STRIP = 10  # pictures of it
SAMPLING = ("sampler", "steps", "guidance_scale", "guidance_interval")  # options that weights may bring along
SAMPLING += ("negative_scale", "negative_interval", "evaluator_scale")


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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--mode", required=True, nargs="+", help="test, new_test, validation, train, unseen (triples that "
        "occur nowhere in what the weights were trained on), files like test.json, or process: a picture "
        "coming out of the noise")  # fmt: skip
    add("--objects", nargs="+", metavar="OBJECT", help=f"of process (default: {', '.join(PROCESS)})")
    add("--weights", type=Path, help="folder (default: the newest run, else the weights that ship)")
    add("--out", type=Path, default=Path("images"), help="folder to write to (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="default: %(default)s")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--seeds", type=number(int, 1), default=1, metavar="N",
                        help="paint a list N times, with --seed and those after it (default: 1)")  # fmt: skip
    amount.add_argument("--num-images", type=number(int, 1), metavar="N", help="the same, up to N pictures")
    add("--batch-size", type=number(int, 1), help="pictures at a time (default: 64, on a CPU 16)")
    add("--mixed-precision", choices=("no", "bf16"), help="default: bf16 on CUDA, else no")
    add("--evaluator", type=Path, help="default: checkpoint.pth if it is there, else weights/evaluator.pth")

    group = parser.add_argument_group("sampling (defaults: what the weights were made for)")
    add, scale = group.add_argument, number(float, 0, 100)
    interval = {"type": number(float, 0, 1000), "nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--sampler", choices=SAMPLERS)
    add("--steps", type=number(int, 1, 1000), help="denoising steps, 1 to 1000")
    add("--guidance-scale", type=scale, help="1: no guidance")
    add("--guidance-interval", **interval, help="timesteps from LOW (clear) to HIGH (noise) that are guided")
    add("--negative-scale", type=scale,
        help="push away from two objects of a colour having one shape; 0: do not")  # fmt: skip
    add("--negative-interval", **interval, help="timesteps of that")
    add("--best-of", type=number(int, 1, 100), default=1, metavar="N",
        help="paint N candidates and keep the one that fits its label best by the model's own denoising "
        "error, without the evaluator (default: 1)")  # fmt: skip
    add("--lift-over", choices=("mistakes", "unconditional"), default="mistakes",
        help="of what --best-of compares a label's error with: labels with an object in another shape or "
        "twice, or none at all, which is blind to copies (default: %(default)s)")  # fmt: skip
    add("--evaluator-scale", type=scale,
        help="steer by the evaluator: the accuracy then says nothing about the model; 0: do not")  # fmt: skip
    args = parser.parse_args(argv)
    if args.objects and "process" not in args.mode:
        raise InputError("--objects is for --mode process; a list of conditions is a file like test.json")
    return args


def load_list(mode: str, args: argparse.Namespace, unseen: list, objects: dict[str, int]) -> tuple:
    """Label file and conditions that `mode` stands for. Raises InputError."""
    if mode == "process":
        return Path(mode), [check_condition(args.objects or PROCESS, objects, "--objects")]
    if mode == "unseen":
        if not unseen:
            raise InputError(f"{args.weights}: does not tell which triples it has not seen; train it anew")
        where = f"{args.weights}, unseen, entry"
        return Path(mode), [check_condition(c, objects, f"{where} {i}") for i, c in enumerate(unseen)]
    known = ROOT / f"{mode}.json"
    path = known if known.exists() else Path(mode)
    if (args.out / path.stem).with_suffix(".json").resolve() == path.resolve():
        raise InputError(f"{path}: the report of this list would overwrite it; choose another --out")
    return path, load_conditions(path, objects)


def clear(target: Path):
    """Remove what an earlier list left in `target`: it would pass for pictures of this one."""
    for old in [target.with_suffix(".json"), target.with_suffix(".png"), *target.glob("*.png")]:
        if old.parent != target or old.stem.isdigit():
            old.unlink(missing_ok=True)


def paint_list(paint, conditions, wanted: range, target: Path, size: int, passes: int, state) -> float:
    """Write the `wanted` pictures of a list into `target`, each process its share; returns the seconds."""
    if state.is_main_process:
        target.mkdir(exist_ok=True)
        clear(target)
    state.wait_for_everyone()
    batches = [wanted[i : i + size] for i in range(0, len(wanted), size)]
    mine = batches[state.process_index :: state.num_processes]
    start, quiet = time.perf_counter(), not state.is_main_process
    with tqdm(total=passes * len(mine), unit="step", disable=quiet, leave=False) as bar:
        for indices in mine:
            images = paint(conditions, indices, lambda _: bar.update())
            for i, image in zip(indices, to_uint8(images).cpu(), strict=True):
                to_pil_image(image).save(target / f"{i}.png")
    state.wait_for_everyone()
    return time.perf_counter() - start


def score(evaluator: evaluation_model, target: Path, conditions: list[list[str]], report: dict):
    """Score the pictures in `target`, write their report and the grid of the first of them beside it.

    Scored are the pictures as written, so `python evaluator.py` on the folder gives the same digits. A list
    that was painted several times gives as many accuracies; a part of it at the end is not scored.
    """
    pictures, labels = read_pictures(target, report["num_images"]), multi_hot(conditions, load_objects())
    accuracies, exact_sets = [], []
    for part in pictures.split(len(labels)):  # [N, 3, 64, 64]
        if len(part) == len(labels) or not accuracies:
            found = evaluator.probabilities(to_float(part))
            accuracies.append(evaluator.compute_acc(found, labels[: len(part)]))
            exact_sets.append(evaluator.exact_set(found, labels[: len(part)]))
    to_pil_image(make_grid(pictures[: len(labels)], nrow=8)).save(target.with_suffix(".png"))
    mean, exact_set, runs = statistics.mean(accuracies), statistics.mean(exact_sets), len(accuracies)
    deviation = statistics.stdev(accuracies) if runs > 1 else None
    scores = {"accuracy": mean, "standard_deviation": deviation, "exact_set": exact_set}
    scores |= {"accuracies": accuracies, "exact_sets": exact_sets, "evaluator": str(evaluator.path)}
    report = scores | report | {"conditions": conditions}
    target.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")

    rate = f"{report['seconds']:.1f} s, {report['num_images'] / report['seconds']:.2f} a second"
    print(f"pictures: {target}/0.png to {report['num_images'] - 1}.png ({rate}), grid: {target}.png")
    spread = f" (mean of {runs} seeds, standard deviation {deviation:.4f})" if deviation is not None else ""
    by = ", guided by the evaluator: no measure of the model" if report.get("evaluator_scale") else ""
    print(f"accuracy: {mean:.4f}{spread}, exact set: {exact_set:.4f}{by}")


def strip(frames: list[torch.Tensor]) -> torch.Tensor:
    """`STRIP` of the frames [1, 3, 64, 64] as a row: the first, the last, and more of the later ones, in
    which there is more to see."""
    way = 1 - torch.linspace(1, 0, min(STRIP, len(frames))) ** 1.7
    chosen = (way * (len(frames) - 1)).round().int().tolist()
    return make_grid(to_uint8(torch.cat([frames[i] for i in chosen])).cpu(), nrow=STRIP)


@command
def main(argv: list[str] | None = None):
    args, state = parse_args(argv), PartialState()  # the devices and processes there are
    args.weights = args.weights or newest_weights()
    model, noise_scheduler, metadata = load_weights(args.weights)
    state.print(describe(args.weights, metadata))
    options = metadata["sampling"] | {n: getattr(args, n) for n in SAMPLING if getattr(args, n) is not None}
    objects, evaluator = load_objects(), evaluation_model(args.evaluator, state.device)
    lists = [load_list(mode, args, metadata.get("unseen", []), objects) for mode in args.mode]
    names = [path.stem for path, _ in lists]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--mode: two lists named {repeated[0]} would share one folder; sample them apart")
    # Picture i shows condition i % N, with the seed that follows for each time through the list.
    amounts = [args.num_images or args.seeds * len(conditions) for _, conditions in lists]
    size = args.batch_size or batch_size_for(state.device)
    size = min(size, math.ceil(max(amounts) / state.num_processes))
    passes = options["steps"] * args.best_of  # of a batch
    batches = sum(math.ceil(amount / size / state.num_processes) for amount in amounts)
    setup = choose_setup(state.device, args.mixed_precision, passes * batches, training=False)
    state.print(setup)
    state.print(f"evaluator: {evaluator.path}; {json.dumps(options)}")
    eager_model, compiled_model = prepare(model, setup)

    def paint(conditions: list[list[str]], indices: range, callback, best_of=args.best_of) -> torch.Tensor:
        """Pictures [B, 3, 64, 64] in [-1, 1] of the `indices` of a list."""
        # Compiling once more for a smaller last batch would not pay.
        network = compiled_model if len(indices) == size else eager_model
        own = [conditions[i % len(conditions)] for i in indices]
        labels = multi_hot(own, objects).to(state.device)
        negatives = [twin_labels(condition, objects) for condition in own]
        places = [(args.seed + i // len(conditions), i % len(conditions)) for i in indices]
        candidates = []
        for k in range(best_of):
            seeds = [picture_seed(*place, k) for place in places]
            guides = {"negative_labels": negatives, "evaluator": evaluator.resnet18, "callback": callback}
            candidates.append(generate(network, noise_scheduler, labels, seeds, **options, **guides))
        if best_of == 1:
            return candidates[0]
        others = [torch.zeros(1, NUM_OBJECTS)] * len(own)
        if args.lift_over == "mistakes":
            others = [mistaken_labels(condition, objects) for condition in own]
        lifts = [lift(eager_model, noise_scheduler, images, labels, others) for images in candidates]
        return torch.stack(candidates)[torch.stack(lifts).argmax(0), torch.arange(len(own))]

    for (path, conditions), amount in zip(lists, amounts, strict=True):
        target = args.out / path.stem  # folder of pictures; grid and report beside it
        args.out.mkdir(parents=True, exist_ok=True)
        if path.name == "process":
            if state.is_main_process:
                frames = []
                frames.append(paint(conditions, range(1), frames.append, best_of=1))
                to_pil_image(strip(frames)).save(target.with_suffix(".png"))
                print(f"process: {target}.png, {', '.join(conditions[0])}")
            continue
        seconds = paint_list(paint, conditions, range(amount), target, size, passes, state)
        if state.is_main_process:
            report = {"labels": path.name, "num_images": amount, "seed": args.seed, **options}
            if args.best_of > 1:
                report |= {"best_of": args.best_of, "lift_over": args.lift_over}
            report |= {"precision": setup.precision, "seconds": round(seconds, 2)}
            report |= {"weights": str(args.weights), "model": metadata["model"]}
            report |= {"pictures_seen": metadata["pictures_seen"], "device": device_name(state.device)}
            report |= {name: version(name) for name in ("torch", "diffusers")}
            report |= {"date": datetime.date.today().isoformat()}
            score(evaluator, target, conditions, report)


if __name__ == "__main__":
    main()
