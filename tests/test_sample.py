"""sample.py with the weights that ship, and what it says about others."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import evaluator
import sample
import train
from checkpoint import load_weights
from dataset import load_conditions, load_objects, multi_hot

SHIPPED = ROOT / "weights" / "small"


@pytest.fixture
def conditions(tmp_path):
    """Six conditions in a file of their own."""
    chosen = load_conditions(ROOT / "validation.json", load_objects())[::11]
    path = tmp_path / "six.json"
    path.write_text(json.dumps(chosen))
    return path


def test_a_fresh_clone_gives_an_accuracy_and_a_grid(clone, run):
    """The README's first command, installing aside, and the same digits from the folder it writes."""
    process = run(clone, "sample.py", "--mode", "test")
    assert process.returncode == 0, process.stderr
    first, *_, last = process.stdout.splitlines()
    assert first.startswith("weights: ") and "weights/small (small, trained on " in first
    accuracy = float(last.removeprefix("accuracy: "))
    report = json.loads((clone / "images" / "test.json").read_text())
    assert last == f"accuracy: {report['accuracy']:.4f}" and report["steps"] > 1 and report["seed"] == 0
    files = sorted((clone / "images" / "test").iterdir(), key=lambda p: int(p.stem))
    assert [p.name for p in files] == [f"{i}.png" for i in range(32)]
    assert all(Image.open(p).size == (64, 64) for p in files)
    assert Image.open(clone / "images" / "test.png").size == (8 * 66 + 2, 4 * 66 + 2)
    assert accuracy > 0.2  # chance is 0.1
    process = run(clone, "evaluator.py", "images/test")
    assert process.stdout.splitlines()[-1] == last


def test_pictures_do_not_depend_on_the_batch(tmp_path, conditions, capsys):
    """Nor on how many there are: each has a seed of its own."""
    for size in (1, 4):
        argv = ["--mode", conditions, "--weights", SHIPPED, "--steps", 4, "--batch-size", size]
        argv += ["--out", tmp_path / str(size)]
        sample.main(list(map(str, argv)))
    for i in range(6):
        one, four = (np.array(Image.open(tmp_path / n / "six" / f"{i}.png")).astype(int) for n in "14")
        assert np.abs(one - four).max() <= 1
    first = np.array(Image.open(tmp_path / "1" / "six" / "0.png")).astype(int)
    assert np.abs(first - one).max() > 10  # the last one is another picture


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_samplers_stay_in_range_and_repeat(sampler):
    model, noise_scheduler, _ = load_weights(SHIPPED)
    labels = multi_hot([["red cube"], ["cyan sphere", "gray cylinder"]], load_objects())
    a, b = (sample.generate(model.eval(), noise_scheduler, labels, [5, 6], sampler, 8, 2.0) for _ in range(2))
    assert torch.equal(a, b) and a.abs().max() <= 1
    assert a.std() > 0.05


def test_options_override_and_are_stored(tmp_path, conditions, capsys):
    argv = ["--mode", str(conditions), "--weights", str(SHIPPED), "--out", str(tmp_path / "out")]
    argv += ["--sampler", "ddim"]
    sample.main([*argv, "--steps", "3", "--guidance-scale", "1", "--seed", "9"])
    report = json.loads((tmp_path / "out" / "six.json").read_text())
    assert [report[k] for k in ("sampler", "steps", "guidance_scale", "seed")] == ["ddim", 3, 1.0, 9]
    assert report["labels"] == "six.json" and report["pictures_seen"] > 10000


def test_several_seeds_are_single_runs_put_together(tmp_path, conditions, capsys):
    argv = ["--mode", conditions, "--weights", SHIPPED, "--out", tmp_path / "out", "--steps", 5]
    single = []
    for more in (["--seed", 3], ["--seed", 4], ["--seed", 3, "--seeds", 2]):
        sample.main(list(map(str, [*argv, *more])))
        single.append(json.loads((tmp_path / "out" / "six.json").read_text()))
    assert single[2]["accuracies"] == [single[0]["accuracy"], single[1]["accuracy"]]
    assert (
        f"{np.mean(single[2]['accuracies']):.4f} (mean of 2 seeds" in capsys.readouterr().out.splitlines()[-1]
    )


def test_a_run_is_found_and_its_youth_told(clone, pictures, run, conditions):
    shutil.copy(conditions, clone / "six.json")
    train.main([*TINY, "--data", str(pictures), "--out", str(clone / "runs" / "young"), "--max-steps", "1"])
    process = run(clone, "sample.py", "--mode", "six.json", "--steps", 2)
    first = process.stdout.splitlines()[0]
    assert first.startswith(
        "weights: runs/young/checkpoint-0000001 (small, trained on 4 pictures, less than one epoch"
    )
    assert "weights/small" in first
    assert len(list((clone / "images" / "six").iterdir())) == 6


def test_a_shorter_list_leaves_no_old_pictures(tmp_path):
    images = torch.zeros(5, 3, 64, 64, dtype=torch.uint8)
    sample.save_pictures(images, tmp_path / "a", tmp_path / "a.png")
    sample.save_pictures(images[:2], tmp_path / "a", tmp_path / "a.png")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["0.png", "1.png"]


def test_mistakes_are_one_line(tmp_path, refused):
    refused(sample.main, ["--mode", "nowhere.json"], "nowhere.json: no such file")
    refused(sample.main, ["--mode", "test", "--weights", tmp_path], "metadata.json: no such file")
    refused(sample.main, ["--mode", "train"], "train.json: expected a list of lists")
    (tmp_path / "mine.json").write_text('[["red cube"]]')
    refused(
        sample.main, ["--mode", tmp_path / "mine.json", "--weights", SHIPPED, "--out", tmp_path], "overwrite"
    )
    refused(evaluator.main, [tmp_path, "--labels", ROOT / "test.json"], "0.png: no such picture")
