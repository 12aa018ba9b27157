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
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from torchvision.utils import make_grid
from tqdm import tqdm

from checkpoint import (
    SHIPPED,
    fingerprint,
    load_weights,
    lock,
    missing_pictures,
    newest,
    newest_weights,
    start_list,
    write_picture,
    write_whole,
)
from dataset import (
    NUM_OBJECTS,
    ROOT,
    InputError,
    check_condition,
    command,
    file_sha256,
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
from model import choose_setup, is_out_of_memory
from sampling import RANGES, SAMPLERS, batch_size_for, generate, lift, picture_seed, prepare

PROCESS = ["red sphere", "cyan cylinder", "cyan cube"]  # what labs want to see come out of the noise
STRIP = 10  # pictures of it
CODE = ("sample.py", "sampling.py", "model.py", "dataset.py")  # that decides what the pictures look like


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


def paint_list(paint, conditions, target: Path, settings: dict, passes: int, state) -> dict:
    """Write the pictures of a list that are missing in `target`, each process its share.

    Returns the list's report: `settings` and, of the newest run that had any to paint, how many, how long it
    took, and the date. A batch of which a picture is missing is painted whole, so that what is written does
    not depend on where an earlier run was stopped.
    """
    report = start_list(target, settings) if state.is_main_process else {}
    state.wait_for_everyone()
    missing, size = set(missing_pictures(target, settings["num_images"])), settings["batch_size"]
    state.wait_for_everyone()  # before the first writes one
    batches = [range(settings["num_images"])[i : i + size] for i in range(0, settings["num_images"], size)]
    batches = [batch for batch in batches if missing.intersection(batch)]
    mine = batches[state.process_index :: state.num_processes]
    start, quiet = time.perf_counter(), not state.is_main_process
    with tqdm(total=passes * len(mine), unit="step", disable=quiet, leave=False) as bar:
        for indices in mine:
            images = paint(conditions, indices, lambda _: bar.update())
            for i, image in zip(indices, to_uint8(images).cpu(), strict=True):
                if i in missing:
                    write_picture(target / f"{i}.png", image)
    state.wait_for_everyone()
    seconds, how = time.perf_counter() - start, "all there before"
    if missing or "date" not in report:
        report |= {"painted": len(missing), "seconds": round(seconds, 2)}
        report["date"] = datetime.date.today().isoformat()
    if missing:
        how = f"{len(missing)} painted in {seconds:.1f} s, {len(missing) / seconds:.2f} a second"
    state.print(f"pictures: {target}/0.png to {settings['num_images'] - 1}.png ({how})")
    return report


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
    write_picture(target.with_suffix(".png"), make_grid(pictures[: len(labels)], nrow=8))
    mean, exact_set, runs = statistics.mean(accuracies), statistics.mean(exact_sets), len(accuracies)
    deviation = statistics.stdev(accuracies) if runs > 1 else None
    scores = {"accuracy": mean, "standard_deviation": deviation, "exact_set": exact_set}
    scores |= {"accuracies": accuracies, "exact_sets": exact_sets, "evaluator": str(evaluator.path)}
    report = scores | {name: value for name, value in report.items() if name not in scores}
    write_whole(target.with_suffix(".json"), (json.dumps(report, indent=1) + "\n").encode())

    print(f"grid: {target}.png, report: {target}.json")
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
    args.weights = newest(args.weights or newest_weights())  # now: a run may be saving newer ones
    model, noise_scheduler, metadata = load_weights(args.weights)
    state.print(describe(args.weights, metadata))
    given = {name: getattr(args, name) for name in ("sampler", *RANGES)}
    options = metadata["sampling"] | {name: value for name, value in given.items() if value is not None}
    objects, evaluator = load_objects(), evaluation_model(args.evaluator, state.device)
    lists = [load_list(mode, args, metadata["unseen"], objects) for mode in args.mode]
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

    facts = {"precision": setup.precision, "batch_size": size, "weights": str(args.weights)}
    facts |= {"model": metadata["model"], "pictures_seen": metadata["pictures_seen"]}
    facts |= {"device": device_name(state.device), "weights_sha256": fingerprint(args.weights)}
    facts |= {f"{name}_sha256": file_sha256(ROOT / name) for name in CODE}
    facts |= {name: version(name) for name in ("torch", "diffusers")}
    for (path, conditions), amount in zip(lists, amounts, strict=True):
        target = args.out / path.stem  # folder of pictures; grid and report beside it
        if path.name == "process":
            if state.is_main_process:
                target.parent.mkdir(parents=True, exist_ok=True)
                frames = []
                frames.append(paint(conditions, range(1), frames.append, best_of=1))
                write_picture(target.with_suffix(".png"), strip(frames))
                print(f"process: {target}.png, {', '.join(conditions[0])}")
            continue
        settings = {"labels": path.name, "num_images": amount, "seed": args.seed, **options}
        if args.best_of > 1:
            settings |= {"best_of": args.best_of, "lift_over": args.lift_over}
        if options.get("evaluator_scale"):
            settings |= {"evaluator_sha256": file_sha256(evaluator.path)}
        settings |= facts | {"conditions": conditions}
        with lock(target) if state.is_main_process else nullcontext():
            try:
                report = paint_list(paint, conditions, target, settings, passes, state)
            except KeyboardInterrupt:
                print(f"{target}: stopped; the same command paints what is missing", file=sys.stderr)
                raise SystemExit(130) from None
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise InputError(
                    f"{state.device}: out of memory; try --batch-size {max(1, size // 2)}"
                ) from None
            if state.is_main_process:
                score(evaluator, target, conditions, report)


if __name__ == "__main__":
    main()
