"""The second judge, on held-out renders, on new renders and on pictures of nothing."""

import numpy as np
import pytest

from conftest import ROOT
from data import render
from data.pack import HELD_OUT
from dataset import ICLEVRDataset
from evaluator import evaluation_model
from label_files import load_objects
from labels import colour_of
from report import metrics
from report.judge import find_objects


@pytest.fixture(scope="module")
def evaluator():
    return evaluation_model(ROOT / "weights" / "evaluator.pth")


@pytest.fixture(scope="module")
def held_out():
    return ICLEVRDataset(HELD_OUT, ROOT / "train.json", load_objects())


@pytest.fixture(scope="module")
def renderer():
    return render.Renderer("64x64", samples=8, seed=0)


def pixels(picture) -> np.ndarray:
    return np.asarray(picture).transpose(2, 0, 1)


@pytest.mark.slow
def test_both_judges_are_right_on_held_out_renders(held_out, evaluator):
    """On at least 97 % of the pictures, whose labels they do not know."""
    chosen = range(0, len(held_out), 7)  # 300 pictures, of all three steps
    conditions = [held_out.conditions[i] for i in chosen]
    judged = metrics.judge(held_out.images[chosen], conditions, evaluator)
    assert judged.counted.float().mean() >= 0.97
    assert judged.exact.float().mean() >= 0.97


@pytest.mark.slow
def test_both_judges_notice_an_object_that_was_not_asked_for(held_out, evaluator):
    judged = metrics.judge(held_out.images[2:3], [held_out.conditions[2][:2]], evaluator)
    assert not judged.counted.item()
    assert not judged.exact.item()
    assert judged.surplus[0].total() == 1


@pytest.mark.slow
def test_copies_of_an_object_are_counted_and_their_places_found(renderer):
    """The evaluator could not tell two objects of one name from one."""
    names = ["red cube", "red cube", "gray sphere"]
    distances = []
    for scene in ("a", "b", "c"):
        placed, _, _ = renderer.layout(scene, names)
        found = find_objects(pixels(renderer.pictures(scene, names, [3])[0]))
        assert sorted(one.colour for one in found) == ["gray", "red", "red"]
        for name, x, y, _ in placed[:3]:
            alike = [one for one in found if one.colour == colour_of(name)]
            distances.append(min(np.hypot(x - one.x, y - one.y) for one in alike))
    assert np.median(distances) < 0.4  # an object is some 1.2 wide


def test_nothing_is_found_on_bare_ground(renderer):
    assert find_objects(pixels(renderer.pictures("empty", ["red cube"], [0])[0])) == []


def test_a_picture_of_no_scene_is_judged_as_well():
    """Whatever is found in it, the search ends."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
    for picture in (noise, np.zeros_like(noise), np.full_like(noise, 255)):
        find_objects(picture)
