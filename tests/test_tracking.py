"""A run in TensorBoard and Weights & Biases: bookkeeping/tracking.py through train.py, with the real ones, a
few steps at a time."""

import io
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from checkpoint import checkpoints
from conftest import ROOT, TINY
from runs import log_of

# AdamW: the numbers of a step are logged after its grid. A constant rate: a run may be made longer.
COMMON = [*TINY, "--optimizer", "adamw", "--lr-schedule", "constant", "--learning-rate", "1e-4"]


def pixels(file) -> np.ndarray:
    return np.array(Image.open(file).convert("RGB"))


@pytest.mark.slow
def test_tensorboard_gets_the_numbers_settings_and_grids_of_a_run(pictures, tmp_path):
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


BLOCK = 32768  # bytes of LevelDB's log format
HEADER = struct.Struct("<IHB")  # of a part of a record: checksum, length, kind
LAST_PART = (1, 4)  # kinds: a whole record, the last part of one


def read_wandb(folder: Path) -> list:
    """The records in the .wandb file of a run: LevelDB's log format, after 7 bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = next(folder.glob("*.wandb")).read_bytes()
    records = []
    parts = b""
    position = 7
    while position + HEADER.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:  # no place for a header: the rest of the block is empty
            position += left
            continue
        _, length, kind = HEADER.unpack_from(content, position)
        start = position + HEADER.size
        parts += content[start : start + length]
        position = start + length
        if kind in LAST_PART:
            records.append(Record.FromString(parts))
            parts = b""
    return records


def settings_in(records: list) -> dict:
    """The settings of a run, which it may have changed."""
    found = {}
    for record in records:
        if record.HasField("run"):
            updates = record.run.config.update
        elif record.HasField("config"):
            updates = record.config.update
        else:
            continue
        found.update({update.key: json.loads(update.value_json) for update in updates})
    return found


def rows_in(records: list) -> dict[int, dict[str, str]]:
    """What was logged of each step: name -> value as JSON."""
    found = {}
    for record in records:
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            found.setdefault(json.loads(row["_step"]), {}).update(row)
    return found


def start_wandb(run_warm, home: Path, *argv, **more):
    home.mkdir(exist_ok=True)
    return run_warm(ROOT, "train.py", *COMMON, "--log-with", "wandb", *argv, HOME=str(home), **more)


@pytest.fixture
def no_key(monkeypatch):
    pytest.importorskip("wandb")
    for name in [*os.environ]:
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_run_in_wandb(pictures, tmp_path, run_warm, no_key):
    """With its settings, numbers and grids."""
    out = tmp_path / "my-run"
    for steps, every in ((2, 2), (3, 0)):
        argv = ["--data", pictures, "--out", out, "--max-steps", steps, "--sample-every", every]
        process = start_wandb(run_warm, tmp_path / "home", *argv, WANDB_MODE="offline")
        assert process.returncode == 0, process.stderr[-3000:]

    starts = [read_wandb(folder) for folder in sorted((out / "wandb").glob("offline-run-*"))]
    runs = [record.run for records in starts for record in records if record.HasField("run")]
    assert len({(one.run_id, one.project, one.display_name) for one in runs}) == 1
    assert (runs[0].project, runs[0].display_name) == ("iclevr-ddpm", "my-run")
    expected = {"model": "small", "batch_size": 4, "optimizer": "adamw", "out": str(out), "max_steps": 3}
    assert settings_in(starts[-1]).items() >= expected.items()

    rows = {}
    for records in starts:
        rows.update(rows_in(records))
    assert sorted(rows) == [2, 3]
    for entry in log_of(out):
        row = {name: json.loads(value) for name, value in rows[entry["step"]].items()}
        assert entry.items() <= row.items()
    assert "samples" in str(rows[2])
    [shown] = (out / "wandb").glob("offline-run-*/files/media/images/*.png")
    np.testing.assert_array_equal(pixels(shown), pixels(out / "samples" / "0000002.png"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, word",
    [({"WANDB_MODE": "online"}, "No API key configured"), ({"WANDB_MODE": "never"}, "mode")],
    ids=["no key", "no such mode"],
)
def test_wandb_without_a_key_or_a_mode_is_told_in_one_line(pictures, tmp_path, run_warm, no_key, settings, word):
    argv = ["--data", pictures, "--out", tmp_path / "run", "--max-steps", 1]
    process = start_wandb(run_warm, tmp_path / "home", *argv, **settings)
    assert process.returncode == 2
    [line] = [line for line in process.stderr.splitlines() if line.strip()]
    assert line.startswith("error: --log-with wandb: ") and word in line
    for way in ("wandb login", "WANDB_API_KEY", "WANDB_MODE=offline"):
        assert way in line
    assert not (tmp_path / "run").exists()
