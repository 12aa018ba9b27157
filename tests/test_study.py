"""benchmarks/study.py: the report's experiments, run at a small size; the numbers that it counts."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import children
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import study
import train
from network import ConditionalUNet
from studies import long_run, study_page
from studies.measure_row import background_spread, count_spikes
from studies.rows import BASE, ROWS, preset_of

PARTS = {"network", "scheduler", "training", "sampling"}


# ------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", [name for name in ROWS if not ROWS[name].commit])
def test_a_row_is_a_whole_preset_with_a_network(name):
    preset = preset_of(ROWS[name])
    assert preset.keys() == PARTS
    assert preset["training"].keys() == BASE["training"].keys()
    with torch.device("meta"):
        assert isinstance(ConditionalUNet(**preset["network"]), ConditionalUNet)


def test_rows_have_folders_of_their_own():
    folders = [study.slug(name, seed) for name in ROWS for seed in range(3)]
    assert len(set(folders)) == len(folders)


# ------------------------------------------------------------------------------------------- what is measured


def test_a_spike_is_twice_its_surroundings():
    losses = [1.0 / (1 + step / 10) for step in range(400)]  # falls fast only at first: no spike
    assert count_spikes(losses) == 0
    losses[150] *= 2.5
    losses[300] *= 4
    assert count_spikes(losses) == 2


def test_the_spread_of_backgrounds_tells_many_colours_from_light_and_dark():
    gray = torch.full((4, 3, 64, 64), 120, dtype=torch.uint8)
    gray[:, :, 20:40, 20:40] = 255  # an object, which does not count
    assert background_spread(gray) == {"background": 0.0, "tint": 0.0}
    lighter = gray.clone()
    lighter[:2] += 10
    found = background_spread(lighter)
    assert found["background"] == pytest.approx(5) and found["tint"] == pytest.approx(0)
    reddish = gray.clone()
    reddish[:2, 0] += 30
    found = background_spread(reddish)
    assert found["tint"] == pytest.approx((10**2 / 3 + 2 * 5**2 / 3) ** 0.5)


# -------------------------------------------------------------------------------------------------- the study


def start(folder, *rows) -> subprocess.Popen:
    line = [*rows, "--dry-run", "--out", folder / "out", "--work", folder / "work"]
    command = [children.warm_python(), ROOT / "benchmarks" / "study.py", *map(str, line)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_rows_go_on_where_they_were_stopped_and_are_run_once(tmp_path, capsys):
    rows = ("no EMA", "label dropout 0")
    first = start(tmp_path, *rows, "--workers", "1")
    while not list(tmp_path.glob("work/*/*/run/log.jsonl")):  # until one trains
        assert first.poll() is None, first.communicate()
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 130

    output, errors = start(tmp_path, *rows).communicate(timeout=600)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = [(one["row"], one["seed"]) for one in results["rows"]]
    assert sorted(found) == [("label dropout 0", 0), ("no EMA", 0)], errors
    for one in results["rows"]:
        assert one["steps"] == 4 and one["seconds"] > 0
        assert [point["pictures"] for point in one["points"]] == [4, 8, 12, 16]
        for point in one["points"]:
            assert 0 <= point["both"][0] <= point["exact_set"][0] <= 1 and point["tint"][0] > 0
    assert set(results["rows"][-1]["guidance"]) | set(results["rows"][0]["guidance"]) == {"1", "2", "3"}
    for name in ("quick_rows", "quick_curves", "quick_backgrounds", "grids/no-ema-quick"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
    assert "| no EMA | 1 | 16 |" in output

    study.main([*rows, "--dry-run", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    again = capsys.readouterr().out
    assert again and output.endswith(again)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_a_row_that_there_is_not_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        study.parse_args(["bigger"])
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and "no row 'bigger'" in errors and "no EMA" in errors
    with pytest.raises(SystemExit):
        study.parse_args(["label planes"])
    assert f"git checkout {ROWS['label planes'].commit}" in capsys.readouterr().err


@pytest.mark.parametrize("make", [*study.TABLES, study_page.search_table])
def test_the_tables_in_the_docs_are_those_of_the_results(make):
    results = json.loads((ROOT / "docs" / "study" / "results.json").read_text())
    found = make(results) if make is study_page.search_table else make(results, "quick")
    assert found in (ROOT / "docs" / "study.md").read_text()


def test_the_defaults_of_train_are_the_rows_of_the_base(tmp_path):
    """The base differs from the preset `small` in the warm-up alone."""
    given = vars(train.parse_args(["--model", "small"]))
    assert {name for name, value in BASE["training"].items() if given[name] != value} == {"warmup_steps"}


@pytest.mark.slow
def test_a_long_run_adds_a_point(there):
    Path("results.json").write_text(json.dumps({"rows": []}))
    long_run.main(["run", "--results", "results.json", "--steps", "2", "--num-images", "4"])
    (point,) = json.loads(Path("results.json").read_text())["long_runs"]
    assert (point["row"], point["steps"], point["num_images"]) == ("small", 2, 4)
    assert point["pictures"] == 16 and 0 <= point["accuracy"][0] <= 1  # 8 of the weights that it began with
    assert Path("grids/long-small-16-2-steps.png").stat().st_size > 1000
