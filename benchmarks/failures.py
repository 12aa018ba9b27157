"""Every picture of a list that the evaluator does not see exactly, what it saw, and the likely reason.

    python sample.py --mode test
    python benchmarks/failures.py images/test --out docs/failures_test.png

Prints a table in Markdown and draws the pictures. The reason follows from what was asked and what was seen;
whether the picture or the evaluator is wrong, only looking tells.
"""

import argparse
import collections
import json
import sys
from pathlib import Path

import torch
from check_evaluator import confusions, draw_sheet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import load_weights
from dataset import load_objects, multi_hot, read_picture, to_float
from evaluator import evaluation_model
from sample import load_list


def reason(asked: str, seen: str, condition: list[str]) -> str:
    """Why `asked` (or nothing) may have come out as `seen` (or nothing) among the objects of `condition`."""
    colours = [name.split()[0] for name in condition]
    if not seen:
        same = colours.count(asked.split()[0]) > 1
        return (
            "took the shape of the other object of its colour" if same else "left out, or of another colour"
        )
    if not asked:
        same = seen.split()[0] in colours
        return "one object seen as two shapes" if same else "an object too many"
    if asked.split()[0] == seen.split()[0]:
        return "shape unclear"
    if seen.split()[0] in colours:
        return "colour of another object asked for"
    return "colour mixed or wrong"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder", type=Path, help="of pictures that sample.py painted; its report lies beside"
    )
    parser.add_argument("--out", type=Path, required=True, help="picture of all failures to write")
    parser.add_argument("--mode", help="the list, as for sample.py (default: the folder's name)")
    args = parser.parse_args()
    report, objects = json.loads(args.folder.with_suffix(".json").read_text()), load_objects()
    weights = Path(report["weights"])
    _, _, metadata = load_weights(weights)
    _, conditions = load_list(args.mode or args.folder.name, metadata.get("unseen", []), weights, objects)
    names = sorted(objects, key=objects.get)
    judge, labels = evaluation_model(report["evaluator"]), multi_hot(conditions, objects).bool()
    images = torch.stack([read_picture(args.folder / f"{i}.png") for i in range(len(conditions))])
    out = judge.probabilities(to_float(images))
    seen = out > judge.threshold

    failed = (seen != labels).any(1).nonzero().flatten().tolist()
    print(f"{len(failed)} of {len(conditions)} pictures of {report['labels']}, seed {report['seed']}\n")
    print("| picture | asked | not seen | seen instead | likely reason |\n|---|---|---|---|---|")
    captions, counts = [], collections.Counter()
    for i in failed:
        missed = [n for n, a, s in zip(names, labels[i], seen[i], strict=True) if a and not s]
        extra = [n for n, a, s in zip(names, labels[i], seen[i], strict=True) if s and not a]
        pairs = confusions(missed, extra)
        reasons = [reason(a, s, conditions[i]) for a, s in pairs]
        counts.update(reasons)
        asked, seen_instead = ", ".join(conditions[i]), ", ".join(extra) or "nothing"
        print(f"| {i} | {asked} | {', '.join(missed) or 'nothing'} | {seen_instead} | {'; '.join(reasons)} |")
        lines = [f"{i}: {conditions[i][0]}", *conditions[i][1:]]
        captions.append("\n".join([*lines, *(f"{a or 'nothing'} -> {s or 'nothing'}" for a, s in pairs)]))
    print("\n| likely reason | objects |\n|---|---|")
    for why, count in counts.most_common():
        print(f"| {why} | {count} |")
    draw_sheet(args.out, images[failed].permute(0, 2, 3, 1).numpy(), captions)


if __name__ == "__main__":
    main()
