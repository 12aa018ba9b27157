"""A CUDA device that is not there: tensors of the CPU are real, those on "cuda" have a shape and no numbers.

With `install()` the scripts run as if on a GPU, and `with Cuda() as cuda:` counts what that would cost:
kernels launched, and places where the host waits for the device. What comes back from the device is zero,
but for True and the integer 1. To be used in a process of its own, since it replaces functions of torch.
"""

import collections
import functools
import linecache
import os
import subprocess
import sys
import types
from pathlib import Path

import torch
import torch._dynamo  # before torch.Generator is replaced
import torch._subclasses.fake_tensor as fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import _foreach_supported_types as foreach_of_optimizers
from torch.utils import _pytree as pytree
from torch.utils._foreach_utils import _foreach_supported_types as foreach_of_norms
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten
ALLOCATIONS = {  # that launch no kernel, beside views
    aten.detach.default, aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default,
    aten.new_empty.default, aten.new_empty_strided.default, aten._unsafe_view.default,
    aten.lift_fresh.default, aten._local_scalar_dense.default, torch.ops.prim.device.default,
}  # fmt: skip
SIZES_FROM_DATA = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}


class Generator:
    """In place of torch.Generator, which wants a real device."""

    real = torch.Generator

    def __new__(cls, device="cpu"):
        return super().__new__(cls) if torch.device(device).type == "cuda" else cls.real(device)

    def __init__(self, device="cpu"):
        self.device = torch.device("cuda", 0)

    def manual_seed(self, seed: int):
        return self


class Event:
    """In place of torch.cuda.Event. To wait for one is to wait for the device, unless that has been given at
    least a hundred kernels more to do meanwhile."""

    def record(self):
        self.cuda = Cuda.active
        self.kernels = self.cuda.kernels.total()

    def synchronize(self):
        if self.cuda.kernels.total() - self.kernels < 100:
            self.cuda.wait("an event")


# A build of PyTorch for CUDA looks for the device's context in a backward pass, and finds that there is no
# driver. Loaded before it, these functions say that it knows no accelerator, by their old and new names.
SHIM = """
short _ZN2at14getAcceleratorEb(char checked) { return 0; }
char _ZN2at13isAcceleratorEN3c1010DeviceTypeE(char type) { return 0; }
short _ZN2at11accelerator14getAcceleratorEb(char checked) { return 0; }
char _ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE(char type) { return 0; }
"""


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that is to use this module. Writes to `folder`; needs a C compiler."""
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    # A device without a number would be looked for.
    return os.environ | {"LD_PRELOAD": str(library), "ACCELERATE_TORCH_DEVICE": "cuda:0"}


def install(name: str, major: int, minor: int):
    """Pretend that there is one GPU of this name and capability; torch.compile hands its function back."""
    torch._C._ensureCUDADeviceGuardSet()  # which then does nothing
    torch._C._set_only_lift_cpu_tensors(True)
    fake_tensor.init_gpu_context = lambda device: None
    for supported in (foreach_of_optimizers, foreach_of_norms):
        supported.append(FakeTensor)
    properties = types.SimpleNamespace(name=name, major=major, minor=minor)
    properties.L2_cache_size = 50 * 2**20
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: False  # so that manual_seed is put off
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = cuda.synchronize = lambda device=None: None
    cuda.empty_cache = cuda._lazy_init = lambda: None
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: (major, minor)
    cuda.get_device_name = lambda device=None: name
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_arch_list = lambda: ["sm_80", "sm_90"]
    cuda.Event = Event
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_stream = lambda: types.SimpleNamespace(is_capturing=lambda: False)
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda", 0)
    torch.Generator = Generator
    torch.randn = _without_generator(torch.randn)
    torch.nn.Module.to = _module_to
    torch.compile = compiled


compiled_for: list[tuple] = []  # mode of torch.compile and shapes of the arguments, of each call


def compiled(function, mode: str, dynamic: bool = False):
    """In place of torch.compile: notes what would be compiled."""

    def call(*args):
        compiled_for.append((mode, *(tuple(arg.shape) for arg in args)))
        return function(*args)

    return call


def _without_generator(function):
    def call(*args, generator=None, **kwargs):
        return function(*args, generator=None if type(generator) is Generator else generator, **kwargs)

    return call


def _numbers(shape, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, 0 if dtype.is_floating_point else 1, dtype=dtype)


_to = torch.nn.Module.to


def _module_to(self, *args, **kwargs):
    """As Module.to, which cannot move what is fake already."""
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    tensors = [*self.parameters(), *self.buffers()]
    if not all(isinstance(t, FakeTensor) for t in tensors) or dtype is not None:
        return _to(self, *args, **kwargs)
    if layout is not None:
        for module in self.modules():
            for name, weight in module._parameters.items():
                if weight is not None and weight.ndim == 4:
                    laid_out = weight.detach().contiguous(memory_format=layout)
                    module._parameters[name] = torch.nn.Parameter(laid_out, weight.requires_grad)
    return self


@functools.cache
def is_ours(filename: str) -> bool:
    """Whether a file is a script of the project, or in one of its packages."""
    folder = Path(filename).parent
    return folder == ROOT or folder.parent == ROOT and (folder / "__init__.py").exists()


class Cuda(TorchDispatchMode):
    """Counts kernels by name, waits by what and where, bytes copied. `errors`: kernels that fail, and how."""

    active: "Cuda"

    def __init__(self, errors: dict[str, Exception] | None = None):
        super().__init__()
        Cuda.active = self
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.kernels: collections.Counter = collections.Counter()
        self.waits: collections.Counter = collections.Counter()
        self.bytes = 0  # copied from or to the device
        self.errors = errors or {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(t, torch.Tensor)]
        on_device = [t for t in tensors if isinstance(t, FakeTensor)]
        device = torch.device(kwargs.get("device") or "meta").type
        if not on_device and device != "cuda":
            return function(*args, **kwargs)
        if str(function) in self.errors:
            raise self.errors[str(function)]
        comes_back = self._to_the_host(function, args, kwargs, device)
        if comes_back is not None:
            return comes_back
        if function in SIZES_FROM_DATA:
            self.wait("a size")
        if function in (aten._to_copy.default, aten.copy_.default) and len(on_device) < len(tensors):
            if not (kwargs.get("non_blocking") or len(args) > 2 and args[2]):
                self.wait("a copy to the device")
            self.bytes += sum(t.nbytes for t in tensors if not isinstance(t, FakeTensor))
        if not function.is_view and function not in ALLOCATIONS:
            self.kernels[str(function)] += 1
        if function is aten.stack.default:  # as the kernel does, which refuses tensors of two devices
            dim = args[1] if len(args) > 1 else 0
            return torch.cat([t.unsqueeze(dim) for t in args[0]], dim)
        if len(on_device) < len(tensors):
            args, kwargs = pytree.tree_map(self._fake, (args, kwargs))
        with self.fake:
            return function(*args, **kwargs)

    def _to_the_host(self, function, args, kwargs, device: str):
        """What an operation brings back from the device, None if nothing."""
        if function is aten._local_scalar_dense.default:
            self.wait("a number")
            self.bytes += args[0].nbytes
            return _numbers(args[0].shape, args[0].dtype).item()
        if function is aten._to_copy.default and device == "cpu":
            if not kwargs.get("non_blocking"):
                self.wait("a copy to the host")
            self.bytes += args[0].nbytes
            return _numbers(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        if function is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self.wait("a copy to the host")
            self.bytes += args[0].nbytes
            return args[0].copy_(_numbers(args[0].shape, args[0].dtype))
        return None

    def _fake(self, value):
        is_real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return self.fake.from_tensor(value) if is_real else value

    def wait(self, what: str):
        """Note a wait, and the line of the project in which it is."""
        frame: types.FrameType | None = sys._getframe()
        while frame is not None and not is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        where = "?"
        if frame is not None:
            filename = frame.f_code.co_filename
            where = f"{Path(filename).name}: {linecache.getline(filename, frame.f_lineno).strip()}"
        self.waits[f"{what}, {where}"] += 1


class Steps:
    """In place of train.py's progress bar: notes what each step costs."""

    last: "Steps | None" = None

    def __init__(self, steps, **options):
        self.steps, self.counts = steps, []
        Steps.last = self

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass

    def __iter__(self):
        cuda = Cuda.active
        for step in self.steps:
            kernels, waits, copied = cuda.kernels.total(), cuda.waits.copy(), cuda.bytes
            yield step
            count = {"kernels": cuda.kernels.total() - kernels, "waits": dict(cuda.waits - waits)}
            self.counts.append(count | {"bytes": cuda.bytes - copied})

    def set_postfix(self, **values):
        pass
