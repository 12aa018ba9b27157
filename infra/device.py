"""How a network runs on the devices at hand: processes, precision, layout, compiling, and what can fail."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import get_int_from_env, parse_flag_from_env
from torch import nn

from infra.commands import InputError, shown
from options import IMAGE_SIZE, NUM_OBJECTS

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by accelerate's names

# PyTorch's own attention kernels in place of cuDNN's: on Hopper GPUs, with PyTorch 2.11 and later,
# cuDNN's backward pass gives NaN now and then where the number of tokens is 64 modulo 128, as in `small`
# (github.com/pytorch/pytorch/issues/196678).
torch.backends.cuda.enable_cudnn_sdp(False)

# Passes through the network from which on compiling pays, an estimate. For `reference` compiling takes about a
# minute in sampling and two to three in training, and a pass is then some 4.5 ms shorter on an H100.
COMPILE_FROM = 12_000


# Ways of accelerate to train that this project has not. Each is switched on by a variable, which `accelerate
# launch` sets from its configuration file.
_SWITCHES = (
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_SAGEMAKER",
)  # fmt: skip
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # set by mpirun and srun


def flag(name: str) -> bool:
    """Whether a variable of accelerate is set to yes. Raises InputError for words that mean neither."""
    try:
        return bool(parse_flag_from_env(name))
    except ValueError:
        raise InputError(f"{name}: expected true or false, got {shown(os.environ[name])}") from None


def check_environment():
    """Raise InputError if a variable asks for what no command does, or describes processes in part."""
    for name in _SWITCHES:
        if flag(name):
            raise InputError(f"{name} is set: that is not supported; unset it, or run `accelerate config` anew")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise InputError(f"ACCELERATE_DYNAMO_BACKEND is {backend}: compiling is chosen by itself; unset it")
    for name in (*_RANKS, *_MPI_SIZES):
        if not os.environ.get(name, "0").removeprefix("-").isdecimal():
            raise InputError(f"{name}: expected a number, got {shown(os.environ[name])}")
    ranks = [name for name in _RANKS if int(os.environ.get(name, -1)) >= 0]
    given = ranks or [name for name in _MPI_SIZES if int(os.environ.get(name, 1)) > 1]
    expected = [*_RANKS, *_ADDRESS] if ranks else _ADDRESS
    missing = [name for name in expected if not os.environ.get(name)]
    if given and missing:
        raise InputError(
            f"{', '.join(given)} is set but not {', '.join(missing)}: start several processes by torchrun or "
            f"accelerate launch, or unset it"
        )
    _check_device(given)


def _check_device(given: list[str]):
    """Raise InputError if the environment names a device that there is not, or one for several processes,
    of which the variables `given` tell."""
    name = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if name is None:
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator.type if accelerator else "cpu"
    known = [kind, *(f"{kind}:{i}" for i in range(torch.cuda.device_count()))]
    if given or name not in known:
        raise InputError(
            f"ACCELERATE_TORCH_DEVICE is {shown(name)}: expected a device of the kind {kind}, and a single "
            f"process; unset it, and choose GPUs by CUDA_VISIBLE_DEVICES"
        )


def join_processes() -> PartialState:
    """The devices and processes there are. Those that `accelerate launch` or `torchrun` started are joined,
    by NCCL on GPUs and by gloo without. Raises InputError where accelerate did not start those asked for, and
    as `check_environment`."""
    check_environment()
    is_cpu_asked_for = flag("ACCELERATE_USE_CPU")  # accelerate launch --cpu
    processes = get_int_from_env(["WORLD_SIZE", *_MPI_SIZES], 0)
    if is_cpu_asked_for and "MASTER_ADDR" in os.environ and not processes:
        raise InputError(
            "accelerate launch --cpu starts a single process, whatever --num_processes says, unless it has "
            "MPI; use torchrun --nproc_per_node N in its place"
        )
    return PartialState(cpu=is_cpu_asked_for or not torch.accelerator.is_available())


def new_accelerator(**options) -> Accelerator:
    """An Accelerator with these options, whatever one made before in this process (a notebook) was given.

    Raises InputError if the environment, which accelerate would listen to, asks for other accumulation.
    """
    name, steps = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", options.get("gradient_accumulation_steps", 1)
    if os.environ.get(name, str(steps)) != str(steps):
        raise InputError(
            f"{name} is {shown(os.environ[name])}, but --grad-accum of the command line decides ({steps} "
            f"here); unset it"
        )
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(**options)


@dataclass(frozen=True)
class Setup:
    """How a network runs on a device; `str()` says it in one line, with the reasons."""

    device: torch.device
    processes: int
    precision: str  # of autocast, in accelerate's words: "no" (fp32), "fp16" or "bf16"
    memory_format: torch.memory_format
    compile_mode: str | None  # of torch.compile; None: not compiled
    reasons: tuple[str, str, str]  # of these three

    def __str__(self) -> str:
        chosen = [
            "fp32" if self.precision == "no" else f"{self.precision} autocast",
            str(self.memory_format).removeprefix("torch."),
            f"compiled, {self.compile_mode}" if self.compile_mode else "not compiled",
        ]
        parts = [f"{what} ({why})" for what, why in zip(chosen, self.reasons, strict=True)]
        where = self.device.type
        if self.processes > 1:
            where += f", {self.processes} processes"
        return f"setup: {where}, {', '.join(parts)}"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether products of matrices in bf16 are no slower on `device` than in fp32."""
    if device.type != "cpu":
        return True
    # AVX512 alone is not enough: without instructions for bf16 it is no faster than fp32.
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has_instructions and "AVX512" in torch.backends.cpu.get_cpu_capability()


def choose_precision(device: torch.device, asked: str | None) -> tuple[str, str]:
    """The precision of autocast, "no", "fp16" or "bf16", and why: as asked, by the command line or else by
    `accelerate launch --mixed_precision`, else the fastest that is safe.

    Raises InputError for one that is slow on this processor.
    """
    source = "--mixed-precision"
    why_asked = "asked for"
    name = "ACCELERATE_MIXED_PRECISION"  # which the launcher sets to "no" where nothing was asked for
    if not asked and os.environ.get(name, "no") != "no":
        asked = os.environ[name]
        source = name
        why_asked = f"asked for by {name}"
        if asked not in DTYPES:
            raise InputError(f"{name}: expected one of {', '.join(DTYPES)}, got {shown(asked)}")
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()  # AVX512 wherever there is AMX
        if asked == "fp16":
            raise InputError(f"{source} fp16: is for GPUs without bf16; this is a CPU")
        if asked == "bf16" and "AVX512" not in capability:
            raise InputError(
                f"{source} bf16: 40 to 500 times slower on this processor, which has neither AVX512 nor AMX "
                f"but {capability}"
            )
        if asked:
            return asked, why_asked
        if has_fast_bf16(device):
            return "bf16", "the processor has instructions for it"
        return "no", "the processor has no instructions for bf16"
    if asked:
        return asked, why_asked
    if device.type != "cuda":
        return "no", f"{device.type} is untested"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "matrix units"
    if torch.cuda.get_device_capability(device) >= (7, 0):  # V100, T4
        return "fp16", "matrix units; this GPU has no bf16"
    return "no", "this GPU has no matrix units"


def compiler_trouble(device: torch.device, mode: str = "default") -> str | None:
    """Why torch.compile in `mode` does not work on `device`, or None if it does.

    Tried on a function of one line, forward and backward, three times: CUDA graphs are recorded in the second
    and replayed in the third.
    """
    for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(name) == "1":
            return f"{name} is set"
    try:
        weight = torch.ones(8, device=device, requires_grad=True)
        compiled = torch.compile(lambda x, weight: (x * weight).sin().sum(), mode=mode)
        for _ in range(3):
            compiled(torch.ones(8, device=device), weight).backward()
            weight.grad = None
    except Exception as error:  # of many kinds: no Triton, no C compiler, no Python headers, an old GPU
        torch.compiler.reset()
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return f"the compiler does not work here: {lines[0][:150]}"
    return None


def choose_memory_format(device: torch.device, precision: str, training: bool) -> tuple[torch.memory_format, str]:
    """The layout of weights in memory, and why."""
    if device.type == "cuda":
        return torch.channels_last, "the matrix units' own layout"
    if device.type != "cpu":
        return torch.contiguous_format, f"{device.type} is untested"
    if training or precision == "bf16":
        return torch.contiguous_format, "channels_last is not faster here"
    return torch.channels_last, "faster for sampling in fp32"


def choose_setup(state: PartialState, precision: str | None, passes: int, training: bool, graphs: bool = True) -> Setup:
    """What is fastest on the devices of `state` for so many `passes` through a network, of each process.

    `graphs`: whether CUDA graphs may be used. Raises as `choose_precision`. Measured by benchmarks/speed.py;
    docs/speed.md has the figures.
    """
    device = state.device
    precision, why_precision = choose_precision(device, precision)
    memory_format, why_format = choose_memory_format(device, precision, training)

    # CUDA graphs, where the CPU would not keep up with small batches
    mode = "reduce-overhead" if graphs else "default"
    compile_mode = None
    if device.type != "cuda":
        why_compile = "gains nothing without CUDA"
    elif passes < COMPILE_FROM:
        why_compile = f"pays from some {COMPILE_FROM:,} passes, here {passes:,}"
    elif trouble := compiler_trouble(device, mode):
        why_compile = trouble
    else:
        compile_mode = mode
        why_compile = f"{passes:,} passes; pays from some {COMPILE_FROM:,}; the first takes one to three minutes"
    reasons = (why_precision, why_format, why_compile)
    return Setup(device, state.num_processes, precision, memory_format, compile_mode, reasons)


def prepare(model: nn.Module, setup: Setup) -> tuple[Callable, Callable]:
    """The network on its device to sample with, plain and compiled; twice the same if not to be compiled.

    In half precision the weights of convolutions and linear layers become so for good, as autocast would
    convert them anew in each pass; what the network predicts stays the same, bit for bit.
    """
    for name, module in model.named_modules():
        # Not the first: UNet2DModel adds up its embeddings in the precision of its first parameter.
        if isinstance(module, nn.Conv2d | nn.Linear) and name != "unet.conv_in":
            module.to(DTYPES[setup.precision])
    model.to(setup.device).to(memory_format=setup.memory_format).eval()
    accelerator = new_accelerator(mixed_precision=setup.precision)
    network = accelerator.prepare_model(model, evaluation_mode=True)
    if not setup.compile_mode:
        return network, network
    return network, torch.compile(network, mode=setup.compile_mode, dynamic=False)


def device_name(device: torch.device) -> str:
    """What a device is called in reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def seconds_per_picture(model: torch.nn.Module, accelerator: Accelerator) -> float:
    """How long training takes on a picture, measured on four of them."""
    images = torch.zeros(4, 3, IMAGE_SIZE, IMAGE_SIZE, device=accelerator.device)
    timesteps = torch.zeros(4, device=accelerator.device)
    labels = torch.zeros(4, NUM_OBJECTS, device=accelerator.device)
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        with accelerator.autocast():
            prediction = model(images, timesteps, labels)
        prediction.float().square().mean().backward()
        seconds = (time.perf_counter() - start) / 4
    model.zero_grad()
    return seconds


def batch_size_for(device: torch.device, pictures: int, processes: int, most: int | None) -> int:
    """Pictures at a time, of so many in all.

    `most`: None for what the device likes, 64, but 16 on a CPU: guidance doubles it, and more than 32 at once
    are slower there. Elsewhere as many as make the batches of all processes even, since the last one is
    filled up: a compiled network wants all batches of one size.
    """
    if device.type == "cpu":
        return min(most or 16, math.ceil(pictures / processes))
    rounds = math.ceil(pictures / processes / (most or 64))
    return math.ceil(pictures / processes / rounds)


def start_copy(numbers: torch.Tensor) -> Callable[[], list[float]]:
    """Begin to copy `numbers` to the host, without waiting for the device; the function returned gives them,
    and waits for them if need be."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    copy = numbers.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return copy.tolist()

    return read


# ---------------------------------------------------------------------------------------------- what can fail

_OUT_OF_MEMORY = (
    "out of memory",  # CUDA's own, as a torch.AcceleratorError; MPS
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its workspace did not fit
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "allocate memory",  # the CPU's
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device, or without CUDA the machine, has too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def is_missing_kernel(error: BaseException) -> bool:
    """Whether `error` says that this build of PyTorch has no code for this GPU."""
    return isinstance(error, RuntimeError) and "no kernel image is available" in str(error)


def smaller_batch(batch_size: int, grad_accum: int, processes: int) -> str:
    """What to try where a batch did not fit into memory."""
    share = batch_size // processes
    parts = next((n for n in range(2, share + 1) if share % n == 0), None)
    line = f"with --batch-size {batch_size}; "
    if not parts:
        return line + "not even one picture at a time fits"
    smaller = f"--batch-size {batch_size // parts} --grad-accum {grad_accum * parts}"
    return f"{line}try {smaller}, which gives the same result"


@contextlib.contextmanager
def explained(device: torch.device, advice: str) -> Iterator[None]:
    """Within it two errors of a device become an InputError: too little memory, to which `advice` says what
    to try, and a GPU for which this build of PyTorch has no kernels."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise InputError(f"{device.type}: out of memory {advice}") from None
        if is_missing_kernel(error):
            major, minor = torch.cuda.get_device_capability(device)
            raise InputError(
                f"{torch.cuda.get_device_name(device)}: this build of PyTorch ({torch.__version__}) has no "
                f"kernels for a GPU of sm_{major}{minor}, only for {', '.join(torch.cuda.get_arch_list())}; "
                f"install one that has (pytorch.org/get-started)"
            ) from None
        raise
