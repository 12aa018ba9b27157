"""How a network runs here: what is chosen for the device. What the environment says beside the command line
is taken into account or refused."""

import copy
import resource
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

import children
import sample
import train
from conftest import ROOT, SAMPLE, TRAIN, listing
from infra import device
from infra.commands import InputError
from infra.device import choose_setup, compiler_trouble, join_processes, new_accelerator, prepare
from model import build

TRAINING = f"{TRAIN} --max-steps 1".replace("--out run", "--out new")
PREFIX = "import torch; from infra import device; "
HEADER = Path(sysconfig.get_path("include"), "Python.h")  # which the compiler's code includes


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No variable of a launcher: accelerate itself sets some in a process that it has joined."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


# --------------------------------------------------------------------------------------------- what is chosen


def test_the_setup_is_one_line_that_says_why():
    training = choose_setup(join_processes(), "no", 10**6, training=True)
    sampling = choose_setup(join_processes(), "no", 10**6, training=False)
    assert training.precision == sampling.precision == "no"
    assert training.compile_mode is None and sampling.compile_mode is None
    assert training.memory_format == torch.contiguous_format
    assert sampling.memory_format == torch.channels_last
    for setup in (training, sampling):
        assert str(setup).startswith("setup: cpu, fp32 (") and "\n" not in str(setup)


@pytest.mark.slow
def test_half_precision_is_the_default_where_the_processor_has_instructions_for_it(run):
    """AVX512 alone is not enough: without instructions for bf16 it gains nothing."""
    line = PREFIX + "print(*device.choose_precision(torch.device('cpu'), None), sep='|')"
    expected = "no|the processor has no instructions"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        expected = "bf16|the processor has instructions for it"
    assert run(ROOT, "-c", line).stdout.startswith(expected)
    slow = run(ROOT, "-c", line, ATEN_CPU_CAPABILITY="avx2").stdout
    assert slow.startswith("no|the processor has no instructions for bf16")


@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="bf16 is refused on this processor")
def test_weights_in_half_precision_predict_the_same_as_under_autocast():
    """They are converted once in place of in each pass."""
    torch.manual_seed(0)
    model, _ = build("small")
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(2, 24, generator=generator) < 0.1).float()
    images = torch.randn(2, 3, 64, 64, generator=generator)
    timesteps = torch.tensor([3, 970])
    expected = new_accelerator(mixed_precision="no").prepare_model(copy.deepcopy(model).eval())
    setup = choose_setup(join_processes(), "bf16", 10, training=False)
    network, _ = prepare(model, setup)
    assert model.unet.mid_block.resnets[0].conv1.weight.dtype == torch.bfloat16
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            before = expected(images, timesteps, labels).float()
        assert torch.equal(network(images, timesteps, labels), before)


def test_fp16_is_refused_on_a_processor():
    with pytest.raises(InputError, match="--mixed-precision fp16: is for GPUs without bf16"):
        choose_setup(join_processes(), "fp16", 1, training=False)


@pytest.mark.slow
def test_half_precision_is_refused_where_it_is_slow(tmp_path, run):
    argv = ["train.py", "--model", "small", "--mixed-precision", "bf16", "--out", tmp_path / "run"]
    process = run(ROOT, *argv, "--max-steps", 1, ATEN_CPU_CAPABILITY="avx2")
    assert process.returncode == 2
    error = process.stderr.splitlines()[-1]
    assert error.startswith("error: --mixed-precision bf16: 40 to 500 times slower") and "AVX2" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_missing_compiler_is_told(run, tmp_path, monkeypatch):
    """No C++ compiler is to torch.compile on a CPU what no Triton is on a GPU."""
    line = PREFIX + "print(device.compiler_trouble(torch.device('cpu')))"
    process = run(ROOT, "-c", line, CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert process.stdout.startswith("the compiler does not work here: ") and "\n" not in process.stdout[:-1]
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert compiler_trouble(torch.device("cpu")) == "TORCH_COMPILE_DISABLE is set"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.skipif(not HEADER.exists(), reason="needs Python's headers")
def test_a_working_compiler_is_found():
    assert compiler_trouble(torch.device("cpu")) is None


def test_attention_is_not_cudnns_whose_gradients_are_wrong_on_hopper():
    """Seen on an H200 with torch 2.11: a run of `small` ended after 75 to 147 steps; 310 ran well without."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.slow
def test_a_batch_that_memory_does_not_hold_names_a_smaller_one(pictures, tmp_path, tried):
    """On the CPU, in a process that may have 4 GB; CUDA's own error takes the same way."""
    argv = ["--model", "small", "--data", pictures, "--out", tmp_path / "run", "--sample-every", 0]
    argv += ["--batch-size", 3000, "--max-steps", 1]
    limits = {resource.RLIMIT_AS: 4 * 2**30}
    code = children.finish(children.start("train", argv, tmp_path, limits=limits))
    said = "cpu: out of memory with --batch-size 3000; try --batch-size 1500 --grad-accum 2, which gives the"
    output = children.output(tmp_path)
    assert code == 2 and said in output.splitlines()[-1], output
    tried("a batch that memory does not hold (CPU; CUDA not measured)", f"exit 2: {said} same result")


# -------------------------------------------------------------------------------------------- the environment

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
    ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE is set but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "WORLD_SIZE is set but not RANK, LOCAL_RANK, MASTER_P"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is set but not MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "first"}, "RANK: expected a number, got 'first'"),
    ({"ACCELERATE_USE_FSDP": "perhaps"}, "ACCELERATE_USE_FSDP: expected true or false, got 'perhaps'"),
]


@pytest.mark.parametrize(("variables", "words"), SWITCHES, ids=[" ".join(v) for v, _ in SWITCHES])
def test_a_variable_that_asks_for_something_else_is_refused(there, monkeypatch, refused, tried, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = listing(there)
    refused(train.main, TRAINING.split(), words)
    refused(sample.main, f"{SAMPLE} list.json --out new".split(), words)
    assert listing(there) == before
    tried(" ".join(f"{name}={value}" for name, value in variables.items()), f"exit 2: {words} ...")


def test_a_variable_that_agrees_with_the_command_line_is_fine(there, monkeypatch):
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


CONFIGURATION = """
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
mixed_precision: 'no'
use_cpu: true
num_machines: 1
num_processes: 1
dynamo_config:
  dynamo_backend: INDUCTOR
"""


@pytest.mark.slow
def test_a_configuration_of_accelerate_that_asks_for_compiling_is_refused(there, run_warm, tried):
    """`accelerate launch` makes a variable of it."""
    (there / "config.yaml").write_text(CONFIGURATION)
    launch = ["-m", "accelerate.commands.launch", "--config_file", "config.yaml"]
    process = run_warm(there, *launch, ROOT / "train.py", *TRAINING.split())
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


@pytest.mark.slow
def test_commands_after_each_other_in_one_process_give_the_same_weights_as_apart(there, run, run_warm, tried):
    """As in a notebook, also outside of the main thread and with `python -OO`."""
    other = "bf16" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "no"
    argv = TRAIN.replace("--out run", "") + " --max-steps 3"
    code = NOTEBOOK.format(train=argv, other=other)
    process = run(there, "-OO", "-c", code, PYTHONPATH=str(ROOT))
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.splitlines()[-1] == "codes [0] 2"
    weights = "checkpoint-0000003/training/model.safetensors"
    assert (there / "one" / weights).read_bytes() == (there / "three" / weights).read_bytes()
    apart = ["--out", "apart", "--mixed-precision", other, "--grad-accum", "2", "--batch-size", "2"]
    process = run_warm(there, ROOT / "train.py", *argv.split(), *apart)
    assert (there / "two" / weights).read_bytes() == (there / "apart" / weights).read_bytes(), process.stderr
    tried("`train.main` and `sample.main` after each other, in a thread, with -OO", "the same as apart")
