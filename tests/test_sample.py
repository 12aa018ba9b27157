"""sample.py with the weights that ship: lists in, pictures and scores out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import diffusion
import evaluator
import sample
import train
from checkpoint import load_weights
from conftest import LAUNCH, ROOT, SHIPPED, TINY
from dataset import read_pictures, to_float
from label_files import load_conditions, load_objects
from labels import labels_with_one_mistake, multi_hot

FP32 = ("--mixed-precision", "no")  # where pictures are compared: some processors would choose bf16


@pytest.fixture
def conditions(tmp_path) -> Path:
    """Six conditions in a file of their own."""
    chosen = load_conditions(ROOT / "validation.json", load_objects())[::11]
    path = tmp_path / "six.json"
    path.write_text(json.dumps(chosen))
    return path


def paint(*argv):
    """What `python sample.py` does with these options."""
    sample.main([str(option) for option in argv])


def pixels(path: Path) -> np.ndarray:
    """The numbers [H, W, 3] of a picture, which may be subtracted."""
    return np.asarray(Image.open(path)).astype(int)


def report_of(path: Path) -> dict:
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------------------ one command


@pytest.mark.slow
def test_a_fresh_clone_gives_an_accuracy_and_a_grid(clone, run):
    """The README's first command, installing aside, and the same digits from the folder it writes."""
    process = run(clone, "sample.py", "--mode", "test")
    assert process.returncode == 0, process.stderr
    loading, first, *_, last = process.stdout.splitlines()
    assert loading == "sample.py: loading PyTorch"
    assert first.startswith("weights: ") and "weights/small (small, trained on " in first
    report = report_of(clone / "images" / "test.json")
    assert last == f"accuracy: {report['accuracy']:.4f}, exact set: {report['exact_set']:.4f}"
    assert report["steps"] > 1 and report["seed"] == 0
    files = sorted((clone / "images" / "test").iterdir(), key=lambda p: int(p.stem))
    assert [p.name for p in files] == [f"{i}.png" for i in range(32)]
    assert all(Image.open(p).size == (64, 64) for p in files)
    assert Image.open(clone / "images" / "test.png").size == (8 * 66 + 2, 4 * 66 + 2)
    assert report["accuracy"] > 0.7  # chance is 0.1
    process = run(clone, "evaluator.py", "images/test")
    assert process.stdout.splitlines()[-1] == last


@pytest.mark.slow
def test_the_newest_run_is_found_and_one_that_is_young_is_told(clone, pictures, run, conditions):
    shutil.copy(conditions, clone / "six.json")
    train.main([*TINY, "--data", str(pictures), "--out", str(clone / "runs" / "young"), "--max-steps", "1"])
    process = run(clone, "sample.py", "--mode", "six.json", "--steps", 2)
    first = process.stdout.splitlines()[1]
    assert first.startswith("weights: runs/young/checkpoint-0000001 (small, trained on 4 pictures, less than one epoch")
    assert "weights/small" in first
    assert len(list((clone / "images" / "six").iterdir())) == 6


@pytest.mark.slow
def test_one_command_gives_a_lab_its_list_its_score_and_the_strip_from_noise_to_picture(tmp_path, conditions, capsys):
    out = tmp_path / "out"
    common = ["--weights", SHIPPED, "--out", out, "--steps", 12]
    paint("--mode", conditions, "process", *common)
    printed = capsys.readouterr().out
    assert f"process: {out}/process.png, red sphere, cyan cylinder, cyan cube" in printed
    assert "accuracy: " in printed and (out / "six.png").exists()
    strip = pixels(out / "process.png").astype(float)
    assert strip.shape == (64 + 4, 10 * 66 + 2, 3)
    frames = [strip[2:-2, 2 + 66 * i : 66 * (i + 1)] for i in range(10)]
    roughness = [np.abs(np.diff(frame, axis=0)).mean() for frame in frames]  # of neighbouring pixels
    assert roughness == sorted(roughness, reverse=True) and roughness[0] > 50 and roughness[-1] < 10

    paint("--mode", "process", *common, "--objects", "red sphere", "cyan cube", "--overwrite")
    other = pixels(out / "process.png").astype(float)
    assert np.abs(other - strip)[:, :66].max() == 0 and np.abs(other - strip)[:, -66:].max() > 50


@pytest.mark.slow
def test_options_override_those_of_the_weights_and_are_stored(tmp_path, conditions, capsys):
    common = ["--mode", conditions, "--weights", SHIPPED, "--out", tmp_path / "out"]
    paint(*common, "--sampler", "ddim", "--steps", 3, "--guidance-scale", 1, "--seed", 9)
    report = report_of(tmp_path / "out" / "six.json")
    assert [report[k] for k in ("sampler", "steps", "guidance_scale", "seed")] == ["ddim", 3, 1.0, 9]
    assert report["labels"] == "six.json" and report["pictures_seen"] > 10000


@pytest.mark.slow
def test_unseen_triples_come_from_the_weights(tmp_path, capsys):
    paint("--mode", "unseen", "--weights", SHIPPED, "--out", tmp_path, "--steps", 2, "--num-images", 3)
    assert len(list((tmp_path / "unseen").iterdir())) == 3
    assert report_of(tmp_path / "unseen.json")["labels"] == "unseen"


@pytest.mark.slow
def test_a_mistake_in_the_options_is_one_line(tmp_path, refused):
    refused(sample.main, ["--mode", "nowhere.json"], "nowhere.json: no such file")
    refused(sample.main, ["--mode", "test", "--weights", tmp_path], "metadata.json: no such file")
    refused(sample.main, ["--mode", "test", "--objects", "red cube"], "--objects is for --mode process")
    words = "--objects: unknown object 'red cone'"
    refused(sample.main, ["--mode", "process", "--objects", "red cone"], words)
    refused(sample.main, ["--mode", "test", ROOT / "test.json"], "two lists named test")
    mine = tmp_path / "mine.json"
    mine.write_text('[["red cube"]]')
    refused(sample.main, ["--mode", mine, "--weights", SHIPPED, "--out", tmp_path], mine, "no report of")
    refused(evaluator.main, [tmp_path, "--labels", ROOT / "test.json"], "0.png: no such picture")


@pytest.mark.parametrize(
    ("unseen", "words"), [([], "does not tell"), ([["red cone"]], "unseen, entry 0: unknown object 'red cone'")]
)
def test_weights_that_do_not_tell_their_unseen_triples_are_one_line(tmp_path, refused, unseen, words):
    old = tmp_path / "old"
    shutil.copytree(SHIPPED, old)
    metadata = json.loads((old / "metadata.json").read_text())
    (old / "metadata.json").write_text(json.dumps({**metadata, "unseen": unseen}))
    refused(sample.main, ["--mode", "unseen", "--weights", old], old, words)


def test_weights_that_give_no_finite_pictures_are_named_and_nothing_is_written(there, capsys, tried):
    """Weights that are finite themselves. What was there stays."""
    path = there / "weights" / checkpoint.WEIGHTS_NAME
    argv = ["--mode", "list.json", "process", "--weights", "weights", "--out"]
    sample.main([*argv, "old"])
    before = {p: p.read_bytes() for p in (there / "old").rglob("*") if p.is_file()}
    tensors = load_file(path)
    tensors["class_embedding.weight"] = torch.full_like(tensors["class_embedding.weight"], 1e38)
    save_file(tensors, path)
    said = "error: weights: prediction not finite in step 1 of 3 (timestep 999); of these pictures none is"
    for more in (["new"], ["old", "--overwrite"]):
        with pytest.raises(SystemExit) as stop:
            sample.main([*argv, *more])
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and line.startswith(said)
    assert not (there / "new").exists()
    assert {p: p.read_bytes() for p in (there / "old").rglob("*") if p.is_file()} == before
    tried("weights that give pictures which are not finite", "exit 2: names weights and step; nothing is written")


# --------------------------------------------------------------------------- the same pictures in another way


@pytest.mark.slow
def test_pictures_do_not_depend_on_their_batch(tmp_path, conditions, capsys):
    """Nor on how many there are: each has a seed of its own."""
    common = ["--mode", conditions, "--weights", SHIPPED, "--steps", 4, *FP32]
    paint(*common, "--batch-size", 1, "--out", tmp_path / "1")
    paint(*common, "--batch-size", 4, "--out", tmp_path / "4")
    for i in range(6):
        one = pixels(tmp_path / "1" / "six" / f"{i}.png")
        four = pixels(tmp_path / "4" / "six" / f"{i}.png")
        assert np.abs(one - four).max() <= 1
    first = pixels(tmp_path / "1" / "six" / "0.png")
    assert np.abs(first - one).max() > 10  # the last one is another picture


@pytest.mark.slow
def test_two_processes_paint_what_one_does(tmp_path, conditions, run_warm):
    """Eleven pictures of a list of six, each with its own condition and seed."""
    common = ["--mode", conditions, "--weights", SHIPPED, "--steps", 4, *FP32, "--num-images", 11]
    process = run_warm(ROOT, *LAUNCH, "sample.py", *common, "--batch-size", 2, "--out", tmp_path / "two")
    assert process.returncode == 0, process.stderr[-3000:]
    assert "setup: cpu, 2 processes, fp32" in process.stdout
    paint(*common, "--out", tmp_path / "one")
    reports = [report_of(tmp_path / name / "six.json") for name in ("one", "two")]
    assert len(reports[0]["accuracies"]) == 1 and reports[0]["num_images"] == 11
    for i in range(11):
        one = pixels(tmp_path / "one" / "six" / f"{i}.png")
        two = pixels(tmp_path / "two" / "six" / f"{i}.png")
        assert np.abs(one - two).max() <= 1


@pytest.mark.slow
def test_lists_painted_by_one_command_are_those_painted_apart(tmp_path, conditions, capsys):
    """Two lists and a strip, in batches of four that go across them."""
    second = tmp_path / "five.json"
    second.write_text(json.dumps(load_conditions(conditions, load_objects())[1:]))
    common = ["--weights", SHIPPED, "--steps", 4, "--batch-size", 4, *FP32, "--out"]
    paint("--mode", conditions, second, "process", *common, tmp_path / "one")
    for mode in (conditions, second, "process"):
        paint("--mode", mode, *common, tmp_path / "apart")
    names = [f"six/{i}.png" for i in range(6)] + [f"five/{i}.png" for i in range(5)] + ["process.png"]
    for name in names:
        one = pixels(tmp_path / "one" / name)
        apart = pixels(tmp_path / "apart" / name)
        assert np.abs(one - apart).max() <= 1
    for name in ("six.json", "five.json"):
        one = report_of(tmp_path / "one" / name)
        apart = report_of(tmp_path / "apart" / name)
        assert one["accuracies"] == apart["accuracies"] and one["painted"] == apart["painted"]


@pytest.mark.slow
def test_several_seeds_are_single_runs_put_together(tmp_path, conditions, capsys):
    reports = []
    for more in (["--seed", 3], ["--seed", 4], ["--seed", 3, "--seeds", 2]):
        common = ["--mode", conditions, "--weights", SHIPPED, "--out", tmp_path / "out", "--steps", 5]
        paint(*common, *more, "--overwrite")
        reports.append(report_of(tmp_path / "out" / "six.json"))
    accuracies = reports[2]["accuracies"]
    assert accuracies == [reports[0]["accuracy"], reports[1]["accuracy"]]
    assert f"{np.mean(accuracies):.4f} (mean of 2 seeds" in capsys.readouterr().out.splitlines()[-1]


# -------------------------------------------------------------------------------------------- better pictures


@pytest.mark.slow
def test_best_of_keeps_one_of_the_candidates_and_the_better_one(tmp_path, conditions, capsys):
    common = ["--mode", conditions, "--weights", SHIPPED, "--steps", 4, "--guidance-scale", 2, "--out"]
    paint(*common, tmp_path / "one")
    paint(*common, tmp_path / "best", "--best-of", 2)
    one = to_float(read_pictures(tmp_path / "one" / "six", 6))
    best = to_float(read_pictures(tmp_path / "best" / "six", 6))
    kept = (one - best).abs().amax((1, 2, 3)) < 0.02
    assert 0 < kept.sum() < 6  # some first candidates were the best, others not

    model, noise_scheduler, metadata = load_weights(SHIPPED)
    learned = {name: metadata["sampling"][name] for name in ("learned_scale", "learned_interval")}
    model.eval()
    objects = load_objects()
    chosen = load_conditions(conditions, objects)
    labels = multi_hot(chosen, objects)
    mistakes = [labels_with_one_mistake(condition, objects) for condition in chosen]
    before = diffusion.likelihood_ratio(model, noise_scheduler, one, labels, mistakes, **learned)
    after = diffusion.likelihood_ratio(model, noise_scheduler, best, labels, mistakes, **learned)
    assert (after[~kept] > before[~kept]).all()
    assert report_of(tmp_path / "best" / "six.json")["best_of"] == 2


@pytest.mark.slow
def test_guidance_by_the_evaluator_raises_the_score_and_is_told(tmp_path, conditions, capsys):
    """Without labels in the network's guidance, so that there is something to mend."""
    common = ["--mode", conditions, "--weights", SHIPPED, "--steps", 8, "--guidance-scale", 0]
    scores = []
    for scale in (0, 10):
        paint(*common, "--out", tmp_path / str(scale), "--evaluator-scale", scale)
        scores.append(report_of(tmp_path / str(scale) / "six.json")["accuracy"])
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.endswith("guided by the evaluator: no measure of the model") == (scale > 0)
    assert scores[1] > scores[0] + 0.2
