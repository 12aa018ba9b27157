"""Composition of single objects (AND, Liu et al., arXiv 2206.01714) against the label of the whole scene.

    python benchmarks/studies/composition.py --weights DIR --out docs/composition.json   # prints a table, Markdown

The network is asked once for each object alone, and the guidance of all of them is added up:
unconditional + w * sum over objects (prediction given that object - unconditional). So a model that has only seen
single objects could paint scenes. Ours has seen scenes; this says what their labels are worth. Both ways are sampled
without negative prompting, with the same seeds, noise and guidance. What the file already holds is not sampled again.
"""

import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from checkpoint import SHIPPED, load_weights
from dataset import to_uint8
from diffusion import Network
from infra.commands import Parser, command, number, to_path
from infra.device import choose_setup, device_name, join_processes, prepare
from infra.files import load_json, write_json
from lab import load_evaluator
from label_files import load_conditions, load_objects
from pipeline import Painter
from report.metrics import judge, measure, spread
from studies.steps import stored_results

LISTS = ("validation", "test", "new_test")
BATCH_SIZE = 16
MEASURES = ("accuracy", "exact_set", "both")


def composed(network: Network) -> Network:
    """A network that adds up what each object of a label changes: with a label of one object, or of none, it predicts
    what `network` does."""

    def predict(images: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        unconditional = network(images, timesteps, torch.zeros_like(labels))
        pictures, objects = labels.nonzero(as_tuple=True)
        if len(pictures) == 0:
            return unconditional
        alone = torch.nn.functional.one_hot(objects, labels.shape[1]).to(labels.dtype)
        changes = network(images[pictures], timesteps[pictures], alone) - unconditional[pictures]
        return unconditional.index_add(0, pictures, changes.to(unconditional.dtype))

    return predict


def score(painter: Painter, conditions: list[list[str]], seed: int, evaluator) -> dict[str, float]:
    """The measures of a list, painted once with a seed."""
    parts = []
    for start in range(0, len(conditions), BATCH_SIZE):
        part = conditions[start : start + BATCH_SIZE]
        parts.append(to_uint8(painter.paint(part, [(seed, start + i) for i in range(len(part))])).cpu())
    found = measure(judge(torch.cat(parts), conditions, evaluator))
    return {name: round(found[name], 4) for name in MEASURES}


def table(results: dict[str, dict]):
    print("| label | list | accuracy | exact set | right for both judges |\n" + "|---" * 5 + "|")
    for name, scores in results.items():
        how, _, where = name.partition(" ")
        cells = [spread([one[measured] for one in scores["seeds"].values()]) for measured in MEASURES]
        print(f"| {how} | {where} | {cells[0]} | {cells[1].mean:.3f} | {cells[2].mean:.3f} |")


@command
def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=to_path, required=True, help="JSON file of the results")
    parser.add_argument("--weights", type=to_path, default=SHIPPED)
    parser.add_argument("--seeds", type=number(int, 1), default=10)
    parser.add_argument("--num-images", type=number(int, 1), help="of each list, to try it out")
    parser.add_argument("--figures", action="store_true", help="only the table of what --out holds")
    args = parser.parse_args(argv)
    if args.figures:
        table(load_json(args.out)["results"])
        return
    state = join_processes()
    stored = stored_results(args.out, args.weights)
    model, noise_scheduler, metadata = load_weights(args.weights)
    options = metadata["sampling"] | {"negative_scale": 0.0}
    _, network = prepare(model, choose_setup(state, None, 0, training=False))
    evaluator = load_evaluator(None, state.device)
    objects = load_objects()
    networks = {"whole": network, "composed": composed(network)}
    jobs = [(how, where, seed) for where in LISTS for how in networks for seed in range(args.seeds)]
    for how, where, seed in tqdm(jobs, unit="list"):
        entry = stored["results"].setdefault(f"{how} {where}", {"seeds": {}})
        if str(seed) in entry["seeds"]:
            continue
        conditions = load_conditions(ROOT / f"{where}.json", objects)[: args.num_images]
        painter = Painter(networks[how], networks[how], noise_scheduler, objects, options, state.device)
        entry["seeds"][str(seed)] = score(painter, conditions, seed, evaluator)
        entry["device"] = device_name(state.device)
        entry["date"] = time.strftime("%Y-%m-%d")
        write_json(args.out, stored)
    table(stored["results"])


if __name__ == "__main__":
    main()
