"""Nothing in the environment changes what the command line says: it is taken into account or refused."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TRAIN, listing

import sample
import train
from infra import device
from infra.commands import InputError

TRAINING = f"{TRAIN} --max-steps 1".replace("--out run", "--out new")
SWITCHES = [  # variables, what the line names
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is '4'"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED is set"),
    ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP is set"),
    ({"ACCELERATE_USE_MEGATRON_LM": "1"}, "ACCELERATE_USE_MEGATRON_LM is set"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND is INDUCTOR"),
    ({"ACCELERATE_TORCH_DEVICE": "meta"}, "ACCELERATE_TORCH_DEVICE is 'meta': expected a device of"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION: expected one of no, fp16, bf16"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "ACCELERATE_MIXED_PRECISION fp16: is for GPUs"),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set but not RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    (
        {"RANK": "1", "WORLD_SIZE": "2"},
        "RANK, WORLD_SIZE is set but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT",
    ),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "WORLD_SIZE is set but not RANK, LOCAL_RANK, MASTER_P"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is set but not MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "first"}, "RANK: expected a number, got 'first'"),
    ({"ACCELERATE_USE_FSDP": "perhaps"}, "ACCELERATE_USE_FSDP: expected true or false, got 'perhaps'"),
]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No variable of a launcher: accelerate itself sets some in a process that it has joined."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("variables", "words"), SWITCHES, ids=[" ".join(v) for v, _ in SWITCHES])
def test_what_asks_for_something_else_is_refused(there, monkeypatch, refused, tried, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = listing(there)
    refused(train.main, TRAINING.split(), words)
    refused(sample.main, "--weights weights --mode list.json --out new".split(), words)
    assert listing(there) == before
    tried(" ".join(f"{name}={value}" for name, value in variables.items()), f"exit 2: {words} ...")


def test_what_agrees_is_fine(there, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as accelerate launch always does
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("LOCAL_RANK", "-1")
    train.main([*TRAINING.split(), "--grad-accum", "2", "--batch-size", "2"])


def test_the_launchers_precision_counts_unless_the_command_line_names_one(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert device.choose_precision(cuda, None) == ("bf16", "asked for by ACCELERATE_MIXED_PRECISION")
    assert device.choose_precision(cuda, "no") == ("no", "asked for")
    assert device.choose_precision(torch.device("cpu"), "no") == ("no", "asked for")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="expected one of no, fp16, bf16, got 'fp8'"):
        device.choose_precision(cuda, None)


def test_a_configuration_file_of_accelerate(there, tried):
    """It asks for compiling, of which `accelerate launch` makes a variable."""
    (there / "config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: 'no'\nuse_cpu: true\n"
        "num_machines: 1\nnum_processes: 1\ndynamo_config:\n  dynamo_backend: INDUCTOR\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config.yaml"]
    command = [*launch, ROOT / "train.py", *TRAINING.split()]
    process = subprocess.run(command, cwd=there, capture_output=True, text=True, timeout=300)
    assert process.returncode != 0 and not (there / "new").exists()
    assert "error: ACCELERATE_DYNAMO_BACKEND is INDUCTOR: compiling is chosen by itself" in process.stderr
    tried("a configuration of accelerate that compiles", "exit 2: ACCELERATE_DYNAMO_BACKEND is INDUCTOR ...")


NOTEBOOK = """
import sys, threading
import sample, train
TRAIN = {train!r}.split()
BF16 = ["--mixed-precision", {other!r}]
train.main([*TRAIN, "--out", "one", "--mixed-precision", "no"])
train.main([*TRAIN, "--out", "two", *BF16, "--grad-accum", "2", "--batch-size", "2"])
sample.main("--weights two --mode list.json --out x --mixed-precision no".split())
sample.main(["--weights", "one", "--mode", "list.json", "--out", "y", *BF16])
codes = []
def cell():
    train.main([*TRAIN, "--out", "three", "--mixed-precision", "no"])
    codes.append(0)
thread = threading.Thread(target=cell)
thread.start()
thread.join()
print("codes", codes, sys.flags.optimize)
"""


def test_one_process_after_the_other(there, run, tried):
    """As in a notebook, also outside of the main thread and with `python -OO`: the same weights as apart."""
    other = "bf16" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "no"
    argv = TRAIN.replace("--out run", "").replace("--max-steps 1", "") + " --max-steps 3"
    code = NOTEBOOK.format(train=argv, other=other)
    process = run(there, "-OO", "-c", code, PYTHONPATH=str(ROOT))
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.splitlines()[-1] == "codes [0] 2"
    weights = "checkpoint-0000003/training/model.safetensors"
    assert (there / "one" / weights).read_bytes() == (there / "three" / weights).read_bytes()
    apart = ["--out", "apart", "--mixed-precision", other, "--grad-accum", "2", "--batch-size", "2"]
    process = run(there, ROOT / "train.py", *argv.split(), *apart)
    assert (there / "two" / weights).read_bytes() == (there / "apart" / weights).read_bytes(), process.stderr
    tried("`train.main` and `sample.main` after each other, in a thread, with -OO", "the same as apart")


def test_attention_is_not_cudnns_whose_gradients_are_wrong_on_hopper():
    """Seen on an H200 with torch 2.11: a run of `small` ended after 75 to 147 steps; 310 ran well without."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
