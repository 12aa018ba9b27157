"""Checkpoints of runs, and weights to ship: written whole or not at all; a run that goes on from one ends as
a run that was never stopped."""

import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import children
import train
from checkpoint import TrainingState, checkpoints, load_weights, write_weights
from children import wait_for
from conftest import METADATA, listing
from infra.commands import InputError
from model import build
from runs import assert_same_end, assert_unchanged, contents

# ---------------------------------------------------------------------------------------------- a run goes on


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_stopped_after_any_step_ends_as_one_without_a_stop(argv, tmp_path, tried, optimizer):
    """Twelve pictures in steps of eight: most of the stops are in the middle of an epoch."""
    common = ["--optimizer", optimizer, "--max-steps", 13]
    train.main(argv(tmp_path / "whole", *common, "--save-every", 1, "--keep-checkpoints", 100))
    log = (tmp_path / "whole" / "log.jsonl").read_text()
    for step in range(1, 13):
        part = tmp_path / str(step)
        part.mkdir()
        name = f"checkpoint-{step:07d}"
        shutil.copytree(tmp_path / "whole" / name, part / name)
        (part / "log.jsonl").write_text(log + '{"step": 14, "cut o')  # longer than it should be
        train.main(argv(part, *common))
        assert_same_end(tmp_path / "whole", part)
    tried(f"stop after each of 12 steps, go on to 13 ({optimizer})", "bit for bit the run without a stop, all 12 times")


@pytest.mark.slow
def test_a_run_in_channels_last_goes_on_as_one_without_a_stop(tmp_path):
    """As on CUDA, where fused AdamW pairs weights and moments by their place in memory."""

    def steps(state: TrainingState, numbers: list[int]):
        for i in numbers:
            torch.manual_seed(i)
            images = torch.randn(2, 3, 64, 64)
            prediction = state.model(images, torch.tensor([3, 900]), torch.ones(2, 24))
            prediction.square().mean().backward()
            state.optimizer.step()
            state.optimizer.zero_grad()

    def begin():
        torch.manual_seed(0)
        model, noise_scheduler = build("small")
        model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        return TrainingState(model, model, optimizer), noise_scheduler

    metadata = {**METADATA, "losses": []}
    whole, noise_scheduler = begin()
    steps(whole, [1, 2])
    checkpoint.save(tmp_path, whole, noise_scheduler, metadata, keep=2)
    steps(whole, [3, 4])

    parts, _ = begin()
    assert checkpoint.resume(checkpoints(tmp_path)[-1], parts, metadata) == metadata
    steps(parts, [3, 4])
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=0, atol=1e-6)


def test_a_finished_run_says_so_and_nothing_is_written(argv, tmp_path, capsys):
    train.main(argv(tmp_path, "--max-steps", 2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    train.main(argv(tmp_path, "--max-steps", 2))
    assert "was finished, with 2 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == {
        path: stamp for path, stamp in before.items() if path.is_file()
    }


OTHER_RECIPES = [  # options, words that the line must hold
    (["--learning-rate", 1], ("learning_rate 0.003, now 1.0",)),
    (["--batch-size", 8], ("batch_size * grad_accum 8, now 16",)),
    (["--ema-decay", 0], ("ema_decay 0.999, now 0.0",)),
    (["--max-steps", 4], ("max_steps 2, now 4",)),
    (["--model", "tiny-mixed"], ("model 'small', now 'tiny-mixed'",)),
    (["--data", "less"], ("pictures_sha256",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("more", "words"), OTHER_RECIPES)
def test_a_run_does_not_go_on_with_another_recipe(argv, pictures, tmp_path, monkeypatch, refused, tried, more, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "less")
    names = sorted(path.name for path in Path("less").glob("*.png"))
    shutil.copy(pictures / names[3], Path("less", names[0]))
    out = tmp_path / "out"
    train.main(argv(out, "--max-steps", 2))
    before = contents(checkpoints(out)[-1])
    command = argv(out, "--max-steps", 2, *more)
    if more[0] == "--model":  # --init alone would refuse it
        place = command.index("--init")
        del command[place : place + 2]
    refused(train.main, command, out, "choose another --out", *words)
    assert [c.name for c in checkpoints(out)] == ["checkpoint-0000002"]
    assert_unchanged(before, checkpoints(out)[-1])
    tried(f"go on with another {more[0]}", f"exit 2: ... {words[-1]}")


# --------------------------------------------------------------------------------------- kills and full disks


def newest_step(run: Path) -> int:
    """Of a run's newest checkpoint; 0 if it has none."""
    return max([int(folder.name[-7:]) for folder in checkpoints(run)], default=0)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_one_left_alone(argv, tmp_path, tried):
    """At random moments of a run that saves all the time; what is there is whole each time."""
    run = tmp_path / "killed"
    command = argv(run, "--max-steps", 120, "--save-every", 1)
    children.finish(children.start("train", [*command, "--dry-run"], tmp_path))  # the server is up from here
    moments = random.Random()
    steps = [0]
    for life in range(20):
        process = children.start("train", command, tmp_path)
        more_steps = (life + 1) % 4  # every fourth is killed before it is at work
        if more_steps:
            wait_for(lambda goal=steps[-1] + more_steps: newest_step(run) >= goal)
        time.sleep(moments.uniform(0, 0.2 if more_steps else 0.6))
        process.kill()
        assert children.finish(process) == -signal.SIGKILL

        steps.append(newest_step(run))
        for folder in checkpoints(run):
            assert checkpoint.load_weights(folder)[2]["step"] == int(folder.name[-7:])
            assert contents(folder)
    print(steps)
    assert steps == sorted(steps) and 30 <= steps[-1] < 120

    train.main(argv(tmp_path / "whole", "--max-steps", 120))
    process = children.start("train", command, tmp_path)
    assert children.finish(process) == 0, children.output(tmp_path)
    assert_same_end(tmp_path / "whole", run)
    left = {path.name for path in run.iterdir()}
    assert left == {"checkpoint-0000119", "checkpoint-0000120", "curves.png", "log.jsonl", "run.json"}
    tried(
        "20 times `kill -9` at random moments of a run that saves each step",
        "every checkpoint whole each time; the end is bit for bit that of a run left alone",
    )


EIGHT_STEPS = ["--max-steps", 8, "--save-every", 2]
FULL = "exit 2, the checkpoint before it is whole; with space the run goes on, bit for bit"


@pytest.fixture
def whole(argv, tmp_path) -> Path:
    """A run of eight steps that had all the space it wanted."""
    train.main(argv(tmp_path / "whole", "--max-steps", 8))
    return tmp_path / "whole"


def size_of_checkpoint(run: Path) -> int:
    return sum(path.stat().st_size for path in checkpoints(run)[-1].rglob("*") if path.is_file())


def assert_ends_for_want_of_space(command: list[str], printed: Path, out: Path, kept: str, limits=None):
    """The run ends in one line, and its checkpoint before that is whole."""
    process = children.start("train", command, printed, limits=limits)
    code = children.finish(process)
    text = children.output(printed)
    assert code == 2 and "cannot be written (" in text.splitlines()[-1], text
    assert [c.name for c in checkpoints(out)] == [kept] and contents(out / kept)
    assert not list(out.glob("*.tmp"))


def assert_goes_on(command: list[str], printed: Path, out: Path, whole: Path):
    """The same command ends as the run `whole`."""
    process = children.start("train", command, printed)
    assert children.finish(process) == 0, children.output(printed)
    assert_same_end(whole, out)


@pytest.mark.slow
def test_a_run_on_a_full_disk_goes_on_when_there_is_space(argv, tmp_path, whole, tried):
    """One checkpoint fits, a second does not."""
    size = size_of_checkpoint(whole)
    out = tmp_path / "full"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", out]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        command = argv(out, *EIGHT_STEPS)
        assert_ends_for_want_of_space(command, tmp_path, out, "checkpoint-0000002")
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", out], check=True)
        assert_goes_on(command, tmp_path, out, whole)
    finally:
        subprocess.run(["umount", out], check=True)
    tried("a full disk (a small tmpfs)", FULL)


@pytest.mark.slow
def test_a_run_whose_files_may_not_grow_goes_on_when_they_may(argv, tmp_path, whole, tried):
    """An eighth of a checkpoint is more than its small files, and less than its weights."""
    out = tmp_path / "full"
    train.main(argv(out, "--max-steps", 8, "--save-every", 6))
    shutil.rmtree(out / "checkpoint-0000008")
    command = argv(out, *EIGHT_STEPS)
    limits = {resource.RLIMIT_FSIZE: size_of_checkpoint(whole) // 8}
    assert_ends_for_want_of_space(command, tmp_path, out, "checkpoint-0000006", limits)
    assert_goes_on(command, tmp_path, out, whole)
    tried("a file that may not grow (RLIMIT_FSIZE)", FULL)


@pytest.mark.slow
def test_what_is_left_of_a_checkpoint_does_not_count(argv, tmp_path, capsys):
    """It has no metadata, or a temporary name."""
    train.main(argv(tmp_path, "--max-steps", 4, "--save-every", 2))
    shutil.copytree(tmp_path / "checkpoint-0000004", tmp_path / ".iclevr-ddpm-0123")
    shutil.copytree(tmp_path / "checkpoint-0000004", tmp_path / "checkpoint-0000006.tmp")  # a user's
    (tmp_path / "checkpoint-0000004" / "metadata.json").unlink()
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-0000002"]
    train.main(argv(tmp_path, "--max-steps", 4))
    assert "goes on at step 2 of 4" in capsys.readouterr().out
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-0000002", "checkpoint-0000004"]
    assert not (tmp_path / ".iclevr-ddpm-0123").exists()
    assert (tmp_path / "checkpoint-0000006.tmp").exists()


# ---------------------------------------------------------------------------------------------------- weights


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model, noise_scheduler = build("small")
    state = TrainingState(model, model, torch.optim.AdamW(model.parameters()))
    checkpoint.save(tmp_path, state, noise_scheduler, METADATA, keep=2)
    with torch.no_grad():
        model.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(InputError, match="not finite after step 3, not saved"):
        checkpoint.save(tmp_path, state, noise_scheduler, {**METADATA, "step": 3}, keep=2)
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-0000002"]


def test_weights_of_another_network_are_refused(tmp_path):
    model, noise_scheduler = build("tiny-mixed")
    write_weights(tmp_path / "w", model, noise_scheduler, METADATA)
    build("tiny-attention")[0].save_pretrained(tmp_path / "w" / "unet")
    (tmp_path / "w" / "unet" / "config.json").write_text(model.to_json_string())
    words = "diffusion_pytorch_model.safetensors: not the weights of this network"
    with pytest.raises(InputError, match=words):
        load_weights(tmp_path / "w")


def test_weights_to_ship_replace_nothing_but_weights_to_ship(there, refused, tried):
    """Neither a run, nor its checkpoint, nor a folder with something besides; neighbours stay."""
    for name in ("shipped.old", "shipped.tmp", "shipped/unet"):
        (there / name).mkdir(parents=True, exist_ok=True)
        (there / name / "notes.txt").write_text("mine")
    shutil.rmtree(there / "shipped")
    for _ in range(2):
        checkpoint.main(["run", "shipped"])
    assert checkpoint.load_weights(there / "shipped")
    assert all((there / f"shipped.{end}" / "notes.txt").read_text() == "mine" for end in ("old", "tmp"))
    (there / "shipped" / "unet" / "notes.txt").write_text("mine")
    before = listing(there)
    refused(checkpoint.main, ["run", "shipped"], "shipped: holds unet/notes.txt, which would be lost")
    refused(checkpoint.main, ["run", "run"], "run: not empty")
    newest = checkpoint.newest(there / "run")
    for source in ("run", "weights"):
        refused(checkpoint.main, [source, newest], "training", "which would be lost")
    assert listing(there) == before
    tried("weights to ship into a run, a checkpoint or a folder with more in it", "exit 2; nothing is lost")


def test_a_link_to_weights_is_followed(there):
    checkpoint.main(["run", "shipped"])
    (there / "link").symlink_to("shipped")
    before = (there / "shipped" / checkpoint.WEIGHTS_NAME).read_bytes()
    checkpoint.main(["weights", "link"])
    assert (there / "link").is_symlink()
    assert (there / "shipped" / checkpoint.WEIGHTS_NAME).read_bytes() != before
