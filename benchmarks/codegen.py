"""What torch.compile makes of our networks for CUDA cards that are not there: proof that it works on them.

    python benchmarks/codegen.py                             # half an hour on one core
    python benchmarks/codegen.py --models small --cards 75   # two rows, three minutes

Needs no GPU. Tensors without numbers (FakeTensorMode) say that they lie on the card, so torch.compile goes
all its way: Dynamo traces the network, Inductor writes Triton kernels and Python that launches them, and
Triton compiles the kernels for the card. Nothing is launched: this says nothing about speed. Each row has a
process of its own, as Inductor remembers its card. Prints Markdown; TORCH_LOGS=output_code shows what was
generated. Exit status 1 if a kernel does not compile or the network is broken into several graphs.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
import time
import types
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import fakecuda

from infra.device import Setup, new_accelerator, prepare
from model import build

MODE = "reduce-overhead"  # of torch.compile, as device.py chooses it: with CUDA graphs
DEVICE = torch.device("cuda:0")  # with its index: for "cuda" alone PyTorch asks the driver
CARDS = {  # by compute capability: name, multiprocessors, threads that each of them holds
    90: ("H100", 132, 2048),
    86: ("A10", 72, 1536),
    75: ("T4", 40, 1024),
}


class OnCPU(TorchDispatchMode):
    """Makes tensors on the CPU that are asked for on the card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def to_cpu(value):
            return torch.device("cpu") if isinstance(value, torch.device) else value

        return func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs or {}))


def pretend(card: int):
    """Answer in place of the driver what PyTorch and Triton ask about the card; for good, in this process."""
    name, processors, threads = CARDS[card]
    properties = types.SimpleNamespace(
        name=name, major=card // 10, minor=card % 10, multi_processor_count=processors, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=threads, max_threads_per_block=1024,
    )  # fmt: skip
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda._get_device_properties = lambda index: properties
    cuda._lazy_init = lambda: None
    cuda.set_device = lambda device: None
    cuda._exchange_device = lambda index: 0  # this and the next: with torch.cuda.device(0)
    cuda._maybe_exchange_device = lambda index: 0
    cuda.get_rng_state = lambda device=None: torch.zeros(1)  # kept while tracing, and put back
    cuda.set_rng_state = lambda state, device=None: None
    cuda.is_current_stream_capturing = lambda: False
    FakeTensorMode.avoid_device_init = True  # as where CUDA is not available, which is the truth
    fake_tensor.init_gpu_context = lambda device: None  # would allocate on the card
    target = GPUTarget("cuda", card, 32)
    driver.set_active(types.SimpleNamespace(get_current_target=lambda: target))
    triton_helpers.set_driver_to_gpu = lambda: None  # would load the real driver

    # What PyTorch chooses where there is a card. Without, convolutions lose channels_last, and attention
    # becomes matrix products. This is sdp_utils.cpp of PyTorch 2.14 with cuDNN 9.24, for half precision.
    torch._C._select_conv_backend = lambda *args, **kwargs: torch._C._ConvBackend.Cudnn
    aten = torch.ops.aten

    @aten.scaled_dot_product_attention.default.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)
    def attention(query, key, value, *args, **kwargs):
        if card == 90:
            return aten._scaled_dot_product_cudnn_attention(query, key, value, None, query.requires_grad)[0]
        if card >= 80:
            return aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, query.requires_grad)[0]

    # Inductor computes constants on real tensors of one element.
    deduce = UniformValueConstantFolder._deduce_value

    def deduce_on_cpu(self, node):
        with OnCPU():
            return deduce(self, node)

    UniformValueConstantFolder._deduce_value = deduce_on_cpu


def to_card(model: torch.nn.Module, fake: FakeTensorMode) -> torch.nn.Module:
    """In place of model.to(DEVICE, memory_format=torch.channels_last): weights without numbers."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.device != DEVICE:
                layout = torch.channels_last if weight.dim() == 4 else torch.preserve_format
                with fake:
                    moved = torch.empty_like(weight, device=DEVICE, memory_format=layout)
                setattr(module, name, torch.nn.Parameter(moved))
    return model


def set_up(preset: str, training: bool, precision: str, fake: FakeTensorMode) -> torch.nn.Module:
    """The network as for sampling or as in train.py, but for compiling it."""
    with torch.device("meta"):
        model, _ = build(preset)
    model.to = lambda *args, **kwargs: to_card(model, fake)
    if training:
        return new_accelerator(mixed_precision=precision).prepare_model(model.to().train())
    return prepare(model, Setup(DEVICE, 1, precision, torch.channels_last, None, ("", "", "")))[0]


def generate_code(preset: str, training: bool, card: int, batch_size: int):
    """Seconds that Inductor took, the code of the graphs, and the Triton kernels in it {source: name}."""
    seconds, codes, kernels = [], [], {}
    AsyncCompile.triton = lambda self, name, source, device_str="cuda": kernels.setdefault(source, name)
    GraphLowering.save_output_code = codes.append

    def compile_graph(graph, inputs, **kwargs):
        """Inductor's own part. Returns, in place of the code, a function that gives tensors of its shapes."""
        outputs = [getattr(node, "meta", {}).get("val") for node in graph.graph.output_node().args[0]]
        start = time.perf_counter()
        compile_fx_inner(graph, inputs, **kwargs)
        seconds.append(time.perf_counter() - start)

        def run(inputs: list) -> list:
            inputs.clear()
            return outputs

        run._boxed_call = True  # it takes its inputs as a list
        return run

    def backend(graph, inputs):
        options = torch._inductor.list_mode_options(MODE)
        return compile_fx(graph, inputs, inner_compile=compile_graph, config_patches=options)

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = set_up(preset, training, "bf16" if card >= 80 else "fp16", fake)
    model = torch.compile(model, backend=backend, dynamic=False)
    with fake:
        images = torch.empty(batch_size, 3, 64, 64, device=DEVICE)
        timesteps = torch.empty(batch_size, dtype=torch.long, device=DEVICE)
        labels = torch.empty(batch_size, 24, device=DEVICE)
        with contextlib.nullcontext() if training else torch.no_grad():
            prediction = model(images, timesteps, labels)
        if training:
            F.mse_loss(prediction.float(), images).backward()  # compiles the graph of the way back
    return sum(seconds), codes, kernels


def compile_kernels(kernels: dict[str, str]) -> list[str]:
    """Compile the kernels, each for all the block sizes that Inductor would try; what went wrong."""
    errors = []
    for source, name in kernels.items():
        try:
            kernel = getattr(PyCodeCache.load(source), name)
            for config in kernel.configs:
                kernel._precompile_config(config)
        except Exception as error:  # of many kinds
            errors.append(f"{name}: {type(error).__name__}: {error}")
    return errors


def make_row(preset: str, training: bool, card: int, batch_size: int) -> tuple[str, list[str]]:
    """A row of the table, and what went wrong."""
    warnings.simplefilter("ignore")
    torch._inductor.config.force_disable_caches = True  # or a second run would generate nothing
    torch._inductor.config.shape_padding = False  # would time padded matrix products on the card
    pretend(card)
    start = time.perf_counter()
    inductor, codes, kernels = generate_code(preset, training, card, batch_size)
    middle = time.perf_counter()
    errors = compile_kernels(kernels)
    end = time.perf_counter()
    code = "\n".join(codes)
    launches = len(re.findall(r"\btriton_\w+\.run\(", code))
    calls = len(re.findall(r"\b(?:extern_kernels|torch\.ops\.aten)\.[\w.]+\(", code))
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    what = f"{preset} | {'training' if training else 'sampling'}"
    name = f"{CARDS[card][0]}, sm_{card}, {'bf16' if card >= 80 else 'fp16'}"
    times = f"{middle - start - inductor:.0f} | {inductor:.0f} | {end - middle:.0f}"
    counts = f"{len(kernels)} | {len(kernels) - len(errors)} | {calls} | {calls + launches} | {breaks}"
    if breaks:
        errors.append(f"{breaks} graph breaks")
    return f"| {what} | {name} | {times} | {counts} |", [f"{preset}, {name}: {error}" for error in errors]


def main():
    parser = argparse.ArgumentParser(description="Compile the networks for CUDA cards that are not there.")
    parser.add_argument("--models", nargs="+", default=["reference", "small"], metavar="PRESET")
    parser.add_argument("--cards", nargs="+", type=int, choices=CARDS, default=list(CARDS))
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    print("| model | what | card | tracing, s | Inductor, s | Triton, s | Triton kernels | compiled "
          "| library calls | launches, with these | graph breaks |")  # fmt: skip
    print("|---" * 11 + "|", flush=True)
    errors, spawn = [], multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(fakecuda.environment(Path(folder)))  # of the processes that start from here on
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
            for preset, training, card in itertools.product(args.models, (False, True), args.cards):
                row, found = pool.submit(make_row, preset, training, card, args.batch_size).result()
                print(row, flush=True)
                errors += found
    for error in errors:
        print(error, file=sys.stderr)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
