"""The examples for clusters, with two processes on this machine's CPU."""

import os
import signal
import subprocess
import sys
from subprocess import PIPE, STDOUT

import pytest

from checkpoint import steps_done
from children import free_port, wait_for_text
from conftest import ROOT

pytestmark = pytest.mark.slow

# Starts what Slurm would: the command once for each task, each with its own number.
SRUN = """#!/usr/bin/env bash
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids="${pids:-} $!"; done
echo $pids >>"$NOTES/tasks"
for pid in $pids; do wait $pid || exit 1; done
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$NOTES/scontrol"
echo localhost
"""


def test_the_slurm_job_is_saved_requeued_and_goes_on(argv, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "python").symlink_to(sys.executable)
    job = {
        "SLURM_JOB_ID": str(free_port()), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost",
        "SLURM_SUBMIT_DIR": str(ROOT), "OUT": str(tmp_path / "run"), "NOTES": str(tmp_path), "OMP_NUM_THREADS": "1",
        "PATH": f"{tools}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    options = argv(tmp_path / "run", "--max-steps", 2000, "--save-every", 100_000, "--lr-schedule", "constant")
    options = [option for option in options if option not in ("--out", str(tmp_path / "run"))]
    line = [ROOT / "examples" / "slurm.sh", *options]

    started = subprocess.Popen(line, env=os.environ | job, stdout=PIPE, stderr=STDOUT, text=True)
    wait_for_text(tmp_path / "run" / "log.jsonl", seconds=240)
    for pid in (tmp_path / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    output, _ = started.communicate(timeout=240)
    assert started.returncode == 0, output
    done = steps_done(tmp_path / "run")
    assert 0 < done < 2000
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == f"requeue {job['SLURM_JOB_ID']}"

    requeued = (tmp_path / "scontrol").read_text().count("requeue")
    line[line.index("2000")] = str(done + 5)
    again = subprocess.run(line, env=os.environ | job, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert steps_done(tmp_path / "run") == done + 5
    assert (tmp_path / "scontrol").read_text().count("requeue") == requeued


def start_nodes(options: list[str]) -> list[subprocess.Popen]:
    """The command of examples/README.md on each of two nodes, with one process each."""
    text = (ROOT / "examples" / "README.md").read_text()
    [command] = [line for line in text.splitlines() if line.startswith("torchrun")]
    changes = {"--nproc-per-node 4": "--nproc-per-node 1", "node0:29500": f"localhost:{free_port()}"}
    for before, after in changes.items():
        assert before in command
        command = command.replace(before, after)
    line = [sys.executable, "-m", "torch.distributed.run", *command.split()[1:-1], ROOT / "train.py", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [subprocess.Popen(line, env=environment, stdout=PIPE, stderr=STDOUT, text=True) for _ in range(2)]


def test_two_nodes_of_torchrun_train_together_stop_together_and_go_on(argv, tmp_path):
    run = tmp_path / "run"
    common = ["--save-every", 100_000, "--lr-schedule", "constant"]
    nodes = start_nodes(argv(run, "--max-steps", 2000, *common))
    wait_for_text(run / "log.jsonl", seconds=240)
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    done = steps_done(run)
    assert 0 < done < 2000, outputs
    assert sum("setup: cpu, 2 processes" in output for output in outputs) == 1

    nodes = start_nodes(argv(run, "--max-steps", done + 5, *common))
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert steps_done(run) == done + 5
