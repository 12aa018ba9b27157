"""The evaluator: the lab's interface, what it refuses, and how well the one that ships judges."""

import json
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

import evaluator
from conftest import ROOT
from data.pack import PACK
from dataset import ICLEVRDataset, to_float
from evaluator import evaluation_model
from infra.commands import InputError
from label_files import load_objects

SHIPPED = ROOT / "weights" / "evaluator.pth"


def lab_accuracy(out, onehot_labels):
    """Micro top-k accuracy written out label by label."""
    hits = total = 0
    for scores, label in zip(out.tolist(), onehot_labels.tolist(), strict=True):
        k = int(sum(label))
        best = sorted(range(24), key=lambda i: -scores[i])[:k]
        hits += sum(label[i] == 1 for i in best)
        total += k
    return hits / total


@pytest.fixture(scope="module")
def judge():
    return evaluation_model(SHIPPED, "cpu")


def test_the_interface_is_the_labs(judge):
    assert judge.classnum == 24 and isinstance(judge.resnet18.fc[1], torch.nn.Sigmoid)
    checkpoint = torch.load(SHIPPED, weights_only=True)
    assert checkpoint["model"]["fc.0.weight"].shape == (24, 512)
    images = torch.rand(5, 3, 64, 64) * 2 - 1
    labels = torch.eye(24)[:5]
    accuracy = judge.eval(images, labels)
    assert isinstance(accuracy, float) and accuracy == lab_accuracy(judge.resnet18(images), labels)
    images.requires_grad_()
    judge.resnet18(images)[0, 3].backward()  # what evaluator guidance needs
    assert images.grad[0].abs().sum() > 0


def test_accuracy_is_micro_top_k(judge):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        out = torch.rand(16, 24, generator=generator)
        labels = torch.zeros(16, 24)
        for row in labels:
            count = int(torch.randint(1, 4, (1,), generator=generator))
            row[torch.randperm(24, generator=generator)[:count]] = 1
        assert judge.compute_acc(out, labels) == pytest.approx(lab_accuracy(out, labels))


def test_an_object_too_many_breaks_the_set_but_not_the_accuracy(judge):
    labels = torch.eye(24)[:4]
    out = labels * 0.9
    out[1, 5] = 0.8  # too many
    out[2, 2] = 0.1  # too few, though the highest
    assert judge.compute_acc(out, labels) == 1
    assert judge.exact_set(out, labels) == 0.5


def test_unusable_images_are_refused(judge):
    labels = torch.eye(24)[:2]
    for value in (float("nan"), float("inf"), -float("inf"), 3e38):  # of the last the outputs are NaN
        bad = torch.zeros(2, 3, 64, 64)
        bad[0] = value
        with pytest.raises(ValueError, match="expected"), warnings.catch_warnings(action="ignore"):
            judge.eval(bad, labels)
    for dtype in (torch.uint8, torch.long, torch.complex64):
        with pytest.raises(ValueError, match="expected"):
            judge.eval(torch.zeros(2, 3, 64, 64, dtype=dtype), labels)
    for shape in ((3, 64, 64), (2, 1, 64, 64), (2, 64, 64, 3), (2, 3, 0, 64)):
        with pytest.raises(ValueError, match="expected"):
            judge.eval(torch.zeros(shape), labels)
    with pytest.raises(ValueError, match="expected uint8"):
        judge.judge(torch.zeros(2, 3, 64, 64))


def test_unusable_labels_are_refused(judge):
    images = torch.zeros(2, 3, 64, 64)
    for shape in ((1, 24), (3, 24), (24,), (2, 23), (2,)):
        with pytest.raises(ValueError, match=r"expected labels of shape \[2, 24\]"):
            judge.eval(images, torch.ones(shape))
    for value in (0.5, 2, -1, float("nan")):
        with pytest.raises(ValueError, match="other than 0 and 1"):
            judge.eval(images, torch.full((2, 24), value))


def test_nothing_to_score_is_said(judge):
    images = torch.zeros(2, 3, 64, 64)
    labels = torch.zeros(2, 24)
    for some in (images, images.half()[:0]):
        with pytest.raises(ValueError, match="nothing to score"):
            judge.eval(some, labels[: len(some)])
    with pytest.raises(ValueError, match="nothing to score"):
        judge.compute_acc(labels, labels)
    for call in (judge.compute_acc, judge.exact_set):
        with pytest.raises(ValueError, match="nothing to score"):
            call(labels[:0], labels[:0])


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_the_types_of_images_and_labels_make_no_difference(judge, dtype):
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1).to(dtype)
    labels = torch.eye(24)[:4]
    expected = judge.resnet18(images.float())
    assert torch.equal(judge.probabilities(images), expected)
    for kind in (torch.bool, torch.uint8, torch.long, dtype):
        assert judge.eval(images, labels.to(kind)) == lab_accuracy(expected, labels)
        assert judge.compute_acc(expected.to(dtype), labels.to(kind)) == judge.eval(images, labels)
    # More labels than bfloat16 can count.
    assert judge.compute_acc(torch.ones(40, 24, dtype=dtype), torch.ones(40, 24, dtype=dtype)) == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell a process's peak")
def test_many_images_need_little_memory(run):
    """They are judged some at a time: in one go 2,000 would take 2 GB."""
    code = """
import torch
from pathlib import Path
from evaluator import evaluation_model
images, labels = torch.zeros(2000, 3, 64, 64), torch.eye(24)[[0]].expand(2000, 24)
accuracy = evaluation_model().eval(images, labels)
[peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(accuracy, int(peak.split()[1]) / 2**20)
"""
    accuracy, gigabytes = map(float, run(ROOT, "-c", code).stdout.split())
    assert 0 <= accuracy <= 1 and gigabytes < 1.4


def test_unclamped_images_are_warned_about_once():
    judge = evaluation_model(SHIPPED, "cpu")
    with pytest.warns(UserWarning, match="1.20"):
        judge.eval(torch.full((1, 3, 64, 64), 1.2), torch.eye(24)[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge.eval(torch.full((1, 3, 64, 64), 1.2), torch.eye(24)[:1])
        judge.eval(torch.randn(1, 3, 64, 64) * 1000, torch.eye(24)[:1])  # as early in training


@pytest.mark.slow
def test_another_scale_or_size_is_warned_about_once():
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(2, 3, 64, 64, generator=generator)
    label = torch.eye(24)[:2]
    wide = torch.rand(2, 3, 240, 320, generator=generator) * 2 - 1
    kinds = {
        r"look like \[0, 1\].*images \* 2 - 1": unit,
        r"look like 0 to 255.*images / 127.5 - 1": unit * 255,
        r"are 320x240.*squashed to 64x64.*dataset.read_picture": wide,
        r"images reach \d+\.\d\d;": (unit * 2 - 1) * 1000,
    }
    for _ in range(2):  # of each evaluator anew
        judge = evaluation_model(SHIPPED, "cpu")
        for message, images in kinds.items():
            with pytest.warns(UserWarning) as told:
                judge.eval(images, label)
            assert len(told) == 1 and re.search(message, str(told[0].message))
        with warnings.catch_warnings(action="error"):
            for images in kinds.values():
                judge.eval(images.double(), label)
    with pytest.warns(UserWarning) as told:  # both at once
        evaluation_model(SHIPPED, "cpu").eval(wide.abs(), label)
    assert len(told) == 2


def test_images_as_they_should_be_are_not_warned_about():
    judge = evaluation_model(SHIPPED, "cpu")
    label = torch.eye(24)[:1]
    with warnings.catch_warnings(action="error"):
        for low, high in ((-1, 1), (-1.05, 1.05), (-1, -0.5), (-0.1, 1)):
            judge.eval(torch.linspace(low, high, 3 * 64 * 64).view(1, 3, 64, 64), label)
        judge.eval(torch.zeros(1, 3, 64, 64), label)
        judge.judge(torch.full((1, 3, 64, 64), 200, dtype=torch.uint8))  # a bright picture, of a known scale


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"model": Bomb()}))
    with pytest.raises(InputError, match="bad.pth"):
        evaluation_model(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()
    torch.save({"model": {"fc.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(SHIPPED.read_bytes()[:1000])
    for name in ("other.pth", "cut.pth", "missing.pth"):
        with pytest.raises(InputError, match=name):
            evaluation_model(tmp_path / name)


@pytest.mark.slow
def test_the_labs_checkpoint_is_used_when_it_is_there(clone, run):
    """`evaluation_model()` as the lab's users call it, before and after checkpoint.pth drops in."""
    code = "from evaluator import evaluation_model; e = evaluation_model(); print(e.path.name, e.classnum)"
    assert run(clone, "-c", code).stdout.split() == ["evaluator.pth", "24"]
    state = torch.load(SHIPPED)["model"]
    state = {name: v.float() if v.is_floating_point() else v for name, v in state.items()}
    torch.save({"model": state}, clone / "checkpoint.pth")
    assert run(clone, "-c", code).stdout.split() == ["checkpoint.pth", "24"]


@pytest.mark.slow
def test_shipped_weights_know_the_pictures_that_ship(judge, tmp_path, capsys):
    """Of their scenes none was trained on. Every 24th scene; the whole is in docs/evaluator.md."""
    data = ICLEVRDataset(PACK, ROOT / "train.json", load_objects())
    some = torch.arange(len(data)).view(-1, 3)[::24].flatten()
    images = to_float(data.images[some])
    labels = data.labels[some]
    seen = judge.probabilities(images)
    assert judge.compute_acc(seen, labels) >= 0.997
    assert judge.exact_set(seen, labels) >= 0.985
    torch.manual_seed(0)
    assert judge.eval(evaluator.soften(images, 0.6, 4), labels) >= 0.99
    assert judge.eval(images.flip(0), labels) < 0.4  # wrong labels
    for i in range(6):
        save_image(images[i] / 2 + 0.5, tmp_path / f"{i}.png")
    (tmp_path / "labels.json").write_text(json.dumps([data.conditions[i] for i in some[:6]]))
    capsys.readouterr()
    evaluator.main([str(tmp_path), "--weights", str(SHIPPED)])  # labels.json beside the pictures
    accuracy = judge.eval(images[:6], labels[:6])
    exact = judge.exact_set(judge.probabilities(images[:6]), labels[:6])
    assert capsys.readouterr().out.splitlines()[-1] == f"accuracy: {accuracy:.4f}, exact set: {exact:.4f}"


@pytest.mark.parametrize(("absent", "middle"), [(0.3, 0.5), (0.6, 0.65)])
def test_the_threshold_is_the_middle_of_the_best_ones(absent, middle):
    probabilities = torch.tensor([[0.9, absent], [0.8, 0.7]])
    threshold = evaluator.fit_threshold(probabilities, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert threshold == pytest.approx(middle, abs=0.02)


def test_soften_blurs_and_adds_noise():
    edge = torch.ones(2, 3, 64, 64)
    edge[..., 32:] = -1
    torch.manual_seed(0)
    soft = evaluator.soften(edge, 0.6, 4)
    assert (soft[..., :20] - 1).std().item() == pytest.approx(4 / 127.5, rel=0.05)
    assert 0.2 < soft[..., 31].mean() < 0.8  # 0.6 pixels: a fifth of the pixel's weight is across the edge


@pytest.mark.slow
def test_training_writes_weights_that_load(pictures, tmp_path, capsys):
    out = tmp_path / "new" / "evaluator.pth"
    argv = [pictures, "--labels", ROOT / "train.json", "--train", "--epochs", 2, "--out", out]
    evaluator.main(list(map(str, argv)))
    assert f"{out}: trained on 9 pictures, threshold 0." in capsys.readouterr().out
    trained = evaluation_model(out)
    assert out.stat().st_size < 23e6 and 0 < trained.threshold < 1
    assert [p.name for p in out.parent.iterdir()] == [out.name]
