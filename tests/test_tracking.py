"""tracking.py through train.py, with the real TensorBoard and wandb, a few steps at a time."""

import io
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY
from PIL import Image

import train
from checkpoint import checkpoints

# AdamW: the numbers of a step are logged after its grid. A constant rate: a run may be made longer.
COMMON = [*TINY, "--optimizer", "adamw", "--lr-schedule", "constant", "--learning-rate", "1e-4"]


def pixels(file) -> np.ndarray:
    return np.array(Image.open(file).convert("RGB"))


def test_tensorboard_gets_numbers_settings_and_grids(pictures, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "my-run"
    argv = [*COMMON, "--data", pictures, "--out", out, "--log-with", "tensorboard"]
    argv += ["--max-steps", 2, "--save-every", 1]
    train.main(list(map(str, argv)))
    shutil.rmtree(checkpoints(out)[-1])  # as if stopped just before: step 2 is done, and logged, once more
    train.main(list(map(str, [*argv, "--sample-every", 2])))

    events = event_accumulator.EventAccumulator(str(out / "iclevr-ddpm"))
    events.Reload()
    entry = json.loads((out / "log.jsonl").read_text())
    for name, value in entry.items():
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(2, pytest.approx(value))]
    grid = events.Images("samples")
    assert [e.step for e in grid] == [2]
    shown = pixels(io.BytesIO(grid[0].encoded_image_string))
    np.testing.assert_array_equal(shown, pixels(out / "samples" / "0000002.png"))

    settings = []
    for folder in sorted({path.parent for path in out.glob("iclevr-ddpm/*/events.*")}):
        events = event_accumulator.EventAccumulator(str(folder))
        events.Reload()
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        settings.append(content.decode(errors="replace"))
    assert len(settings) == 2  # of both starts
    for word in ("learning_rate", "batch_size", "adamw", str(pictures), str(out)):
        assert word in settings[0]


def read_wandb(folder: Path) -> list:
    """The records in the .wandb file of a run: LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, records, parts = next(folder.glob("*.wandb")).read_bytes(), [], b""
    position = 7
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # no place for a header: the rest of the block is empty
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def start_wandb(run, home: Path, *argv, **more):
    home.mkdir(exist_ok=True)
    return run(ROOT, "train.py", *COMMON, "--log-with", "wandb", *argv, HOME=str(home), **more)


@pytest.fixture
def no_key(monkeypatch):
    pytest.importorskip("wandb")
    for name in [*os.environ]:
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)


def test_wandb_goes_on_in_the_same_run(pictures, tmp_path, run, no_key):
    out = tmp_path / "my-run"
    for steps, every in ((2, 2), (3, 0)):
        argv = ["--data", pictures, "--out", out, "--max-steps", steps, "--sample-every", every]
        process = start_wandb(run, tmp_path / "home", *argv, WANDB_MODE="offline")
        assert process.returncode == 0, process.stderr[-3000:]

    ids, rows = set(), {}
    for folder in sorted((out / "wandb").glob("offline-run-*")):
        records = read_wandb(folder)
        config = {}
        for record in records:
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
                config |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
            if record.HasField("config"):
                config |= {update.key: json.loads(update.value_json) for update in record.config.update}
            if record.HasField("history"):
                row = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
                rows.setdefault(json.loads(row["_step"]), {}).update(row)
    assert len(ids) == 1
    [(_, project, name)] = ids
    assert (project, name) == ("iclevr-ddpm", "my-run")
    expected = {"model": "small", "batch_size": 4, "optimizer": "adamw", "out": str(out), "max_steps": 3}
    assert config.items() >= expected.items()
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sorted(rows) == [2, 3]
    for entry in entries:
        assert entry.items() <= {key: json.loads(v) for key, v in rows[entry["step"]].items()}.items()
    assert "samples" in str(rows[2])
    [shown] = (out / "wandb").glob("offline-run-*/files/media/images/*.png")
    np.testing.assert_array_equal(pixels(shown), pixels(out / "samples" / "0000002.png"))


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"WANDB_MODE": "online"}, "No API key configured"),
        ({"WANDB_MODE": "never"}, "mode"),
    ],
    ids=["no key", "no such mode"],
)
def test_wandb_without_a_key_is_one_line(pictures, tmp_path, run, no_key, settings, word):
    argv = ["--data", pictures, "--out", tmp_path / "run", "--max-steps", 1]
    process = start_wandb(run, tmp_path / "home", *argv, **settings)
    assert process.returncode == 2
    [line] = [line for line in process.stderr.splitlines() if line.strip()]
    assert line.startswith("error: --log-with wandb: ") and word in line
    for way in ("wandb login", "WANDB_API_KEY", "WANDB_MODE=offline"):
        assert way in line
    assert not (tmp_path / "run").exists()
