"""Ctrl-C and the signals by which systems end a command: what was begun is saved, or leaves nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import children
import train
from checkpoint import checkpoints
from children import wait_for, wait_for_text
from conftest import LAUNCH, ROOT, TINY
from infra import signals
from runs import assert_same_end, assert_unchanged, contents

STOPS = {  # signal -> its name in docs/faults.md
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "Ctrl-C",
    signal.SIGHUP: "SIGHUP (a closed terminal)",
    signal.SIGUSR1: "SIGUSR1 (Slurm)",
}


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory) -> Path:
    """A run of forty steps that nothing stopped."""
    run = tmp_path_factory.mktemp("run") / "whole"
    train.main(argv(run, "--max-steps", 40))
    return run


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPS)
def test_a_stopped_run_saves_its_step_and_goes_on_to_the_same_end(argv, whole, tmp_path, tried, number):
    out = tmp_path / "stopped"
    command = argv(out, "--max-steps", 40)
    process = children.start("train", command, tmp_path)
    wait_for_text(out / "log.jsonl")
    os.kill(process.pid, number)
    code = 130 if number == signal.SIGINT else 0
    assert children.finish(process) == code, children.output(tmp_path)
    step = int(checkpoints(out)[-1].name[-7:])
    said = f"stopped after step {step} of 40, which is saved; the same command goes on"
    assert 10 <= step < 40 and said in children.output(tmp_path)
    assert not (out / ".lock").exists()

    process = children.start("train", command, tmp_path)
    assert children.finish(process) == 0
    assert_same_end(whole, out)
    tried(STOPS[number], f"the step is finished and saved, exit {code}; the same command goes on bit for bit")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_at_once(argv, tmp_path, tried):
    """In the middle of a step of some seconds."""
    out = tmp_path / "run"
    big = ["--batch-size", 640, "--lr-schedule", "constant"]
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
    assert_unchanged(before, out / "checkpoint-0000001")
    tried("a second Ctrl-C in the middle of a step", "exit 130 at once, the last checkpoint whole")


@pytest.mark.slow
def test_several_processes_stop_after_the_same_step(pictures, tmp_path, tried):
    """By the Ctrl-C that a terminal sends to the launcher and to all it has launched."""
    argv = [*TINY, "--data", pictures, "--max-steps", 300, "--out", tmp_path / "run"]
    command = list(map(str, [sys.executable, *LAUNCH, "train.py", *argv]))
    with (tmp_path / "stdout").open("w") as out, (tmp_path / "stderr").open("w") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, start_new_session=True)
        try:
            wait_for_text(tmp_path / "run" / "log.jsonl", seconds=240)
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert "setup: cpu, 2 processes, fp32" in children.output(tmp_path)
    assert "which is saved; the same command goes on" in children.output(tmp_path)
    [saved] = checkpoints(tmp_path / "run")
    assert contents(saved) and 10 <= int(saved.name[-7:]) < 300
    tried("Ctrl-C with `accelerate launch` on two processes", "both stop after the same step, which is saved")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_list_stopped_before_its_first_picture_leaves_nothing(six, tmp_path, number):
    """While it is painted a second command into its folder is refused."""
    first = children.start("sample", [*six, "--steps", 1000], tmp_path)
    wait_for(lambda: (tmp_path / "out" / "six" / ".lock").exists())
    (tmp_path / "second").mkdir()
    second = children.start("sample", six, tmp_path / "second")
    assert children.finish(second) == 2
    assert "another process is at work" in children.output(tmp_path / "second").splitlines()[-1]
    os.kill(first.pid, number)
    assert children.finish(first) == 130
    last = children.output(tmp_path).splitlines()[-1]
    assert last.endswith("six: stopped; the same command paints what is missing")
    assert not (tmp_path / "out").exists()


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signals.handled(signals.STOP) == [signal.SIGTERM, signal.SIGUSR1]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signals.handled(signals.STOP) == signals.STOP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_no_signal_is_handled():
    found = []
    thread = threading.Thread(target=lambda: found.append(signals.handled(signals.STOP)))
    thread.start()
    thread.join()
    assert found == [[]]
