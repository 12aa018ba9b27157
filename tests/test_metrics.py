"""The measures, on made-up and on real judgements, and the command that prints them."""

import json
import statistics

import pytest
import torch

import sample
from conftest import ROOT
from data.pack import HELD_OUT
from dataset import ICLEVRDataset
from evaluator import evaluation_model
from label_files import load_objects
from labels import multi_hot, shape_of
from report import metrics
from report.judge import Found

OBJECTS = load_objects()
NAMES = sorted(OBJECTS, key=OBJECTS.get)
SHAPES = [shape_of(name) for name in NAMES]


@pytest.fixture
def judged() -> metrics.Judged:
    """Four pictures: right; a copy that the evaluator cannot see; a shape mistaken; one object for two."""
    asked = [["red cube"], ["red cube"], ["blue cube", "red cube"], ["cyan cube", "cyan sphere"]]
    seen = [["red cube"], ["red cube"], ["blue sphere", "red cube"], ["cyan cube"]]
    colours = [["red"], ["red", "red"], ["blue", "red"], ["cyan"]]
    return metrics.Judged(
        pictures=torch.zeros(4, 3, 64, 64),
        conditions=asked,
        labels=multi_hot(asked, OBJECTS).bool(),
        probabilities=multi_hot(seen, OBJECTS) * 0.9 + torch.linspace(0, 0.05, 24),
        threshold=0.5,
        found=[[Found(colour, 0, 0, 1) for colour in of_picture] for of_picture in colours],
    )


def test_scores_are_those_computed_by_hand(judged):
    found = {name: value.mean for name, value in metrics.scores([judged]).items()}
    expected = {
        "accuracy": 4 / 6,
        "per_condition": 0.75,
        "exact_set": 0.5,
        "second_judge": 0.5,
        "both": 0.25,
        "extra_seen": 0.25,
        "extra_counted": 0.25,
    }
    assert found == pytest.approx(expected)


def test_accuracy_is_broken_down_by_number_shape_and_object(judged):
    assert [row[:3] for row in metrics.by_number(judged)] == [(1, 2, 1.0), (2, 2, 0.5)]
    assert metrics.by_group(judged, SHAPES) == [("cube", 5, 0.8), ("sphere", 1, 0.0)]
    accuracies = {name: accuracy for name, _, accuracy in metrics.by_group(judged, NAMES)}
    assert accuracies["blue cube"] == 0.0


def test_the_confusion_matrix_counts_what_was_seen_in_place_of_what(judged):
    matrix = metrics.confusion_matrix(judged, NAMES)
    nothing = 24
    assert matrix[OBJECTS["blue cube"], OBJECTS["blue sphere"]] == 1
    assert matrix[OBJECTS["cyan sphere"], nothing] == 1
    assert matrix[OBJECTS["red cube"], OBJECTS["red cube"]] == 3
    assert matrix.sum() == 6


@pytest.mark.slow
def test_accuracy_is_the_evaluators_own():
    """Also where it is not 1: with labels of other pictures."""
    evaluator = evaluation_model(ROOT / "weights" / "evaluator.pth")
    held_out = ICLEVRDataset(HELD_OUT, ROOT / "train.json", OBJECTS)
    judged = metrics.judge(held_out.images[:300], held_out.conditions[3:303], evaluator)
    accuracy = metrics.scores([judged])["accuracy"].mean
    assert accuracy == pytest.approx(evaluator.compute_acc(judged.probabilities, held_out.labels[3:303]))
    assert accuracy < 0.9


def test_the_interval_is_students():
    found = metrics.spread([0.9, 0.92, 0.97])
    assert found.mean == statistics.mean([0.9, 0.92, 0.97])
    assert found.deviation == pytest.approx(0.0360555)
    assert found.interval == pytest.approx((0.93 - 0.0895666, 0.93 + 0.0895666))  # 4.30265 sd / sqrt(3)


def test_one_run_has_no_interval():
    assert metrics.spread([0.5]).interval is None


@pytest.mark.slow
def test_the_command_prints_a_line_for_each_folder(tmp_path, capsys):
    (tmp_path / "four.json").write_text(
        '[["red cube"], ["cyan sphere"], ["gray cylinder", "red cube"], ["blue cube", "blue sphere"]]'
    )
    images = tmp_path / "images"
    weights = ["--weights", str(ROOT / "weights" / "small"), "--steps", "8", "--seeds", "2"]
    sample.main(["--mode", str(tmp_path / "four.json"), "--out", str(images), *weights])
    stored = json.loads((images / "four.json").read_text())
    capsys.readouterr()
    metrics.main([str(images / "four")])
    line = capsys.readouterr().out
    assert line.startswith(f"{images / 'four'}: 8 pictures, accuracy {stored['accuracy']:.4f} (95 % interval ")
    assert f"exact set {stored['exact_set']:.4f}; number and colours right " in line
    assert float(line.split()[-1]) >= 0.4


def test_the_command_refuses_a_folder_without_a_report_of_sample(tmp_path, refused):
    refused(metrics.main, [tmp_path / "nowhere"], "nowhere.json: no such file")
    (tmp_path / "four.json").write_text("[]")
    refused(metrics.main, [tmp_path / "four"], "four.json: expected the report that sample.py writes")
