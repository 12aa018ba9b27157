"""What is on the disk of a painted list: the same command paints what is missing, and nothing of it or of the
user's is lost."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

import children
import sample
from bookkeeping import lists
from conftest import SAMPLE, SHIPPED, listing
from report import __main__ as report
from report import metrics


def stamps_of(folder: Path) -> dict[str, int]:
    """When each file of a folder was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_list_killed_five_times_ends_as_one_left_alone(six, tmp_path, tried):
    """At random moments; the pictures there are whole each time, and none is painted again."""
    six = [*six, "--weights", str(SHIPPED)]  # which take their time
    sample.main([*six, "--out", str(tmp_path / "whole")])
    folder = tmp_path / "out" / "six"
    seen = set()
    moments = random.Random(time.time_ns())
    for _ in range(5):
        process = children.start("sample", six, tmp_path)
        time.sleep(moments.uniform(0.5, 2.5))
        process.kill()
        children.finish(process)
        there = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
        assert all(lists.is_whole(path) for path in there)
        assert seen <= there.items()  # none was painted again
        seen = set(there.items())

    sample.main(six)
    for name in [f"six/{i}.png" for i in range(6)] + ["six.png"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    one = json.loads((tmp_path / "out" / "six.json").read_text())
    two = json.loads((tmp_path / "whole" / "six.json").read_text())
    assert one["accuracies"] == two["accuracies"]
    assert sorted(p.name for p in folder.iterdir()) == [f"{i}.png" for i in range(6)]
    tried(
        "5 times `kill -9` at random moments of sample.py",
        "pictures there are whole and stay; the others are painted, the bytes of a run left alone",
    )


@pytest.mark.slow
def test_pictures_that_are_missing_or_cut_off_are_painted_and_no_others(six, tmp_path, capsys):
    sample.main(six)
    folder = tmp_path / "out" / "six"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    stamps = stamps_of(folder)
    (folder / "1.png").unlink()
    (folder / "4.png").write_bytes(first["4.png"][:700])  # cut off
    (folder / "9.png").write_bytes(first["0.png"])  # a user's
    (folder / ".iclevr-ddpm-0123").write_bytes(b"half")  # of a run that was killed
    (folder / "notes.txt").write_text("mine")
    capsys.readouterr()

    sample.main(six)
    assert "(2 painted in " in capsys.readouterr().out
    pictures = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert pictures == {**first, "9.png": first["0.png"]}
    now = stamps_of(folder)
    assert {name for name in stamps if now[name] != stamps[name]} == {"1.png", "4.png"}
    assert sorted(p.name for p in folder.iterdir()) == [*sorted(first), "9.png", "notes.txt"]

    before = (tmp_path / "out" / "six.json").read_bytes()
    sample.main(six)
    assert "(all there before)" in capsys.readouterr().out
    assert (tmp_path / "out" / "six.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("what", ["steps", "seed", "weights_sha256", "conditions", "precision", "best_of"])
def test_a_list_painted_with_other_settings_is_painted_anew_by_overwrite_alone(
    six, tmp_path, capsys, refused, tried, what
):
    """What differs is told, and nothing lost; then all is painted anew, and what is not ours stays."""
    sample.main(six)
    folder = tmp_path / "out" / "six"
    (folder / "9.png").write_text("mine")
    stamps = stamps_of(folder)
    argv = with_other(what, six, tmp_path)
    before = files_in(tmp_path / "out")
    refused(sample.main, argv, folder, what, "--overwrite paints it anew")
    assert files_in(tmp_path / "out") == before

    sample.main([*argv, "--overwrite"])
    left = stamps_of(folder)
    assert left.keys() == stamps.keys()
    assert {name for name in left if left[name] == stamps[name]} == {"9.png"}
    tried(f"a list painted again with another {what}", "exit 2: ... --overwrite paints it anew; nothing is lost")


def with_other(what: str, six: list[str], folder: Path) -> list[str]:
    """The options `six`, with one thing changed in them, in the label file, or in what the report tells."""
    argv = list(six)
    path = folder / "out" / "six.json"
    report = json.loads(path.read_text())
    if what == "steps":
        argv[argv.index("--steps") + 1] = "4"
    elif what == "seed":
        argv += ["--seed", "1"]
    elif what == "best_of":
        argv += ["--best-of", "2"]
    elif what == "conditions":
        (folder / "six.json").write_text(json.dumps(report["conditions"][::-1]))
    else:  # as if these had been other weights under the same name
        path.write_text(json.dumps({**report, what: "0"}))
    return argv


@pytest.fixture
def otherwise(six, seedling, tmp_path) -> list[str]:
    """The options `six` in other words: another path of the same weights, another size of batches."""
    shutil.copytree(seedling, tmp_path / "copy")
    return [*six, "--weights", str(tmp_path / "copy"), "--batch-size", "3"]


@pytest.mark.slow
def test_what_changes_no_picture_paints_none_again(six, otherwise, tmp_path, capsys):
    """Also other threads, and bounds of a guidance that there is not."""
    sample.main(six)
    out = tmp_path / "out" / "six"
    first = stamps_of(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    try:
        sample.main([*otherwise, "--guidance-interval", "0", "750"])
    finally:
        torch.set_num_threads(threads)
    assert "(all there before)" in capsys.readouterr().out
    assert stamps_of(out) == first


@pytest.mark.slow
def test_more_pictures_are_added_and_fewer_are_the_first_of_those_there(six, otherwise, tmp_path, capsys):
    sample.main(six)
    out = tmp_path / "out" / "six"
    first = stamps_of(out)
    sample.main([*otherwise, "--num-images", "9"])
    assert "(3 painted in " in capsys.readouterr().out
    stamps = stamps_of(out)
    assert len(stamps) == 9 and stamps.items() >= first.items()
    assert json.loads((tmp_path / "out" / "six.json").read_text())["num_images"] == 9

    sample.main([*otherwise, "--num-images", "4"])  # scores the first four
    assert stamps_of(out) == stamps
    report = json.loads((tmp_path / "out" / "six.json").read_text())
    assert (report["num_images"], report["pictures"]) == (4, 9)
    sample.main([*otherwise, "--num-images", "9"])
    assert stamps_of(out) == stamps


@pytest.mark.slow
def test_lists_whose_names_have_dots_keep_apart(there, tried, capsys):
    """Each has its own folder, grid and report, also for report.metrics and report."""
    conditions = {
        "prompts.v1": [["red cube"]],
        "prompts.v2": [["green cube"], ["gray sphere"]],
        "test.hard": [["red cube"]],
    }
    for name, chosen in conditions.items():
        (there / f"{name}.json").write_text(json.dumps(chosen))
    sample.main(f"{SAMPLE} prompts.v1.json prompts.v2.json test.hard.json --out out".split())
    for name, chosen in conditions.items():
        found = json.loads((there / "out" / f"{name}.json").read_text())
        assert found["conditions"] == chosen
        assert len(list((there / "out" / name).glob("*.png"))) == len(chosen)
        assert (there / "out" / f"{name}.png").is_file()
    metrics.main(["out/prompts.v1", "out/prompts.v2", "out/test.hard"])
    assert capsys.readouterr().out.count("accuracy") == 6
    assert [f.name for f in report.sample_folders(there / "out")] == list(conditions)
    tried("lists named prompts.v1.json and prompts.v2.json", "a folder, a grid and a report for each")


@pytest.mark.parametrize("out", [".", "second"])
def test_a_report_never_replaces_a_label_file(there, refused, out):
    (there / "second").mkdir()
    shutil.copy(there / "list.json", there / "second")
    before = listing(there)
    refused(sample.main, [*f"{SAMPLE} list.json --out".split(), out], "list.json: no report of sample.py")
    assert listing(there) == before
