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
from check_evaluator import confusions, draw_sheet, kind_of, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import load_weights
from dataset import load_objects, multi_hot, read_picture, to_float
from evaluator import evaluation_model
from sample import load_list


def reason(asked: str, seen: str, condition: list[str]) -> str:
    """Why `asked` (or nothing) may have come out as `seen` (or nothing) among the objects of `condition`."""
    kind, colours = kind_of(asked, seen), [name.split()[0] for name in condition]
    if kind == "missed":
        same = colours.count(asked.split()[0]) > 1
        return (
            "took the shape of the other object of its colour" if same else "left out, or of another colour"
        )
    if kind == "shape mistaken":
        return kind
    known = seen.split()[0] in colours
    if kind == "colour mistaken":
        return "colour of another object asked for" if known else "colour mixed or wrong"
    return "one more object, in a colour asked for" if known else "one more object, in another colour"


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
    seen = judge.probabilities(to_float(images)) > judge.threshold
    failed = (seen != labels).any(1).nonzero().flatten().tolist()
    rows, captions, counts = [], [], collections.Counter()
    for i in failed:
        pairs = confusions(names, labels[i], seen[i])
        reasons = [reason(*pair, conditions[i]) for pair in pairs]
        counts.update(reasons)
        missed, extra = (", ".join(filter(None, side)) or "nothing" for side in zip(*pairs, strict=True))
        rows.append([i, ", ".join(conditions[i]), missed, extra, "; ".join(reasons)])
        lines = [f"{i}: {conditions[i][0]}", *conditions[i][1:]]
        captions.append("\n".join([*lines, *(f"{a or 'nothing'} -> {s or 'nothing'}" for a, s in pairs)]))
    title = f"{len(failed)} of {len(conditions)} pictures of {report['labels']}, seed {report['seed']}"
    table(title, ["picture", "asked", "not seen", "seen instead", "likely reason"], rows)
    table("Likely reasons", ["likely reason", "objects"], [[*item] for item in counts.most_common()])
    if failed:
        draw_sheet(args.out, images[failed].permute(0, 2, 3, 1).numpy(), captions)


if __name__ == "__main__":
    main()
