"""Labels: hard negatives, triples that were never seen, splits by scene."""

from conftest import ROOT
from label_files import load_labels, load_objects, scene_of, split_by_scene, unseen_triples
from labels import hard_negatives, labels_with_one_mistake, multi_hot

OBJECTS = load_objects()
LABELS = load_labels(ROOT / "train.json", OBJECTS)


def test_hard_negatives_give_an_object_the_shape_of_another_of_its_colour():
    assert hard_negatives(["red cube", "blue cube"], OBJECTS).shape == (0, 24)
    cubes, spheres = hard_negatives(["red sphere", "gray cube", "red cube"], OBJECTS)
    assert cubes.sum() == spheres.sum() == 3
    assert cubes[OBJECTS["red cube"]] == spheres[OBJECTS["red sphere"]] == 2
    assert cubes[OBJECTS["gray cube"]] == spheres[OBJECTS["gray cube"]] == 1
    assert len(hard_negatives(["red cube", "red sphere", "red cylinder"], OBJECTS)) == 6


def test_one_mistake_is_another_shape_or_one_object_twice():
    """Per object: both other shapes, and one more of it."""
    mistakes = labels_with_one_mistake(["red sphere", "red cube", "gray cube"], OBJECTS)
    right = multi_hot([["red sphere", "red cube", "gray cube"]], OBJECTS)
    changes = mistakes - right
    assert len(mistakes) == 9 and len(mistakes.unique(dim=0)) == 9 and mistakes.min() >= 0
    assert sorted(changes.sum(1).tolist()) == [0] * 6 + [1] * 3
    red_twice = right.clone()
    red_twice[0, OBJECTS["red cube"]] = 2
    red_twice[0, OBJECTS["red sphere"]] = 0
    assert (mistakes == red_twice).all(1).any()


def test_unseen_triples_are_together_in_no_picture():
    """In scenes of four objects each three of them count as seen."""
    unseen = unseen_triples(LABELS, OBJECTS, count=10**6)
    triples = {frozenset(c) for c in LABELS.values() if len(c) == 3}
    assert len(unseen) + len(triples) == 2024 and not triples & set(map(frozenset, unseen))
    assert unseen_triples(LABELS, OBJECTS)[0] in unseen
    four = unseen[0] + [next(n for n in OBJECTS if n not in unseen[0])]
    left = unseen_triples(LABELS | {"CLEVR_train_999999_3.png": four}, OBJECTS, count=10**6)
    assert unseen[0] in unseen and not any(set(c) <= set(four) for c in left)


def test_split_keeps_scenes_whole():
    names = list(LABELS)
    kept, held = split_by_scene(names, 0.1, seed=3)
    assert sorted(kept + held) == list(range(len(names))) and len(held) == 3 * 600
    assert not {scene_of(names[i]) for i in kept} & {scene_of(names[i]) for i in held}
