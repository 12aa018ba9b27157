"""Runs and lists that are stopped, killed, or run out of disk, memory or numbers: nothing is lost or half
written, and the end is that of an undisturbed run."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest
import torch
from conftest import LAUNCH, METADATA, ROOT, TINY
from safetensors.torch import load_file, save_file

import checkpoint
import sample
import train
from checkpoint import checkpoints, write_weights
from infra import lists
from infra.commands import InputError
from model import ConditionalUNet, build

SHIPPED = ROOT / "weights" / "small"


@pytest.fixture(scope="module")
def seedling(tmp_path_factory) -> Path:
    """Weights of a network with attention and dropout that is trained at ten steps a second and more."""
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    more = {"layers_per_block": 1, "patch_size": 8, "dropout": 0.1}
    model = ConditionalUNet(block_out_channels=(32, 32), **blocks, **more)
    write_weights(folder := tmp_path_factory.mktemp("seedling") / "w", model, build("small")[1], METADATA)
    return folder


@pytest.fixture
def argv(pictures, seedling):
    """Training with all that has a state: EMA, warm-up, decay, both dropouts, accumulation."""

    def make(out, *more) -> list[str]:
        recipe = ["--warmup-steps", 4, "--label-dropout", 0.3, "--grad-accum", 2, "--batch-size", 4]
        argv = ["--model", "small", "--data", pictures, "--init", seedling, "--out", out, "--sample-every", 0]
        return list(map(str, [*argv, *recipe, *more]))

    return make


def contents(folder: Path) -> dict:
    """All numbers of a checkpoint."""
    tensors = {f"{p.name} {k}": v for p in folder.rglob("*.safetensors") for k, v in load_file(p).items()}
    return tensors | {"losses": torch.tensor(json.loads((folder / "metadata.json").read_text())["losses"])}


def assert_same(a: Path, b: Path):
    """Two runs ended in the same checkpoint and the same log, but for the time they took."""
    assert checkpoints(a)[-1].name == checkpoints(b)[-1].name
    one, two = (contents(checkpoints(run)[-1]) for run in (a, b))
    assert one.keys() == two.keys() and len(one) > 50
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (a, b)]
    for entry in [*logs[0], *logs[1]]:
        del entry["pictures_per_second"]
    assert logs[0] == logs[1] and logs[0]


def output(folder: Path) -> str:
    """What the children in `folder` printed, errors last, without progress bars."""
    text = "".join((folder / name).read_text() for name in ("stdout", "stderr"))
    lines = text.replace("\r", "\n").splitlines()
    return "\n".join(line for line in lines if "step/s" not in line)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# --------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact_at_any_step(argv, tmp_path, monkeypatch, tried, optimizer):
    """Twelve pictures in steps of eight: most of these are in the middle of an epoch."""
    monkeypatch.setattr(checkpoint, "KEEP", 100)
    common = ["--optimizer", optimizer, "--max-steps", 13]
    train.main(argv(tmp_path / "whole", *common, "--save-every", 1))
    log = (tmp_path / "whole" / "log.jsonl").read_text()
    for step in range(1, 13):
        part = tmp_path / str(step)
        part.mkdir()
        name = f"checkpoint-{step:07d}"
        shutil.copytree(tmp_path / "whole" / name, part / name)
        (part / "log.jsonl").write_text(log + '{"step": 14, "cut o')  # longer than it should be
        train.main(argv(part, *common))
        assert_same(tmp_path / "whole", part)
    tried(
        f"stop after each of 12 steps, go on to 13 ({optimizer})",
        "bit for bit the run without a stop, all 12 times",
    )


def test_a_finished_run_says_so(argv, tmp_path, capsys):
    train.main(argv(tmp_path, "--max-steps", 2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    train.main(argv(tmp_path, "--max-steps", 2))
    assert "was finished, with 2 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == {
        path: stamp for path, stamp in before.items() if path.is_file()
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--learning-rate", 1], ("learning_rate 0.003, now 1.0",)),
        (["--batch-size", 8], ("batch_size * grad_accum 8, now 16",)),
        (["--ema-decay", 0], ("ema_decay 0.999, now 0.0",)),
        (["--max-steps", 4], ("max_steps 2, now 4",)),
        (["--model", "tiny-mixed"], ("model 'small', now 'tiny-mixed'",)),
        (["--data", "less"], ("pictures_sha256",)),
    ],
)
def test_another_recipe_is_not_mixed_in(argv, pictures, tmp_path, monkeypatch, refused, tried, more, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "less")
    first, second = (sorted(Path("less").glob("*.png"))[i].name for i in (0, 3))
    shutil.copy(pictures / second, Path("less", first))
    out = tmp_path / "out"
    train.main(argv(out, "--max-steps", 2))
    before = contents(checkpoints(out)[-1])
    command = argv(out, "--max-steps", 2, *more)
    if more[0] == "--model":  # --init alone would refuse it
        del command[(place := command.index("--init")) : place + 2]
    refused(train.main, command, out, "choose another --out", *words)
    assert [c.name for c in checkpoints(out)] == ["checkpoint-0000002"]
    assert all(torch.equal(before[name], value) for name, value in contents(checkpoints(out)[-1]).items())
    tried(f"go on with another {more[0]}", f"exit 2: ... {words[-1]}")


def test_twenty_kills(argv, tmp_path, tried):
    """At random moments of a run that saves all the time; what is there is whole each time."""
    command = argv(tmp_path / "killed", "--max-steps", 120, "--save-every", 1)
    children.finish(children.start("train", [*command, "--dry-run"], tmp_path))  # the server is up from here
    moments, steps = random.Random(), [0]

    def step_saved() -> int:
        return max([int(folder.name[-7:]) for folder in checkpoints(tmp_path / "killed")], default=0)

    for life in range(20):
        process = children.start("train", command, tmp_path)
        if some := (life + 1) % 4:  # else before it is at work
            wait_for(lambda goal=steps[-1] + some: step_saved() >= goal)
        time.sleep(moments.uniform(0, 0.2 if some else 0.6))
        process.kill()
        assert children.finish(process) == -signal.SIGKILL
        saved = checkpoints(tmp_path / "killed")
        steps.append(step_saved())
        for folder in saved:
            assert checkpoint.load_weights(folder)[2]["step"] == int(folder.name[-7:])
            assert contents(folder)
    print(steps)
    assert steps == sorted(steps) and 30 <= steps[-1] < 120
    train.main(argv(tmp_path / "whole", "--max-steps", 120))
    process = children.start("train", command, tmp_path)
    assert children.finish(process) == 0, output(tmp_path)
    assert_same(tmp_path / "whole", tmp_path / "killed")
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert left == {"checkpoint-0000119", "checkpoint-0000120", "log.jsonl", "run.json"}
    tried("20 times `kill -9` at random moments of a run that saves each step",
          "every checkpoint whole each time; the end is bit for bit that of a run left alone")  # fmt: skip


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_a_full_disk(argv, tmp_path, tried, kind):
    """One checkpoint fits, a second does not; with space for it the run goes on from the first."""
    train.main(argv(tmp_path / "whole", "--max-steps", 8))
    size = sum(p.stat().st_size for p in checkpoints(tmp_path / "whole")[-1].rglob("*") if p.is_file())
    out, limits = tmp_path / "full", {}
    if kind == "tmpfs":
        out.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", out]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no right to mount a file system")
    try:
        command, kept = argv(out, "--max-steps", 8, "--save-every", 2), "checkpoint-0000002"
        if kind == "limit":  # of a file
            train.main(argv(out, "--max-steps", 8, "--save-every", 6))
            shutil.rmtree(out / "checkpoint-0000008")
            kept, limits = "checkpoint-0000006", {resource.RLIMIT_FSIZE: size // 8}
        process = children.start("train", command, tmp_path, limits=limits)
        code, text = children.finish(process), output(tmp_path)
        assert code == 2 and "cannot be written (" in text.splitlines()[-1], text
        assert [c.name for c in checkpoints(out)] == [kept] and contents(out / kept)
        assert not list(out.glob("*.tmp"))
        if kind == "tmpfs":
            subprocess.run(["mount", "-o", f"remount,size={4 * size}", out], check=True)
        process = children.start("train", command, tmp_path)
        assert children.finish(process) == 0, output(tmp_path)
        assert_same(tmp_path / "whole", out)
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", out], check=True)
    name = {"tmpfs": "a full disk (a small tmpfs)", "limit": "a file that may not grow (RLIMIT_FSIZE)"}[kind]
    tried(name, "exit 2, the checkpoint before it is whole; with space the run goes on, bit for bit")


def test_what_is_left_of_a_checkpoint_does_not_count(argv, tmp_path, capsys):
    """Without metadata, under a temporary name, or broken: then it is named."""
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


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_clean_stop(argv, tmp_path, tried, number):
    """The step is finished and saved, and the same command goes on to the same end."""
    train.main(argv(tmp_path / "whole", "--max-steps", 40))
    command, out = argv(tmp_path / "stopped", "--max-steps", 40), tmp_path / "stopped"
    process = children.start("train", command, tmp_path)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size)
    os.kill(process.pid, number)
    code = 130 if number == signal.SIGINT else 0
    assert children.finish(process) == code, output(tmp_path)
    step = int(checkpoints(out)[-1].name[-7:])
    said = f"stopped after step {step} of 40, which is saved; the same command goes on"
    assert 10 <= step < 40 and said in output(tmp_path)
    assert not (out / ".lock").exists()
    process = children.start("train", command, tmp_path)
    assert children.finish(process) == 0
    assert_same(tmp_path / "whole", out)
    words = {signal.SIGHUP: "SIGHUP (a closed terminal)", signal.SIGUSR1: "SIGUSR1 (Slurm)"}
    name = words.get(number, "Ctrl-C" if number == signal.SIGINT else "SIGTERM")
    tried(name, f"the step is finished and saved, exit {code}; the same command goes on bit for bit")


def test_a_second_ctrl_c_leaves_at_once(argv, tmp_path, tried):
    """In the middle of a step of some seconds."""
    out, big = tmp_path / "run", ["--batch-size", 640, "--lr-schedule", "constant"]
    train.main(argv(out, *big, "--max-steps", 1))
    before = contents(out / "checkpoint-0000001")
    process = children.start("train", argv(out, *big, "--max-steps", 50), tmp_path)
    wait_for(lambda: (out / ".lock").exists())
    time.sleep(0.6)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    start = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert children.finish(process) == 130 and time.monotonic() - start < 1
    assert [c.name for c in checkpoints(out)] == ["checkpoint-0000001"]
    after = contents(out / "checkpoint-0000001")
    assert all(torch.equal(before[name], value) for name, value in after.items())
    tried("a second Ctrl-C in the middle of a step", "exit 130 at once, the last checkpoint whole")


def test_several_processes_stop_together(pictures, tmp_path, tried):
    """By the Ctrl-C that a terminal sends to the launcher and to all it has launched."""
    argv = [*TINY, "--data", pictures, "--max-steps", 300, "--out", tmp_path / "run"]
    command = list(map(str, [sys.executable, *LAUNCH, "train.py", *argv]))
    with (tmp_path / "stdout").open("w") as out, (tmp_path / "stderr").open("w") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, start_new_session=True)
        log = tmp_path / "run" / "log.jsonl"
        try:
            wait_for(lambda: log.exists() and log.stat().st_size, seconds=240)
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert "setup: cpu, 2 processes, fp32" in output(tmp_path)
    assert "which is saved; the same command goes on" in output(tmp_path)
    [saved] = checkpoints(tmp_path / "run")
    assert contents(saved) and 10 <= int(saved.name[-7:]) < 300
    tried("Ctrl-C with `accelerate launch` on two processes", "both stop after the same step, which is saved")


def test_two_runs_in_one_folder(argv, tmp_path, tried):
    """The second is refused; the lock of a dead one is none."""
    command, out = argv(tmp_path / "run", "--max-steps", 100_000), tmp_path / "run"
    first = children.start("train", command, tmp_path)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size)
    (tmp_path / "second").mkdir()
    second = children.start("train", command, tmp_path / "second")
    assert children.finish(second) == 2
    assert output(tmp_path / "second").splitlines()[-1] == (
        f"error: {out}: another process is at work in there; wait for it or choose --out"
    )
    first.kill()
    children.finish(first)
    assert (out / ".lock").exists()
    train.main(argv(out, "--max-steps", 2))
    assert [c.name for c in checkpoints(out)] == ["checkpoint-0000002"]
    tried("two runs into one folder", "exit 2: ... another process is at work in there")
    tried("a run into the folder of one that was killed", "goes on; a dead process holds no lock")


# -------------------------------------------------------------------------------------------- numbers, memory


def test_numbers_that_are_not_finite_stop_the_run(argv, tmp_path, capsys, tried):
    """Before they get into the weights: the last checkpoint stays as it is. The pictures are named."""
    common = ["--learning-rate", 1e30, "--warmup-steps", 0, "--optimizer", "adamw", "--max-steps", 9]
    with pytest.raises(SystemExit) as stop:
        train.main(argv(tmp_path, *common, "--save-every", 1))
    line = capsys.readouterr().err.splitlines()[-1]
    [saved] = checkpoints(tmp_path)
    assert stop.value.code == 2 and saved.name == "checkpoint-0000001"
    assert "in step 2, stopped before the weights were touched" in line and f"checkpoint: {saved};" in line
    assert "loss " in line and line.count("CLEVR_train_") == 8 and line.count(".png") == 8
    assert all(value.isfinite().all() for value in contents(saved).values())
    tried(
        "a loss or gradient that is not finite",
        "exit 2 before the step changes a weight; names step and pictures",
    )


def test_numbers_that_are_not_finite_are_found_a_step_later(argv, tmp_path, capsys):
    """AdamW then has left the weights alone: nothing need be saved in between for the step to be found."""
    common = ["--learning-rate", 1e30, "--warmup-steps", 0, "--optimizer", "adamw", "--max-steps", 9]
    with pytest.raises(SystemExit) as stop:
        train.main(argv(tmp_path, *common))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and not checkpoints(tmp_path)
    assert "in step 2, stopped before the weights were touched; last good checkpoint: none yet" in line


def test_checkpoints_are_saved_by_the_clock(argv, tmp_path, monkeypatch):
    """Unless --save-every names steps."""
    monkeypatch.setattr(checkpoint, "KEEP", 100)
    train.main(argv(tmp_path / "end", "--max-steps", 3))
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    train.main(argv(tmp_path / "all", "--max-steps", 3))
    assert [c.name for c in checkpoints(tmp_path / "end")] == ["checkpoint-0000003"]
    assert len(checkpoints(tmp_path / "all")) == 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model, noise_scheduler = build("small")
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path, model, model, optimizer, noise_scheduler, METADATA)
    with torch.no_grad():
        model.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(InputError, match="not finite after step 3, not saved"):
        checkpoint.save(tmp_path, model, model, optimizer, noise_scheduler, METADATA | {"step": 3})
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-0000002"]


def test_out_of_memory_names_what_to_try(pictures, tmp_path, tried):
    """On the CPU, in a process that may have 4 GB; CUDA's own error takes the same way."""
    argv = ["--model", "small", "--data", pictures, "--out", tmp_path / "run", "--sample-every", 0]
    limits = {resource.RLIMIT_AS: 4 * 2**30}
    argv += ["--batch-size", 3000, "--max-steps", 1]
    code = children.finish(children.start("train", argv, tmp_path, limits=limits))
    said = "cpu: out of memory with --batch-size 3000; try --batch-size 1500 --grad-accum 2, which gives the"
    assert code == 2 and said in output(tmp_path).splitlines()[-1], output(tmp_path)
    tried("a batch that memory does not hold (CPU; CUDA not measured)", f"exit 2: {said} same result")


def test_half_the_batch_twice_is_the_same(pictures, tmp_path):
    """2 x 16 against 1 x 32, by AdamW: Muon works in bf16, in which the order of a sum shows."""
    argv = [
        "--model",
        "small",
        "--data",
        pictures,
        "--sample-every",
        0,
        "--max-steps",
        2,
        "--warmup-steps",
        0,
    ]
    argv += ["--learning-rate", 1e-4, "--optimizer", "adamw", "--mixed-precision", "no"]
    for name, more in {
        "whole": ["--batch-size", 32],
        "halves": ["--batch-size", 16, "--grad-accum", 2],
    }.items():
        train.main(list(map(str, [*argv, *more, "--out", tmp_path / name])))
    a, b = (
        load_file(tmp_path / n / "checkpoint-0000002" / "training" / "model.safetensors")
        for n in ("whole", "halves")
    )
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


# --------------------------------------------------------------------------------------------------- sampling


@pytest.fixture
def six(tmp_path, seedling):
    """Six conditions, and the command that paints them in batches of two."""
    chosen = json.loads((ROOT / "validation.json").read_text())[::11]
    (tmp_path / "six.json").write_text(json.dumps(chosen))
    argv = ["--mode", tmp_path / "six.json", "--weights", seedling, "--steps", 3, "--batch-size", 2]
    return list(map(str, [*argv, "--out", tmp_path / "out"]))


def test_sampling_goes_on_after_kills(six, tmp_path, tried):
    six = [*six, "--weights", str(SHIPPED)]  # which take their time
    sample.main([*six, "--out", str(tmp_path / "whole")])
    folder, seen = tmp_path / "out" / "six", set()
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
    one, two = (json.loads((tmp_path / n / "six.json").read_text()) for n in ("out", "whole"))
    assert one["accuracies"] == two["accuracies"]
    assert sorted(p.name for p in folder.iterdir()) == [f"{i}.png" for i in range(6)]
    said = "pictures there are whole and stay; the others are painted, the bytes of a run left alone"
    tried("5 times `kill -9` at random moments of sample.py", said)


def test_only_what_is_missing_is_painted(six, tmp_path, capsys):
    sample.main(six)
    folder = tmp_path / "out" / "six"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "1.png").unlink()
    (folder / "4.png").write_bytes(first["4.png"][:700])  # cut off
    (folder / "9.png").write_bytes(first["0.png"])  # a user's
    (folder / ".iclevr-ddpm-0123").write_bytes(b"half")  # of a run that was killed
    (folder / "notes.txt").write_text("mine")
    capsys.readouterr()
    sample.main(six)
    assert "(2 painted in " in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in folder.glob("*.png")} == first | {"9.png": first["0.png"]}
    assert {n for n in stamps if (folder / n).stat().st_mtime_ns != stamps[n]} == {"1.png", "4.png"}
    assert sorted(p.name for p in folder.iterdir()) == [*sorted(first), "9.png", "notes.txt"]
    report = (tmp_path / "out" / "six.json").read_bytes()
    sample.main(six)
    assert "(all there before)" in capsys.readouterr().out
    assert (tmp_path / "out" / "six.json").read_bytes() == report


@pytest.mark.parametrize("what", ["steps", "seed", "weights_sha256", "conditions", "precision", "best_of"])
def test_other_settings_want_overwrite(six, tmp_path, capsys, refused, tried, what):
    """What differs is told, and nothing lost; then all is painted anew, and what is not ours stays."""
    sample.main(six)
    folder, argv = tmp_path / "out" / "six", list(six)
    (folder / "9.png").write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    report = json.loads((tmp_path / "out" / "six.json").read_text())
    if what == "steps":
        argv[argv.index("--steps") + 1] = "4"
    elif what == "seed":
        argv += ["--seed", "1"]
    elif what == "best_of":
        argv += ["--best-of", "2"]
    elif what == "conditions":
        (tmp_path / "six.json").write_text(json.dumps(report["conditions"][::-1]))
    else:  # as if these had been other weights under the same name
        changed = json.dumps(report | {what: "0"}).encode()
        (tmp_path / "out" / "six.json").write_bytes(changed)
        before[tmp_path / "out" / "six.json"] = changed
    refused(sample.main, argv, folder, what, "--overwrite paints it anew")
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert after == before
    sample.main([*argv, "--overwrite"])
    left = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert left.keys() == stamps.keys()
    assert {name for name in left if left[name] == stamps[name]} == {"9.png"}
    tried(
        f"a list painted again with another {what}", "exit 2: ... --overwrite paints it anew; nothing is lost"
    )


def test_what_changes_no_picture_does_not_count(six, seedling, tmp_path, capsys):
    """Another path of the same weights, other threads, another size of batches; more pictures are added."""
    sample.main(six)
    out = tmp_path / "out" / "six"
    first = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    shutil.copytree(seedling, tmp_path / "copy")
    argv = [*six, "--weights", str(tmp_path / "copy"), "--batch-size", "3"]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    try:
        sample.main([*argv, "--guidance-interval", "0", "750"])  # of a guidance that there is not
    finally:
        torch.set_num_threads(threads)
    assert "(all there before)" in capsys.readouterr().out
    sample.main([*argv, "--num-images", "9"])
    assert "(3 painted in " in capsys.readouterr().out
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert len(stamps) == 9 and stamps.items() >= first.items()
    assert json.loads((tmp_path / "out" / "six.json").read_text())["num_images"] == 9
    sample.main([*argv, "--num-images", "4"])  # scores the first four
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    report = json.loads((tmp_path / "out" / "six.json").read_text())
    assert (report["num_images"], report["pictures"]) == (4, 9)
    sample.main([*argv, "--num-images", "9"])
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == stamps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_two_samplers_in_one_folder(six, tmp_path, number):
    """The second is refused; a stop of the first, before any picture is there, leaves nothing."""
    first = children.start("sample", [*six, "--steps", 1000], tmp_path)
    wait_for(lambda: (tmp_path / "out" / "six" / ".lock").exists())
    (tmp_path / "second").mkdir()
    second = children.start("sample", six, tmp_path / "second")
    assert children.finish(second) == 2
    assert "another process is at work" in output(tmp_path / "second").splitlines()[-1]
    os.kill(first.pid, number)
    assert children.finish(first) == 130
    assert output(tmp_path).splitlines()[-1].endswith("six: stopped; the same command paints what is missing")
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_not_finite(there, capsys, tried):
    """Finite weights that give none: refused before anything is written; what was there stays."""
    path = there / "weights" / checkpoint.WEIGHTS_NAME
    argv = ["--mode", "list.json", "process", "--weights", "weights", "--out"]
    sample.main([*argv, "old"])
    before = {p: p.read_bytes() for p in (there / "old").rglob("*") if p.is_file()}
    tensors = load_file(path)
    tensors["class_embedding.weight"] = torch.full_like(tensors["class_embedding.weight"], 1e38)
    save_file(tensors, path)
    for more in (["new"], ["old", "--overwrite"]):
        with pytest.raises(SystemExit) as stop:
            sample.main([*argv, *more])
        line = capsys.readouterr().err.splitlines()[-1]
        said = (
            "error: weights: prediction not finite in step 1 of 3 (timestep 999); of these pictures none is"
        )
        assert stop.value.code == 2 and line.startswith(said)
    assert not (there / "new").exists()
    assert {p: p.read_bytes() for p in (there / "old").rglob("*") if p.is_file()} == before
    tried(
        "weights that give pictures which are not finite",
        "exit 2: names weights and step; nothing is written",
    )
