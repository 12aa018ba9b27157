"""Label files: which objects a picture shows, and which are asked for."""

import itertools
import re
from pathlib import Path

import numpy as np

from infra.commands import ROOT, InputError, did_you_mean, shown
from infra.files import load_json
from options import NUM_OBJECTS

PICTURE_NAME = re.compile(r"([\w-]+)_(\d+)\.png", re.ASCII)
MAX_OBJECTS = 5  # a CLEVR scene of this kind holds no more
LABELS_NAME = "labels.json"  # in a folder whose pictures have labels of their own


def load_objects(path: Path | str = ROOT / "objects.json") -> dict[str, int]:
    """Read `objects.json`: 24 names like "red cube", each with its own index in 0..23. Raises InputError."""
    objects = load_json(path)
    indices = sorted(map(str, objects.values())) if isinstance(objects, dict) else []
    if indices != sorted(map(str, range(NUM_OBJECTS))):
        raise InputError(f"{path}: expected {NUM_OBJECTS} names with the indices 0 to {NUM_OBJECTS - 1}, each once")
    for name in objects:
        if len(name.split()) != 2:
            raise InputError(f"{path}, entry {shown(name)}: expected a colour and a shape")
    return {name: int(index) for name, index in objects.items()}


def names_of(objects: dict[str, int]) -> list[str]:
    """The names of objects in the order of their indices."""
    return sorted(objects, key=lambda name: objects[name])


def check_condition(condition, objects: dict[str, int], where: str, may_repeat: bool = False) -> list[str]:
    """Return `condition` if it lists 1 to 5 known names, else raise InputError with `where`. They must be different
    unless they `may_repeat`."""
    if not isinstance(condition, list) or not 1 <= len(condition) <= MAX_OBJECTS:
        raise InputError(f"{where}: expected a list of 1 to {MAX_OBJECTS} objects, got {shown(condition)}")
    for name in condition:
        if not isinstance(name, str) or name not in objects:
            nearest = did_you_mean(str(name), objects)
            raise InputError(f"{where}: unknown object {shown(name)}{nearest}")
        if condition.count(name) > 1 and not may_repeat:
            raise InputError(f"{where}: {shown(name)} stands there twice, expected different objects")
    return condition


def load_conditions(path: Path | str, objects: dict[str, int]) -> list[list[str]]:
    """Read conditions: a JSON list of lists of names, like `test.json`, or those of labelled pictures, like
    `train.json`, in their order. Raises InputError."""
    conditions = load_json(path)
    if isinstance(conditions, dict) and conditions:
        return list(load_labels(path, objects).values())
    if not isinstance(conditions, list) or not conditions:
        raise InputError(f"{path}: expected a list of lists of object names, like test.json")
    return [check_condition(c, objects, f"{path}, entry {i}") for i, c in enumerate(conditions)]


def load_labels(path: Path | str, objects: dict[str, int], may_repeat: bool = False) -> dict[str, list[str]]:
    """Read labels of pictures (the format of `train.json`): file name -> list of names, all different unless they
    `may_repeat`. Raises InputError."""
    labels = load_json(path)
    if not isinstance(labels, dict) or not labels:
        raise InputError(f"{path}: expected a mapping of file names to lists of object names, like train.json")
    for filename, condition in labels.items():
        scene_of(filename, path)
        check_condition(condition, objects, f"{path}, entry {shown(filename)}", may_repeat)
    return labels


def unseen_triples(labels: dict[str, list[str]], objects: dict[str, int], count: int = 100) -> list[list[str]]:
    """Up to `count` sets of three objects that appear together in no picture of `labels`, drawn evenly."""
    seen = {frozenset(triple) for c in labels.values() for triple in itertools.combinations(c, 3)}
    triples = itertools.combinations(names_of(objects), 3)
    unseen = [list(triple) for triple in triples if frozenset(triple) not in seen]
    chosen = np.random.default_rng(0).permutation(len(unseen))[:count]
    return [unseen[i] for i in sorted(chosen)]


def scene_of(filename: str, path: Path | str = "labels") -> str:
    """The scene of a picture: `CLEVR_train_002066_1.png` -> `CLEVR_train_002066`. Raises InputError."""
    match = PICTURE_NAME.fullmatch(filename)
    if not match or len(filename) > 255:  # bytes that a file system takes
        raise InputError(f"{path}, entry {shown(filename)}: expected a file name like CLEVR_train_002066_1.png")
    return match[1]


def split_by_scene(filenames: list[str], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Split picture indices into (train, held out) so that no scene has pictures in both."""
    scenes = sorted({scene_of(f) for f in filenames})
    order = np.random.default_rng(seed).permutation(len(scenes))
    chosen = {scenes[i] for i in order[: max(1, round(held_out * len(scenes)))]}
    is_held = [scene_of(f) in chosen for f in filenames]
    return [i for i, h in enumerate(is_held) if not h], [i for i, h in enumerate(is_held) if h]


def first_scenes(labels: dict[str, list[str]], count: int) -> dict[str, list[str]]:
    """The part of `labels` that its first `count` scenes make up."""
    scenes = list(dict.fromkeys(map(scene_of, labels)))  # each once, in the file's order
    chosen = set(scenes[:count])
    return {f: c for f, c in labels.items() if scene_of(f) in chosen}
