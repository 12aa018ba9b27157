"""What runs of train.py leave on the disk, for tests that compare two of them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from checkpoint import checkpoints


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by file and name: weights, averaged weights, optimizer."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            found[f"{path.name} {name}"] = tensor
    return found


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """All numbers of a checkpoint: its tensors, and the losses that are not in the log yet."""
    metadata = json.loads((folder / "metadata.json").read_text())
    return {**tensors(folder), "losses": torch.tensor(metadata["losses"])}


def log_of(run: Path) -> list[dict]:
    """The entries of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_unchanged(before: dict[str, torch.Tensor], folder: Path):
    """A checkpoint holds what it held before."""
    for name, value in contents(folder).items():
        assert torch.equal(before[name], value)


def assert_same_end(run: Path, other: Path):
    """Two runs ended in the same checkpoint and the same log, but for the time they took."""
    last = checkpoints(run)[-1]
    other_last = checkpoints(other)[-1]
    assert last.name == other_last.name

    numbers = contents(last)
    other_numbers = contents(other_last)
    assert numbers.keys() == other_numbers.keys() and len(numbers) > 50
    assert all(torch.equal(numbers[name], other_numbers[name]) for name in numbers)

    log = log_of(run)
    other_log = log_of(other)
    for entry in [*log, *other_log]:
        del entry["pictures_per_second"]
    assert log == other_log and log
