"""Guidance distillation, hard conditions and extra pictures in training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import diffusion
import train
from checkpoint import checkpoints, load_weights
from conftest import NAMES, ROOT, SHIPPED, TINY
from data import render
from data.pack import PACK
from dataset import ICLEVRDataset, draw_labels, draw_pictures, load_data, to_float
from infra.files import load_json, write_json
from label_files import load_labels, load_objects
from labels import colour_of, hard_negatives, multi_hot, pairs_of_one_colour
from runs import log_of

OBJECTS = load_objects()
GUIDED = {"guidance_scale": 3.0, "guidance_interval": [0, 700], "negative_scale": 2.0, "negative_interval": [300, 1000]}
ONE_STEP = ["--max-steps", "1", "--learning-rate", "0", "--warmup-steps", "0", "--label-dropout", "0"]


# ------------------------------------------------------------------------------------------- guidance distillation


def test_the_teachers_guidance_follows_each_pictures_timestep():
    """Of a network that predicts what the label weighs, which is easy to guide by hand."""
    weights = torch.linspace(0.1, 1, 24)

    def network(images, timesteps, labels):
        return (labels @ weights).view(-1, 1, 1, 1).expand_as(images)

    condition = ["red cube", "red sphere"]
    label = multi_hot([condition], OBJECTS)
    negative = hard_negatives(condition, OBJECTS)
    conditional = (label @ weights).item()
    away = min((conditional - value for value in (negative @ weights).tolist()), key=abs)
    timesteps = torch.tensor([100, 500, 900, 500])
    labels = torch.cat([label, label, label, torch.zeros(1, 24)])
    negatives = diffusion.Negatives([negative] * 4, labels.device)
    found = diffusion.guided_prediction(network, torch.zeros(4, 3, 64, 64), timesteps, labels, negatives, **GUIDED)
    expected = [3 * conditional, 3 * conditional + 2 * away, conditional + 2 * away, 0.0]
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor(expected))


def test_the_teacher_predicts_what_sampling_goes_on_with():
    """With one step of ddim the picture follows from one prediction."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 3, 3, padding=1)
    conditions = [["red cube", "red sphere"], ["blue cube"]]
    labels = multi_hot(conditions, OBJECTS)
    negative_labels = [hard_negatives(condition, OBJECTS) for condition in conditions]

    def model(images, timesteps, labels):
        return network(images) + labels.cumsum(1).sum(1).view(-1, 1, 1, 1) / 100

    noise_scheduler = train.build("small")[1]
    picture = diffusion.generate(
        model, noise_scheduler, labels, [5, 6], "ddim", 1, negative_labels=negative_labels, **GUIDED
    )
    noise = diffusion.initial_noise([5, 6], labels.device)
    timesteps = torch.full((2,), 999)
    negatives = diffusion.Negatives(negative_labels, labels.device)
    prediction = diffusion.guided_prediction(model, noise, timesteps, labels, negatives, **GUIDED)
    scheduler = diffusion.make_scheduler(noise_scheduler, "ddim", 1)
    expected = scheduler.step(prediction, scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(picture, expected.clamp(-1, 1))


def distill(there, *options) -> tuple[float, dict]:
    """Train a step on the weights in the folder `there`; the loss, and what the student says of itself."""
    argv = ["--model", "small", "--labels", "labels.json", "--data", "pictures", "--distill", "weights", "--out", "s"]
    train.main([*argv, "--batch-size", "4", "--sample-every", "0", "--mixed-precision", "no", *ONE_STEP, *options])
    return log_of(there / "s")[0]["loss"], checkpoint.load_metadata(checkpoints(there / "s")[-1])


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_student_starts_from_its_teacher_and_learns_its_guidance(there, guidance_scale):
    """Without guidance there is nothing to learn: the loss is 0."""
    metadata = load_json(there / "weights" / "metadata.json")
    metadata["sampling"]["guidance_scale"] = guidance_scale
    (there / "weights" / "metadata.json").write_text(json.dumps(metadata))
    loss, student = distill(there)
    assert (loss > 3e-14) == (guidance_scale != 1) and loss < 1e-6
    learned = {"learned_scale": guidance_scale, "learned_interval": [0, 1000]}
    assert student["sampling"] == metadata["sampling"] | {"guidance_scale": 1.0} | learned
    assert student["recipe"]["distill"] == student["recipe"]["init"] == "weights"
    before = load_file(there / "weights" / checkpoint.WEIGHTS_NAME)
    after = load_file(checkpoints(there / "s")[-1] / checkpoint.WEIGHTS_NAME)
    assert all(torch.equal(before[name], value) for name, value in after.items())
    # To ship, a student keeps its options, in place of those of the preset.
    checkpoint.main([str(there / "s"), str(there / "shipped")])
    assert checkpoint.load_metadata(there / "shipped")["sampling"] == student["sampling"]


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher(pictures, tmp_path):
    """Both are judged on what the teacher predicts with guidance for the same noisy pictures."""
    shutil.copytree(SHIPPED, tmp_path / "teacher")
    metadata = load_json(SHIPPED / "metadata.json")
    metadata["sampling"].update(GUIDED)
    write_json(tmp_path / "teacher" / "metadata.json", metadata)
    argv = [*TINY, "--data", pictures, "--distill", tmp_path / "teacher", "--out", tmp_path / "student"]
    argv += ["--max-steps", 24, "--optimizer", "adamw", "--learning-rate", 2e-4, "--warmup-steps", 0]
    train.main([str(option) for option in [*argv, "--ema-decay", 0.5]])
    data = ICLEVRDataset(pictures, ROOT / "train.json", OBJECTS)
    teacher, noise_scheduler, _ = load_weights(SHIPPED)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(12, 3, 64, 64, generator=generator)
    timesteps = torch.full((12,), 600)
    noisy = noise_scheduler.add_noise(to_float(data.images), noise, timesteps)
    negatives = diffusion.Negatives([hard_negatives(c, OBJECTS) for c in data.conditions], noisy.device)
    target = diffusion.guided_prediction(teacher, noisy, timesteps, data.labels, negatives, **GUIDED)
    student, _, _ = load_weights(tmp_path / "student")
    with torch.no_grad():
        before, after = ((m(noisy, timesteps, data.labels) - target).square().mean() for m in (teacher, student))
    assert after < 0.97 * before


def test_a_share_of_the_labels_differs_by_a_mistake():
    """Another object of that colour in the place of one, or an object less."""
    data = ICLEVRDataset(PACK, ROOT / "train.json", OBJECTS)
    indices = torch.arange(1000)
    assert torch.equal(draw_labels(indices, data, 0.0), indices)
    torch.manual_seed(0)
    labels_of = draw_labels(indices, data, 0.25)
    kinds = []
    for index, label_index in zip(indices.tolist(), labels_of.tolist(), strict=True):
        lost = set(data.conditions[index]) - set(data.conditions[label_index])
        found = set(data.conditions[label_index]) - set(data.conditions[index])
        assert not found or {colour_of(name) for name in found} == {colour_of(name) for name in lost}
        kinds.append((len(lost), len(found)))
    assert set(kinds) == {(0, 0), (1, 0), (1, 1)}
    assert 700 < kinds.count((0, 0)) < 800 and kinds.count((1, 0)) > 50 and kinds.count((1, 1)) > 50


def test_an_object_that_is_there_twice_may_be_a_mistake_too(extra):
    """Of a red cube and a red sphere two red cubes, and the other way round; not a single one."""
    data = ICLEVRDataset(extra, extra / "labels.json", OBJECTS, may_repeat=True)
    assert data.conditions[:2] == [["red cube", "red cube"], ["red cube", "red sphere"]]
    assert [set(confusable) for confusable in data.confusable] == [{1}, {0}, set()]


def test_wrong_labels_are_only_for_a_student(refused, tmp_path):
    refused(train.main, ["--wrong-labels", "0.3", "--out", tmp_path / "run"], "--wrong-labels 0.3", "--distill")


# --------------------------------------------------------------------------------- hard conditions, extra pictures


@pytest.fixture
def extra(pictures, tmp_path):
    """Three pictures with labels of their own, one of which names an object twice."""
    folder = tmp_path / "extra"
    folder.mkdir()
    labels = {}
    conditions = [["red cube", "red cube"], ["red cube", "red sphere"], ["blue cube"]]
    for i, condition in enumerate(conditions):
        labels[f"CLEVR_extra_{i:06d}_0.png"] = condition
        shutil.copy(pictures / NAMES[i], folder / f"CLEVR_extra_{i:06d}_0.png")
    write_json(folder / "labels.json", labels)
    return folder


def test_extra_pictures_come_behind_the_others(pictures, extra):
    alone, _ = load_data(pictures, ROOT / "train.json", OBJECTS)
    data, found = load_data(pictures, ROOT / "train.json", OBJECTS, extra)
    assert found == pictures and len(data) == 15 and len(data.label_file) == 18012
    assert torch.equal(data.images[12:], alone.images[:3]) and data.filenames[12] == "CLEVR_extra_000000_0.png"
    assert data.labels[12, OBJECTS["red cube"]] == 2 and data.labels[12].sum() == 2
    assert torch.equal(data.labels[:12], alone.labels) and data.sha256() != alone.sha256()


def test_only_extra_pictures_may_show_an_object_twice(extra, refused, tmp_path):
    argv = ["--data", extra, "--labels", extra / "labels.json", "--out", tmp_path / "run"]
    refused(train.main, argv, "'red cube' stands there twice, expected different objects")
    (extra / "labels.json").unlink()
    refused(train.main, ["--extra", extra, "--out", tmp_path / "run"], extra / "labels.json")


def test_a_share_of_each_batch_is_hard(pictures):
    data = ICLEVRDataset(pictures, ROOT / "train.json", OBJECTS)
    is_hard = [len(c) == 3 or pairs_of_one_colour(c) for c in data.conditions]
    assert data.hard.tolist() == [i for i, hard in enumerate(is_hard) if hard]
    for step in range(5):
        indices = draw_pictures(step, 8, data, 0.75, seed=3)
        assert len(indices) == 8 and all(is_hard[i] for i in indices[:6])
    every = torch.cat([draw_pictures(step, 8, data, 0.0, seed=3) for step in range(3)])
    assert every.bincount().tolist() == [2] * 12
    assert draw_pictures(0, 8, data, 1.0, seed=3).unique().tolist() == data.hard.tolist()


def test_a_share_of_hard_pictures_wants_some(extra, refused, tmp_path):
    write_json(extra / "labels.json", {"CLEVR_extra_000002_0.png": ["blue cube"]})
    argv = ["--data", extra, "--labels", extra / "labels.json", "--hard-share", "0.5", "--out", tmp_path / "run"]
    refused(train.main, argv, "--hard-share 0.5", "has no picture of three objects or of two in one colour")


@pytest.mark.slow
def test_a_run_with_extra_pictures_and_hard_batches_goes_on_with_the_same(there, extra, refused):
    argv = ["--model", "small", "--labels", "labels.json", "--data", "pictures", "--out", "e", "--init", "weights"]
    argv += ["--batch-size", "4", "--sample-every", "0", "--mixed-precision", "no", "--save-every", "1"]
    recipe = ["--extra", extra, "--hard-share", "0.5", "--logit-mean", "0.7", "--max-steps"]
    train.main([str(option) for option in [*argv, *recipe, 2]])
    _, _, metadata = load_weights(there / "e")
    assert metadata["data"]["pictures"] == 15 and metadata["recipe"]["extra"] == str(extra)
    assert metadata["recipe"]["hard_share"] == 0.5 and metadata["recipe"]["logit_mean"] == 0.7
    refused(train.main, [*argv, *recipe[:2], "--max-steps", 3], "began with")
    refused(train.main, [*argv, *recipe[2:], 3], "choose another --out")


def test_hard_labels_are_of_i_clevr_conditions_or_their_mistakes(tmp_path, refused):
    render.main(["--hard-labels", "--out", str(tmp_path), "--seed", "4"])
    labels = load_labels(tmp_path / "labels.json", OBJECTS, may_repeat=True)
    train_sets = {frozenset(c) for c in load_labels(ROOT / "train.json", OBJECTS).values()}
    assert len(labels) > 7000 and all(pairs_of_one_colour(c) for c in labels.values())
    mistakes = [c for c in labels.values() if len(set(c)) < len(c)]
    assert len(mistakes) == render.TWICE and max(map(len, mistakes)) == 4
    assert all(frozenset(c) in train_sets for c in labels.values() if len(set(c)) == len(c))
    scenes = render.group_scenes(labels, tmp_path)
    assert len(scenes) == render.TWICE + 2 * 1453
