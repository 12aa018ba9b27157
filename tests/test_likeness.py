"""Distances to real pictures: of a set of pictures, and of each to its nearest training picture."""

import pytest
import torch

from conftest import ROOT
from data.pack import HELD_OUT, PACK
from dataset import ICLEVRDataset
from evaluator import evaluation_model
from label_files import load_objects
from report.likeness import distances, features, nearest


@pytest.fixture(scope="module")
def held_out():
    return ICLEVRDataset(HELD_OUT, ROOT / "train.json", load_objects())


@pytest.fixture(scope="module")
def training():
    return ICLEVRDataset(PACK, ROOT / "train.json", load_objects())


@pytest.mark.slow
def test_real_pictures_are_near_to_real_ones_and_blurred_ones_are_not(held_out, training):
    evaluator = evaluation_model(ROOT / "weights" / "evaluator.pth")
    real = features(held_out.images[:300], evaluator)
    blurred = torch.nn.functional.avg_pool2d(training.images[:300].float(), 3, 1, 1).to(torch.uint8)
    near = distances(real, features(training.images[:300], evaluator))
    far = distances(real, features(blurred, evaluator))
    assert far["frechet"] > 2 * near["frechet"]
    assert far["kernel"] > abs(near["kernel"]) + 0.01


@pytest.mark.slow
def test_the_nearest_training_picture_is_found_and_a_copy_has_distance_0(held_out, training):
    pictures = torch.cat([training.images[1100:1101], held_out.images[2:3]])
    distance, which = nearest(pictures, training.images[:2500])
    assert which[0] == 1100 and distance[0] == 0
    differences = training.images[:2500].float() - pictures[1].float()
    best = differences.square().mean((1, 2, 3)).sqrt()
    assert which[1] == best.argmin() and distance[1] == pytest.approx(best.min().item())
