"""Every picture of a list that one of the judges does not hold right, what they saw, and the likely reason.

    python sample.py --mode test
    python benchmarks/failures.py images/test --out docs/failures_test.png

Prints a table in Markdown and draws the pictures. The reason follows from what was asked and what was seen;
whether the picture or the evaluator is wrong, only looking tells.
"""

import argparse
import collections
import sys
from pathlib import Path

from check_evaluator import confusions, draw_sheet, kind_of, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset import load_objects, multi_hot, to_float
from evaluator import evaluation_model
from metrics import count_colours, load_samples


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


def count_reasons(counted: list[str], condition: list[str]) -> list[str]:
    """The same for an object more or fewer of a colour than `condition` asks for; `counted` are colours."""
    found, asked = (collections.Counter(part) for part in (counted, [n.split()[0] for n in condition]))
    reasons = [
        "a copy too many of a colour asked for" if colour in asked else "an object of another colour"
        for colour in (found - asked).elements()
    ]
    return reasons + ["an object of a colour asked for is missing"] * (asked - found).total()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder", type=Path, help="of pictures that sample.py painted; its report lies beside"
    )
    parser.add_argument("--out", type=Path, required=True, help="picture of all failures to write")
    args = parser.parse_args()
    (report, _, images), objects = load_samples(args.folder), load_objects()
    conditions = report["conditions"]
    images = images[: len(conditions)]
    names = sorted(objects, key=objects.get)
    judge, labels = evaluation_model(report["evaluator"]), multi_hot(conditions, objects).bool()
    seen = judge.probabilities(to_float(images)) > judge.threshold
    counted = [count_colours(image) for image in images]
    reasons = [count_reasons(*both) for both in zip(counted, conditions, strict=True)]
    failed = [i for i in range(len(images)) if reasons[i] or (seen[i] != labels[i]).any()]
    rows, captions, counts = [], [], collections.Counter()
    for i in failed:
        pairs = confusions(names, labels[i], seen[i])
        why = [reason(*pair, conditions[i]) for pair in pairs] + reasons[i]
        counts.update(why)
        missed, extra = (", ".join(filter(None, [pair[side] for pair in pairs])) for side in (0, 1))
        colours = ", ".join(counted[i]) if reasons[i] else ""
        rows.append([i, ", ".join(conditions[i]), missed, extra, colours, "; ".join(why)])
        lines = [f"{i}: {conditions[i][0]}", *conditions[i][1:]]
        lines += [f"{a or 'nothing'} -> {s or 'nothing'}" for a, s in pairs]
        captions.append("\n".join([*lines, *([f"counted: {colours}"] if colours else [])]))
    title = f"{len(failed)} of {len(conditions)} pictures of {report['labels']}, seed {report['seed']}"
    header = ["picture", "asked", "not seen", "seen instead", "counted, if wrong", "likely reason"]
    table(title, header, rows)
    table("Likely reasons", ["likely reason", "objects"], [[*item] for item in counts.most_common()])
    if failed:
        draw_sheet(args.out, images[failed].permute(0, 2, 3, 1).numpy(), captions)


if __name__ == "__main__":
    main()
