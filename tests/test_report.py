"""The page, of samples like those that the README's commands leave, and the page that is kept in docs/."""

import json
import re

import pytest

import sample
from conftest import ROOT
from data.pack import PACK
from report import __main__ as report
from report import metrics

PAGE = ROOT / "docs" / "report.html"


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """What the README's commands leave, only less of it."""
    folder = tmp_path_factory.mktemp("samples")
    four = folder / "four.json"
    four.write_text('[["red cube"], ["cyan sphere"], ["gray cylinder", "red cube"], ["blue cube", "blue sphere"]]')
    images = folder / "images"
    common = ["--weights", str(ROOT / "weights" / "small"), "--steps", "4"]
    sample.main(["--mode", str(four), "process", "--seeds", "2", "--out", str(images), *common])
    sample.main(["--mode", "train", "--num-images", "12", "--out", str(images), *common])
    guided = ["--evaluator-scale", "3", "--out", str(images / "guided")]
    sample.main(["--mode", str(four), *guided, *common])
    return images


@pytest.fixture(scope="module")
def compared(pictures) -> list[str]:
    """Options of report: what the samples are compared with, few renders."""
    return ["--data", str(PACK), "--held-out", str(pictures)]


@pytest.fixture(scope="module")
def page(samples, compared, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    report.main([str(samples), "--out", str(path), *compared])
    return path.read_text()


@pytest.mark.slow
def test_a_picture_that_a_judge_holds_wrong_has_a_red_frame(page, samples):
    judged = metrics.load_samples(samples / "four")[1].part(range(4))
    wrong = int((~(judged.exact & judged.counted)).sum())
    section = page[page.index("<h2>four</h2>") : page.index("<h3>Where it fails")]
    assert section.count("<figure") == 4
    assert section.count('class="wrong"') == wrong


@pytest.mark.slow
def test_the_page_has_all_its_sections(page):
    assert page.count('<tr class="guided">') == 1
    assert "<h2>From noise to picture</h2>" in page
    assert "<p>12 samples of the first conditions" in page
    assert "closest pairs among pictures of 3 objects" in page
    assert "held-out renders: " in page
    assert "How many seeds it takes" in page


@pytest.mark.slow
def test_the_page_needs_nothing_outside_of_its_file(page):
    assert not re.search(r'(src|href)="(?!data:|#)', page)


@pytest.mark.slow
def test_a_mistake_in_the_options_is_refused_and_no_page_written(samples, tmp_path, refused):
    refused(report.main, [tmp_path], tmp_path, "no samples")
    refused(report.main, [samples, "--held-out", tmp_path / "none.npz"], "none.npz: no such file")
    assert not (samples / "report.html").exists()


@pytest.mark.slow
def test_samples_of_other_conditions_are_not_compared_with_renders(samples, compared, refused):
    stored = (samples / "train.json").read_text()
    turned = json.loads(stored)
    turned["conditions"].reverse()
    (samples / "train.json").write_text(json.dumps(turned))
    refused(report.main, [samples, *compared], f"{samples / 'train'}: not the conditions of")
    (samples / "train.json").write_text(stored)
    assert not (samples / "report.html").exists()


@pytest.mark.slow
def test_with_the_labs_label_file_the_page_has_no_comparison_with_renders(samples, tmp_path, capsys):
    """The renders that ship are not of the scenes of that label file."""
    labels = tmp_path / "train.json"
    path = tmp_path / "page.html"
    labels.write_text('{"CLEVR_train_000000_0.png": ["red cube"]}')
    report.main([str(samples), "--out", str(path), "--labels", str(labels)])
    assert "held_out.npz: these pictures were rendered from another label file" in capsys.readouterr().err
    text = path.read_text()
    assert "<h2>four</h2>" in text
    assert "They disagree" in text
    assert "closest pairs" not in text


def test_the_readme_has_the_scores_of_the_page_in_docs():
    """Accuracy with its spread, exact set and both, of each row."""
    rows = re.findall(r'<tr(?: class="guided")?><td>([^<]*)</td>\n(.*?)</tr>', PAGE.read_text(), re.DOTALL)
    cells = {name: re.findall(r'<td class="number">([\d.± /]+)', row) for name, row in rows}
    assert {"test", "new_test", "unseen", "best_of_4/test", "evaluator_guided/new_test"} <= cells.keys()
    readme = (ROOT / "README.md").read_text()
    for name, (_, _, accuracy, _, exact_set, _, both, _) in cells.items():
        assert f"| {accuracy} | {exact_set[:5]} | {both[:5]} |" in readme, name
