"""Both judges on pictures that ship, on new ones and on what is none; the measures; the page."""

import json
import re
import statistics

import numpy as np
import pytest
import torch
from conftest import ROOT

import sample
from data import render
from data.pack import HELD_OUT, PACK
from dataset import ICLEVRDataset
from evaluator import evaluation_model
from labels import load_objects, multi_hot
from report import __main__ as report
from report import metrics
from report.judge import Found, find_objects

PAGE = ROOT / "docs" / "report.html"
OBJECTS = load_objects()
NAMES = sorted(OBJECTS, key=OBJECTS.get)


@pytest.fixture(scope="module")
def evaluator():
    return evaluation_model(ROOT / "weights" / "evaluator.pth")


@pytest.fixture(scope="module")
def held_out():
    return ICLEVRDataset(HELD_OUT, ROOT / "train.json", OBJECTS)


@pytest.fixture(scope="module")
def training():
    return ICLEVRDataset(PACK, ROOT / "train.json", OBJECTS)


def pixels(picture) -> np.ndarray:
    return np.asarray(picture).transpose(2, 0, 1)


def test_both_judges_are_right_on_held_out_renders(held_out, evaluator):
    """At least 97 % of the pictures, whose labels they do not know; an object too many is none of these."""
    chosen = range(0, len(held_out), 7)  # 300 pictures, of all three steps
    images, conditions = held_out.images[chosen], [held_out.conditions[i] for i in chosen]
    judged = metrics.judge(images, conditions, evaluator)
    assert judged.counted.float().mean() >= 0.97 and judged.exact.float().mean() >= 0.97
    wrong = metrics.judge(held_out.images[2:3], [held_out.conditions[2][:2]], evaluator)
    assert not wrong.counted.item() and not wrong.exact.item()
    assert wrong.surplus[0].total() == 1


@pytest.fixture(scope="module")
def renderer():
    return render.Renderer("64x64", samples=8, seed=0)


def test_it_counts_copies_and_finds_places(renderer):
    """Two objects of one name are nothing that the evaluator could tell from one."""
    names, distances = ["red cube", "red cube", "gray sphere"], []
    for scene in ("a", "b", "c"):
        placed, _, _ = renderer.layout(scene, names)
        found = find_objects(pixels(renderer.pictures(scene, names, [3])[0]))
        assert sorted(one.colour for one in found) == ["gray", "red", "red"]
        for name, x, y, _ in placed[:3]:
            distances.append(min(np.hypot(x - f.x, y - f.y) for f in found if f.colour == name.split()[0]))
    assert np.median(distances) < 0.4  # of some 1.2 that an object is wide


def test_pictures_without_objects_have_none(renderer):
    assert find_objects(pixels(renderer.pictures("empty", ["red cube"], [0])[0])) == []
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
    for picture in (noise, np.zeros_like(noise), np.full_like(noise, 255)):
        find_objects(picture)  # whatever it finds, it ends


def judged_by_hand(conditions: list[list[str]], seen: list[list[str]], colours: list[list[str]]):
    """What the judges are said to have seen of some pictures."""
    probabilities = multi_hot(seen, OBJECTS) * 0.9 + torch.linspace(0, 0.05, 24)
    found = [[Found(colour, 0, 0, 1) for colour in of] for of in colours]
    labels = multi_hot(conditions, OBJECTS).bool()
    return metrics.Judged(torch.zeros(len(seen), 3, 64, 64), conditions, labels, probabilities, 0.5, found)


def test_scores_by_hand():
    """Four pictures: right; a copy that the evaluator cannot see; a shape mistaken; one object for two."""
    asked = [["red cube"], ["red cube"], ["blue cube", "red cube"], ["cyan cube", "cyan sphere"]]
    seen = [["red cube"], ["red cube"], ["blue sphere", "red cube"], ["cyan cube"]]
    counted = [["red"], ["red", "red"], ["blue", "red"], ["cyan"]]
    judged = judged_by_hand(asked, seen, counted)
    found = {name: value.mean for name, value in metrics.scores([judged]).items()}
    expected = {"accuracy": 4 / 6, "per_condition": 0.75, "exact_set": 0.5, "second_judge": 0.5, "both": 0.25}
    assert found == pytest.approx(expected | {"extra_seen": 0.25, "extra_counted": 0.25})
    assert [row[:3] for row in metrics.by_number(judged)] == [(1, 2, 1.0), (2, 2, 0.5)]
    assert metrics.by_object(judged, NAMES, 1) == [("cube", 5, 0.8), ("sphere", 1, 0.0)]
    assert dict(row[::2] for row in metrics.by_object(judged, NAMES, None))["blue cube"] == 0.0
    matrix, none = metrics.confusion_matrix(judged, NAMES), 24
    assert matrix[OBJECTS["blue cube"], OBJECTS["blue sphere"]] == 1
    assert matrix[OBJECTS["cyan sphere"], none] == 1 and matrix[OBJECTS["red cube"], OBJECTS["red cube"]] == 3
    assert matrix.sum() == 6


def test_hits_are_the_evaluators_accuracy(held_out, evaluator):
    """The lab's figure, also where it is not 1: labels of other pictures."""
    images, labels = held_out.images[:300], held_out.labels[3:303]
    judged = metrics.judge(images, held_out.conditions[3:303], evaluator)
    accuracy = metrics.scores([judged])["accuracy"].mean
    assert accuracy == pytest.approx(evaluator.compute_acc(judged.probabilities, labels)) and accuracy < 0.9


def test_interval_is_students():
    found = metrics.spread([0.9, 0.92, 0.97])
    assert (found.mean, found.deviation) == (statistics.mean([0.9, 0.92, 0.97]), pytest.approx(0.0360555))
    assert found.interval == pytest.approx((0.93 - 0.0895666, 0.93 + 0.0895666))  # 4.30265 sd / sqrt(3)
    assert metrics.spread([0.5]).interval is None


def test_likeness_and_copies(held_out, training, evaluator):
    """Real pictures are near to real ones, blurred ones are not; a copy has distance 0."""
    real, other = (metrics.features(x.images[:300], evaluator) for x in (held_out, training))
    blurred = torch.nn.functional.avg_pool2d(training.images[:300].float(), 3, 1, 1).to(torch.uint8)
    near, far = (metrics.distances(real, x) for x in (other, metrics.features(blurred, evaluator)))
    assert far["frechet"] > 2 * near["frechet"] and far["kernel"] > abs(near["kernel"]) + 0.01
    pictures = torch.cat([training.images[1100:1101], held_out.images[2:3]])
    distance, which = metrics.nearest(pictures, training.images[:2500])
    assert which[0] == 1100 and distance[0] == 0
    differences = training.images[:2500].float() - pictures[1].float()
    best = differences.square().mean((1, 2, 3)).sqrt()
    assert which[1] == best.argmin() and distance[1] == pytest.approx(best.min().item())


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """What the README's commands leave, only less of it."""
    folder = tmp_path_factory.mktemp("samples")
    (folder / "four.json").write_text(
        '[["red cube"], ["cyan sphere"], ["gray cylinder", "red cube"], ["blue cube", "blue sphere"]]'
    )
    images, common = folder / "images", ["--weights", str(ROOT / "weights" / "small"), "--steps", "8"]
    sample.main(
        ["--mode", str(folder / "four.json"), "process", "--seeds", "2", "--out", str(images), *common]
    )
    sample.main(["--mode", "train", "--num-images", "12", "--out", str(images), *common])
    guided = ["--evaluator-scale", "3", "--out", str(images / "guided")]
    sample.main(["--mode", str(folder / "four.json"), *guided, *common])
    return images


def test_a_line_for_each_folder(samples, tmp_path, capsys, refused):
    stored = json.loads((samples / "four.json").read_text())
    metrics.main([str(samples / "four")])
    line = capsys.readouterr().out
    assert line.startswith(
        f"{samples / 'four'}: 8 pictures, accuracy {stored['accuracy']:.4f} (95 % interval "
    )
    assert f"exact set {stored['exact_set']:.4f}; number and colours right " in line
    assert float(line.split()[-1]) >= 0.4
    refused(metrics.main, [tmp_path / "nowhere"], "nowhere.json: no such file")
    (tmp_path / "four.json").write_text("[]")
    refused(metrics.main, [tmp_path / "four"], "four.json: expected the report that sample.py writes")


def test_the_page(samples, pictures, tmp_path, refused, capsys):
    page = tmp_path / "page.html"
    argv = ["--data", str(PACK), "--held-out", str(pictures)]  # few renders
    report.main([str(samples), "--out", str(page), *argv])
    text = page.read_text()
    judged = metrics.load_samples(samples / "four")[1].part(range(4))
    wrong = int((~(judged.exact & judged.counted)).sum())
    section = text[text.index("<h2>four</h2>") : text.index("<h3>Where it fails")]
    assert section.count("<figure") == 4 and section.count('class="wrong"') == wrong
    assert text.count('<tr class="guided">') == 1 and "<h2>From noise to picture</h2>" in text
    assert (
        re.search(r"<p>12 samples of the first conditions", text)
        and "closest pairs among pictures of 3 objects" in text
    )
    assert "held-out renders: " in text and "How many seeds it takes" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # nothing outside of the file
    refused(report.main, [tmp_path], tmp_path, "no samples")
    refused(report.main, [samples, "--figures", tmp_path / "none.png"], "none.png: No such file")
    refused(report.main, [samples, "--held-out", tmp_path / "none.npz"], "none.npz: no such file")
    stored = (samples / "train.json").read_text()
    turned = json.loads(stored)
    (samples / "train.json").write_text(json.dumps(turned | {"conditions": turned["conditions"][::-1]}))
    refused(report.main, [samples, *argv], f"{samples / 'train'}: not the conditions of")
    (samples / "train.json").write_text(stored)
    assert not (samples / "report.html").exists()


def test_the_page_with_the_labs_label_file(samples, tmp_path, capsys):
    """The renders that ship are not of its scenes: a page without them."""
    labels, page = tmp_path / "train.json", tmp_path / "page.html"
    labels.write_text('{"CLEVR_train_000000_0.png": ["red cube"]}')
    report.main([str(samples), "--out", str(page), "--labels", str(labels)])
    assert "held_out.npz: these pictures were rendered from another label file" in capsys.readouterr().err
    text = page.read_text()
    assert "<h2>four</h2>" in text and "They disagree" in text and "closest pairs" not in text


def test_readme_has_the_figures_of_the_page():
    """Accuracy with its spread, exact set and both, of each row of docs/report.html."""
    rows = re.findall(r'<tr(?: class="guided")?><td>([^<]*)</td>\n(.*?)</tr>', PAGE.read_text(), re.DOTALL)
    cells = {name: re.findall(r'<td class="number">([\d.± /]+)', row) for name, row in rows}
    assert {"test", "new_test", "unseen", "best_of_4/test", "evaluator_guided/new_test"} <= cells.keys()
    readme = (ROOT / "README.md").read_text()
    for name, (_, _, accuracy, _, exact_set, _, both, _) in cells.items():
        assert f"{accuracy} / {exact_set[:5]} / {both[:5]}" in readme, name
