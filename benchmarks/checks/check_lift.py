"""How well the lift of best-of-N tells right pictures from wrong ones, by the timesteps at which it is measured.

    python benchmarks/checks/check_lift.py weights/small

Paints conditions of three objects, half of them with two in one colour: some of train.json that are in no list of
conditions. The two judges say which pictures are right. Each row measures the lift of all pictures at its timesteps,
and gives the area under the ROC curve: how often a right picture has a greater lift than a wrong one, 0.5 by chance.
Six minutes on two cores.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from checkpoint import load_weights
from dataset import to_uint8
from diffusion import RATIO_TIMESTEPS, likelihood_ratio
from infra.commands import ROOT, Parser, command, number, to_path, to_seed
from infra.device import choose_setup, join_processes, prepare
from lab import load_evaluator
from label_files import load_conditions, load_labels, load_objects
from labels import labels_with_one_mistake, multi_hot, pairs_of_one_colour
from options import LEARNED_RANGES, PRECISIONS
from pipeline import Painter
from report.metrics import judge

# A draw of noise for each timestep; RATIO_TIMESTEPS, which --best-of uses, has two at 400 and two at 600.
ROWS = ((300,), (400,), (500,), (600,), (400, 600), RATIO_TIMESTEPS, (300, 400, 500, 600))
BATCH_SIZE = 32


def draw_conditions(objects: dict[str, int], count: int, seed: int) -> list[list[str]]:
    """Conditions [count] of three objects of train.json that are in none of the other lists, the first half of them
    with two objects or more in one colour."""
    lists = [load_conditions(ROOT / name, objects) for name in ("test.json", "new_test.json", "validation.json")]
    taken = {frozenset(condition) for conditions in lists for condition in conditions}
    known = {frozenset(condition) for condition in load_labels(ROOT / "train.json", objects).values()}
    triples = sorted(sorted(condition) for condition in known - taken if len(condition) == 3)
    pairs = [condition for condition in triples if pairs_of_one_colour(condition)]
    others = [condition for condition in triples if not pairs_of_one_colour(condition)]
    rng = np.random.default_rng(seed)
    from_pairs = [pairs[i] for i in rng.integers(len(pairs), size=count // 2)]
    return from_pairs + [others[i] for i in rng.integers(len(others), size=count - count // 2)]


def area_under_curve(lift: torch.Tensor, is_right: torch.Tensor) -> float:
    """The area under the ROC curve of `lift` [N] as a score of `is_right` [N]; NaN if all are right, or none."""
    above = lift[is_right][:, None] > lift[~is_right]
    return above.float().mean().item()


@command
def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=to_path, help="folder of weights, or of a run, to measure the lift with")
    parser.add_argument("--painted-by", type=to_path, metavar="DIR", help="weights that paint (default: the same)")
    parser.add_argument("--as-predicted", action="store_true", help="do not take back what a student has learned")
    parser.add_argument("--num-images", type=number(int, 2), default=256, help="default: %(default)s")
    parser.add_argument("--seed", type=to_seed, default=0, help="default: %(default)s")
    parser.add_argument("--mixed-precision", choices=PRECISIONS, help="default: what is fastest here")
    args = parser.parse_args(argv)
    setup = choose_setup(join_processes(), args.mixed_precision, 0, training=False)
    objects = load_objects()
    conditions = draw_conditions(objects, args.num_images, args.seed)
    parts = [slice(start, start + BATCH_SIZE) for start in range(0, len(conditions), BATCH_SIZE)]

    model, noise_scheduler, metadata = load_weights(args.painted_by or args.weights)
    plain_network, network = prepare(model, setup)
    painter = Painter(network, plain_network, noise_scheduler, objects, metadata["sampling"], setup.device)
    places = [(args.seed, i) for i in range(len(conditions))]
    images = torch.cat([painter.paint(conditions[part], places[part]) for part in parts])
    is_right = judge(to_uint8(images).cpu(), conditions, load_evaluator(None, setup.device)).both

    model, noise_scheduler, metadata = load_weights(args.weights)
    network, _ = prepare(model, setup)
    sampling = metadata["sampling"]
    learned = {} if args.as_predicted else {name: sampling[name] for name in LEARNED_RANGES if name in sampling}
    labels = multi_hot(conditions, objects).to(setup.device)
    mistakes = [labels_with_one_mistake(condition, objects) for condition in conditions]
    has_pair = torch.tensor([bool(pairs_of_one_colour(condition)) for condition in conditions])
    columns = [torch.ones_like(has_pair), has_pair, ~has_pair]
    print(f"{args.weights}: {int(is_right.sum())} of {len(conditions)} pictures are right for both judges\n")
    print("| timesteps | all | two in one colour | others |\n|---|---|---|---|")
    for timesteps in ROWS:
        lift = torch.cat([
            likelihood_ratio(
                network, noise_scheduler, images[part], labels[part], mistakes[part], **learned,
                ratio_timesteps=timesteps,
            )
            for part in parts
        ]).cpu()  # fmt: skip
        areas = [area_under_curve(lift[k], is_right[k]) for k in columns]
        cells = [", ".join(map(str, timesteps)), *(f"{area:.3f}" for area in areas)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
