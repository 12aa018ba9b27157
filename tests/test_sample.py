"""sample.py with the weights that ship, and what it says about others."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import LAUNCH, ROOT, TINY
from PIL import Image

import diffusion
import evaluator
import sample
import train
from checkpoint import load_weights
from data.pack import PACK
from dataset import ICLEVRDataset, read_pictures, to_float
from labels import load_conditions, load_objects, mistaken_labels, multi_hot, twin_labels
from model import build
from options import SAMPLERS

SHIPPED = ROOT / "weights" / "small"
FP32 = ("--mixed-precision", "no")  # where pictures are compared: some processors would choose bf16


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
    loading, first, *_, last = process.stdout.splitlines()
    assert (
        loading == "sample.py: loading PyTorch"
        and first.startswith("weights: ")
        and "weights/small (small, trained on " in first
    )
    report = json.loads((clone / "images" / "test.json").read_text())
    assert last == f"accuracy: {report['accuracy']:.4f}, exact set: {report['exact_set']:.4f}"
    assert report["steps"] > 1 and report["seed"] == 0
    files = sorted((clone / "images" / "test").iterdir(), key=lambda p: int(p.stem))
    assert [p.name for p in files] == [f"{i}.png" for i in range(32)]
    assert all(Image.open(p).size == (64, 64) for p in files)
    assert Image.open(clone / "images" / "test.png").size == (8 * 66 + 2, 4 * 66 + 2)
    assert report["accuracy"] > 0.7  # chance is 0.1
    process = run(clone, "evaluator.py", "images/test")
    assert process.stdout.splitlines()[-1] == last


def test_pictures_do_not_depend_on_the_batch(tmp_path, conditions, capsys):
    """Nor on how many there are: each has a seed of its own."""
    for size in (1, 4):
        argv = ["--mode", conditions, "--weights", SHIPPED, "--steps", 4, "--batch-size", size, *FP32]
        argv += ["--out", tmp_path / str(size)]
        sample.main(list(map(str, argv)))
    for i in range(6):
        one, four = (np.array(Image.open(tmp_path / n / "six" / f"{i}.png")).astype(int) for n in "14")
        assert np.abs(one - four).max() <= 1
    first = np.array(Image.open(tmp_path / "1" / "six" / "0.png")).astype(int)
    assert np.abs(first - one).max() > 10  # the last one is another picture


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_stay_in_range_and_repeat(sampler):
    model, noise_scheduler, _ = load_weights(SHIPPED)
    labels = multi_hot([["red cube"], ["cyan sphere", "gray cylinder"]], load_objects())
    a, b = (
        diffusion.generate(model.eval(), noise_scheduler, labels, [5, 6], sampler, 8, 2.0) for _ in range(2)
    )
    assert torch.equal(a, b) and a.abs().max() <= 1
    assert a.std() > 0.05


def test_more_steps_of_ddim_are_no_worse():
    """Noise and picture of a step have to belong together, also where guidance makes it clamp a lot."""
    model, noise_scheduler, metadata = load_weights(SHIPPED)
    chosen, objects = load_conditions(ROOT / "validation.json", load_objects())[-4:], load_objects()
    labels = multi_hot(chosen, objects)
    options = metadata["sampling"] | {"sampler": "ddim", "negative_scale": 0.0}
    options["guidance_interval"] = (0, 1000)
    pictures = [
        diffusion.generate(
            model.eval(), noise_scheduler, labels, list(range(4)), **options | {"steps": steps}
        )
        for steps in (10, 40)
    ]
    judge = evaluator.evaluation_model(ROOT / "weights" / "evaluator.pth", "cpu")
    few, many = (judge.eval(images, labels) for images in pictures)
    assert many >= few - 0.1  # it fell from 0.92 to 0.71
    assert (pictures[0] - pictures[1]).abs().mean() < 0.015  # the same pictures, nearly; it was 0.023


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
        sample.main(list(map(str, [*argv, *more, "--overwrite"])))
        single.append(json.loads((tmp_path / "out" / "six.json").read_text()))
    assert single[2]["accuracies"] == [single[0]["accuracy"], single[1]["accuracy"]]
    assert (
        f"{np.mean(single[2]['accuracies']):.4f} (mean of 2 seeds" in capsys.readouterr().out.splitlines()[-1]
    )


def test_a_run_is_found_and_its_youth_told(clone, pictures, run, conditions):
    shutil.copy(conditions, clone / "six.json")
    train.main([*TINY, "--data", str(pictures), "--out", str(clone / "runs" / "young"), "--max-steps", "1"])
    process = run(clone, "sample.py", "--mode", "six.json", "--steps", 2)
    first = process.stdout.splitlines()[1]
    assert first.startswith(
        "weights: runs/young/checkpoint-0000001 (small, trained on 4 pictures, less than one epoch"
    )
    assert "weights/small" in first
    assert len(list((clone / "images" / "six").iterdir())) == 6


def test_two_processes_paint_what_one_does(tmp_path, conditions, run):
    """Eleven pictures of a list of six, each with its own condition and seed."""
    common = ["--mode", conditions, "--weights", SHIPPED, "--steps", 4, *FP32, "--num-images"]
    process = run(ROOT, *LAUNCH, "sample.py", *common, 11, "--batch-size", 2, "--out", tmp_path / "two")
    assert process.returncode == 0, process.stderr[-3000:]
    assert "setup: cpu, 2 processes, fp32" in process.stdout
    sample.main(list(map(str, [*common, 11, "--out", tmp_path / "one"])))
    reports = [json.loads((tmp_path / name / "six.json").read_text()) for name in ("one", "two")]
    assert len(reports[0]["accuracies"]) == 1 and reports[0]["num_images"] == 11
    for i in range(11):
        one, two = (
            np.array(Image.open(tmp_path / n / "six" / f"{i}.png")).astype(int) for n in ("one", "two")
        )
        assert np.abs(one - two).max() <= 1


def test_all_lists_of_a_command_are_one_queue(tmp_path, conditions, capsys):
    """Two lists and a strip, in batches of four that go across them, are those painted apart."""
    second = tmp_path / "five.json"
    second.write_text(json.dumps(load_conditions(conditions, load_objects())[1:]))
    common = ["--weights", SHIPPED, "--steps", 4, "--batch-size", 4, *FP32, "--out"]
    sample.main(list(map(str, ["--mode", conditions, second, "process", *common, tmp_path / "one"])))
    for mode in (conditions, second, "process"):
        sample.main(list(map(str, ["--mode", mode, *common, tmp_path / "apart"])))
    names = [f"six/{i}.png" for i in range(6)] + [f"five/{i}.png" for i in range(5)] + ["process.png"]
    for name in names:
        one, two = (np.array(Image.open(tmp_path / n / name)).astype(int) for n in ("one", "apart"))
        assert np.abs(one - two).max() <= 1
    for name in ("six", "five"):
        one, two = (json.loads((tmp_path / n / f"{name}.json").read_text()) for n in ("one", "apart"))
        assert one["accuracies"] == two["accuracies"] and one["painted"] == two["painted"]


def test_guidance_outside_of_the_interval_is_none():
    model, noise_scheduler, _ = load_weights(SHIPPED)
    labels = multi_hot([["red cube"]], load_objects())
    passes = []

    def network(images, timesteps, labels):
        passes.append((int(timesteps[0]), len(images)))
        return model(images, timesteps, labels)

    def paint(*guidance):
        return diffusion.generate(network, noise_scheduler, labels, [5], "ddim", 8, *guidance)

    never, none, always, whole = paint(3.0, (2, 3)), paint(1.0), paint(3.0), paint(3.0, (0, 1000))
    assert torch.equal(never, none) and torch.equal(always, whole) and not torch.equal(none, whole)
    passes.clear()
    paint(3.0, (200, 700))
    assert [count for t, count in passes] == [2 if 200 <= t <= 700 else 1 for t, _ in passes]
    assert {count for _, count in passes} == {1, 2}


def test_negative_labels_change_pairs_of_a_colour_alone():
    model, noise_scheduler, _ = load_weights(SHIPPED)
    conditions, objects = [["red cube", "blue sphere"], ["red cube", "red sphere"]], load_objects()
    labels, negatives = multi_hot(conditions, objects), [twin_labels(c, objects) for c in conditions]
    passes = []

    def network(images, timesteps, labels):
        passes.append((int(timesteps[0]), len(images)))
        return model(images, timesteps, labels)

    def paint(*some):
        return diffusion.generate(
            network, noise_scheduler, labels, [5, 6], "ddim", 8, 2.0, (0, 1000), negatives, *some
        )

    plain, pushed, never = paint(), paint(4.0, (300, 800)), paint(4.0, (2, 3))
    assert torch.equal(plain, never)
    torch.testing.assert_close(plain[0], pushed[0], atol=1e-3, rtol=0)
    assert (plain[1] - pushed[1]).abs().max() > 0.1
    passes.clear()
    paint(4.0, (300, 800))
    guided = [t for t, count in passes if count == 4]
    assert passes == [(t, count) for t in guided for count in ([4, 2] if 300 <= t <= 800 else [4])]


def test_only_the_nearest_negative_label_counts():
    noise_scheduler = build("small")[1]
    labels = torch.zeros(1, 24)
    near, far = torch.full((1, 24), 0.01), torch.full((1, 24), 0.02)

    def network(images, timesteps, labels):
        return labels.sum(1).view(-1, 1, 1, 1) + images  # the further the label, the further the prediction

    def paint(*negatives):
        options = {"negative_labels": [torch.cat(negatives)], "negative_scale": 2.0}
        return diffusion.generate(network, noise_scheduler, labels, [5], "ddim", 4, 1.0, **options)

    assert torch.equal(paint(near), paint(far, near)) and not torch.equal(paint(near), paint(far))


def test_lift_tells_right_labels_from_mistaken_ones():
    """On training pictures; also with a mistake for the label and the label for a mistake."""
    model, noise_scheduler, _ = load_weights(SHIPPED)
    data = ICLEVRDataset(PACK, ROOT / "train.json", load_objects())
    images, labels = to_float(data.images[:12]), data.labels[:12]
    mistakes = [mistaken_labels(condition, data.objects) for condition in data.conditions[:12]]
    lifts = diffusion.lift(model.eval(), noise_scheduler, images, labels, mistakes)
    nothing = diffusion.lift(model, noise_scheduler, images, labels, [torch.zeros(1, 24)] * 12)
    assert (lifts > 0).float().mean() >= 0.9 and (nothing > 0).all()
    first = torch.stack([mistake[0] for mistake in mistakes])
    swapped = diffusion.lift(model, noise_scheduler, images, first, list(labels.split(1)))
    assert (swapped < 0).float().mean() >= 0.9


def test_best_of_keeps_one_of_the_candidates_and_the_better_one(tmp_path, conditions, capsys):
    common = ["--mode", conditions, "--weights", SHIPPED, "--steps", 4, "--guidance-scale", 2, "--out"]
    sample.main(list(map(str, [*common, tmp_path / "one"])))
    sample.main(list(map(str, [*common, tmp_path / "best", "--best-of", 2])))
    one, best = (to_float(read_pictures(tmp_path / name / "six", 6)) for name in ("one", "best"))
    kept = (one - best).abs().amax((1, 2, 3)) < 0.02
    assert 0 < kept.sum() < 6  # some first candidates were the best, others not
    model, noise_scheduler, _ = load_weights(SHIPPED)
    chosen, objects = load_conditions(conditions, load_objects()), load_objects()
    mistakes = [mistaken_labels(condition, objects) for condition in chosen]
    before, after = (
        diffusion.lift(model.eval(), noise_scheduler, images, multi_hot(chosen, objects), mistakes)
        for images in (one, best)
    )
    assert (after[~kept] > before[~kept]).all()
    assert json.loads((tmp_path / "best" / "six.json").read_text())["best_of"] == 2


def test_the_evaluator_steers_and_is_told(tmp_path, conditions, capsys):
    """Without labels in the network's guidance, so that there is something to mend."""
    common = ["--mode", conditions, "--weights", SHIPPED, "--steps", 8, "--guidance-scale", 0, "--out"]
    scores = []
    for scale in (0, 10):
        sample.main(list(map(str, [*common, tmp_path / str(scale), "--evaluator-scale", scale])))
        scores.append(json.loads((tmp_path / str(scale) / "six.json").read_text())["accuracy"])
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.endswith("guided by the evaluator: no measure of the model") == (scale > 0)
    assert scores[1] > scores[0] + 0.2


def test_what_a_lab_asks_for_in_one_command(tmp_path, conditions, capsys):
    out = tmp_path / "out"
    argv = ["--mode", conditions, "process", "--weights", SHIPPED, "--out", out, "--steps", 12]
    sample.main(list(map(str, argv)))
    printed = capsys.readouterr().out
    assert f"process: {out}/process.png, red sphere, cyan cylinder, cyan cube" in printed
    assert "accuracy: " in printed and (out / "six.png").exists()
    strip = np.asarray(Image.open(out / "process.png")).astype(float)
    assert strip.shape == (64 + 4, 10 * 66 + 2, 3)
    frames = [strip[2:-2, 2 + 66 * i : 66 * (i + 1)] for i in range(10)]
    roughness = [np.abs(np.diff(frame, axis=0)).mean() for frame in frames]  # of neighbouring pixels
    assert roughness == sorted(roughness, reverse=True) and roughness[0] > 50 and roughness[-1] < 10
    argv = ["--mode", "process", *argv[3:], "--objects", "red sphere", "cyan cube", "--overwrite"]
    sample.main(list(map(str, argv)))
    other = np.asarray(Image.open(out / "process.png")).astype(float)
    assert np.abs(other - strip)[:, :66].max() == 0 and np.abs(other - strip)[:, -66:].max() > 50


def test_unseen_triples_come_from_the_weights(tmp_path, capsys):
    argv = ["--mode", "unseen", "--weights", SHIPPED, "--out", tmp_path, "--steps", 2, "--num-images", 3]
    sample.main(list(map(str, argv)))
    assert len(list((tmp_path / "unseen").iterdir())) == 3
    assert json.loads((tmp_path / "unseen.json").read_text())["labels"] == "unseen"


def test_mistakes_are_one_line(tmp_path, refused):
    refused(sample.main, ["--mode", "nowhere.json"], "nowhere.json: no such file")
    refused(sample.main, ["--mode", "test", "--weights", tmp_path], "metadata.json: no such file")
    shutil.copytree(SHIPPED, old := tmp_path / "old")
    metadata = json.loads((old / "metadata.json").read_text())
    for unseen, words in (
        ([], "does not tell"),
        ([["red cone"]], "unseen, entry 0: unknown object 'red cone'"),
    ):
        (old / "metadata.json").write_text(json.dumps(metadata | {"unseen": unseen}))
        refused(sample.main, ["--mode", "unseen", "--weights", old], old, words)
    refused(sample.main, ["--mode", "test", "--objects", "red cube"], "--objects is for --mode process")
    refused(
        sample.main, ["--mode", "process", "--objects", "red cone"], "--objects: unknown object 'red cone'"
    )
    refused(sample.main, ["--mode", "test", ROOT / "test.json"], "two lists named test")
    (tmp_path / "mine.json").write_text('[["red cube"]]')
    mine = tmp_path / "mine.json"
    refused(sample.main, ["--mode", mine, "--weights", SHIPPED, "--out", tmp_path], mine, "no report of")
    refused(evaluator.main, [tmp_path, "--labels", ROOT / "test.json"], "0.png: no such picture")
