"""Labels: what names of objects mean to the network, and the labels of likely mistakes.

Part of the pipeline that checkpoint.py writes beside weights, as diffusion.py is: so it imports nothing of the project
that is not.
"""

import itertools

import torch


def colour_of(name: str) -> str:
    """The colour in an object's name, such as "red" of "red cube"."""
    return name.split()[0]


def shape_of(name: str) -> str:
    """The shape in an object's name, such as "cube" of "red cube"."""
    return name.split()[1]


def multi_hot(conditions: list[list[str]], objects: dict[str, int]) -> torch.Tensor:
    """Turn N lists of names into a float32 tensor [N, 24]: how often each object is in a list, 0 or 1 but for pictures
    that show an object twice."""
    rows = torch.tensor([i for i, condition in enumerate(conditions) for _ in condition], dtype=torch.long)
    columns = torch.tensor([objects[name] for condition in conditions for name in condition], dtype=torch.long)
    labels = torch.zeros(len(conditions), len(objects))
    return labels.index_put_((rows, columns), torch.ones(len(rows)), accumulate=True)


def pairs_of_one_colour(condition: list[str]) -> list[tuple[str, str]]:
    """All pairs of objects of a condition that have the same colour, in both orders."""
    return [(a, b) for a, b in itertools.permutations(condition, 2) if colour_of(a) == colour_of(b)]


def hard_negatives(condition: list[str], objects: dict[str, int]) -> torch.Tensor:
    """The hard negatives [K, 24] of a condition: its label, but with two objects of one colour in one shape.

    For a red cube and a red sphere these are two red cubes, with a 2 in their place, and two red spheres. n
    objects of a colour make n (n - 1). A condition that names an object twice is such a mistake itself, and has none.
    """
    if len(set(condition)) < len(condition):
        return torch.zeros(0, len(objects))
    pairs = pairs_of_one_colour(condition)
    negatives = multi_hot([condition], objects).repeat(len(pairs), 1)
    for negative, (lost, doubled) in zip(negatives, pairs, strict=True):
        negative[objects[lost]] = 0
        negative[objects[doubled]] = 2
    return negatives


def labels_with_one_mistake(condition: list[str], objects: dict[str, int]) -> torch.Tensor:
    """The labels [3 K, 24] of a condition of K objects with one mistake: an object in one of the two other
    shapes, or one that is there twice. The hard negatives are among them."""
    labels = multi_hot([condition], objects).repeat(3 * len(condition), 1)
    pairs = [(a, b) for a in condition for b in objects if colour_of(a) == colour_of(b)]
    for label, (name, shown_instead) in zip(labels, pairs, strict=True):
        if shown_instead != name:
            label[objects[name]] -= 1
        label[objects[shown_instead]] += 1
    return labels
