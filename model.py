"""The network, a diffusers UNet told what to paint by a multi-hot label; presets; how it runs on a device."""

import inspect
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F

from dataset import IMAGE_SIZE, NUM_OBJECTS, InputError, load_json, shown


class ConditionalUNet(ModelMixin, ConfigMixin):
    """`UNet2DModel` with a linear embedding of the label added to that of the timestep.

    With `patch_size` p > 1 the UNet works on p x p patches folded into channels (`pixel_unshuffle`): the
    same channels cost 1 / p^2. Saves and loads, label embedding included, by `save_pretrained` and
    `from_pretrained`.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512),
        down_block_types: tuple[str, ...] = ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types: tuple[str, ...] = ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        layers_per_block: int = 2,
        attention_head_dim: int = 8,
        dropout: float = 0.0,
        patch_size: int = 1,
        resnet_time_scale_shift: str = "default",
    ):
        super().__init__()
        if IMAGE_SIZE % patch_size:
            raise ValueError(f"patches of {patch_size} do not divide {IMAGE_SIZE}")
        self.unet = UNet2DModel(
            sample_size=IMAGE_SIZE // patch_size,
            in_channels=3 * patch_size**2,
            out_channels=3 * patch_size**2,
            layers_per_block=layers_per_block,
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            attention_head_dim=attention_head_dim,
            dropout=dropout,
            resnet_time_scale_shift=resnet_time_scale_shift,
            class_embed_type="identity",  # the label arrives embedded
        )
        self.class_embedding = nn.Linear(NUM_OBJECTS, 4 * block_out_channels[0])

    def forward(self, images: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Predict noise or velocity [B, 3, 64, 64] of noisy images [B, 3, 64, 64] at timesteps [B] in 0..999.

        `labels` are multi-hot [B, 24]; all zeros is the unconditional label of classifier-free guidance.
        """
        patches = F.pixel_unshuffle(images, self.config.patch_size)
        prediction = self.unet(patches, timesteps, class_labels=self.class_embedding(labels)).sample
        return F.pixel_shuffle(prediction, self.config.patch_size)


# Trailing timesteps: sampling with few steps then starts where training ended (arXiv 2305.08891).
_COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
_REPORT = {  # the recipe of the report that this project starts from
    "scheduler": _COSINE,
    "training": {"batch_size": 32, "learning_rate": 1e-4, "lr_schedule": "constant", "warmup_steps": 0,
                 "epochs": 40, "ema_decay": 0.0, "label_dropout": 0.0,
                 "timestep_sampling": "uniform", "optimizer": "adamw"},
    "sampling": {"sampler": "ddpm", "steps": 1000, "guidance_scale": 1.0},
}  # fmt: skip

# Everything that makes a run: network, noise scheduler, and the defaults of train.py and sample.py.
PRESETS: dict[str, dict] = {
    "reference": _REPORT | {"network": {}},  # 113.7M parameters: the defaults above
    "tiny-attention": _REPORT | {"network": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3,
    }},
    "tiny-mixed": _REPORT | {"network": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }},
    "small": {  # for two CPU cores
        "network": {
            "patch_size": 2,
            "block_out_channels": (64, 96, 128),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 32,
            "resnet_time_scale_shift": "scale_shift",
        },
        "scheduler": _COSINE | {"prediction_type": "v_prediction"},
        "training": {"batch_size": 32, "learning_rate": 3e-3, "lr_schedule": "linear", "warmup_steps": 200,
                     "epochs": 40, "ema_decay": 0.999, "label_dropout": 0.1,
                     "timestep_sampling": "logit-normal", "optimizer": "muon"},
        # Guidance from the first step on paints copies of objects: the noisiest timesteps go without.
        "sampling": {"sampler": "dpmsolver++", "steps": 15, "guidance_scale": 4.0,
                     "guidance_interval": (0, 750),
                     "negative_scale": 4.0, "negative_interval": (350, 1000)},
    },
}  # fmt: skip


def build(preset: str) -> tuple[ConditionalUNet, DDPMScheduler]:
    """The network, freshly initialised by torch's global generator, and the noise scheduler of a preset."""
    return ConditionalUNet(**PRESETS[preset]["network"]), DDPMScheduler(**PRESETS[preset]["scheduler"])


def fits(value, default) -> bool:
    """Whether a value of a config file is of the type and size of those that go where `default` stands."""
    if isinstance(default, tuple):
        return isinstance(value, list) and 1 <= len(value) <= 16 and all(fits(v, default[0]) for v in value)
    if isinstance(default, float):
        return type(value) in (int, float) and 0 <= value <= 1
    if type(default) is int:
        return type(value) is int and 0 <= value <= 4096
    return type(value) is type(default)


def load_config(path: Path, kind: type) -> dict:
    """The arguments of the diffusers class `kind` in a config file of it, checked against their defaults.
    Raises InputError."""
    config = load_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected the arguments of {kind.__name__}")
    config = {name: value for name, value in config.items() if not name.startswith("_")}  # diffusers' notes
    defaults = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}
    for name, value in config.items():
        if name == "self" or name not in defaults:
            raise InputError(f"{path}, entry {shown(name)}: no argument of {kind.__name__}")
        if not fits(value, defaults[name]):
            raise InputError(f"{path}, {name}: expected one like {defaults[name]!r}, got {shown(value)}")
    return config


def load_network(path: Path) -> ConditionalUNet:
    """The network of a config file, without weights: on the meta device, and seen to work there, so that a
    file asking for more than there is costs nothing. Raises InputError."""
    config = load_config(path, ConditionalUNet)
    if (layers := config.get("layers_per_block", 1)) > 16:
        raise InputError(f"{path}, layers_per_block: expected up to 16, got {layers}")
    try:
        with torch.device("meta"), torch.no_grad(), warnings.catch_warnings(action="ignore"):
            model = ConditionalUNet(**config)
            model(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), torch.zeros(1), torch.zeros(1, NUM_OBJECTS))
    except Exception as error:  # of many kinds, by what does not go together
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: no network for {IMAGE_SIZE}x{IMAGE_SIZE} pictures ({reason})") from None
    return model


def load_noise_scheduler(path: Path) -> DDPMScheduler:
    """The noise scheduler of a config file. Raises InputError."""
    config = load_config(path, DDPMScheduler)
    for name, known in {
        "num_train_timesteps": [1000],
        "prediction_type": ["epsilon", "v_prediction"],
    }.items():
        if (value := config.get(name, known[0])) not in known:
            raise InputError(f"{path}, {name}: expected {' or '.join(map(str, known))}, got {shown(value)}")
    try:
        return DDPMScheduler(**config)
    except Exception as error:
        raise InputError(f"{path}: no noise schedule ({error})") from None


# ------------------------------------------------------------------------------------ how it runs on a device

COMPILE_FROM = 500  # passes through the network that win back the minute which compiling takes


@dataclass(frozen=True)
class Setup:
    """How a network runs on a device; `str()` says it in one line, with the reasons."""

    device: torch.device
    precision: str  # of autocast, in accelerate's words: "no" (fp32) or "bf16"
    memory_format: torch.memory_format
    compile_mode: str | None  # of torch.compile; None: not compiled
    reasons: tuple[str, str, str]  # of these three

    def __str__(self) -> str:
        chosen = [
            "bf16 autocast" if self.precision == "bf16" else "fp32",
            str(self.memory_format).removeprefix("torch."),
            f"compiled, {self.compile_mode}" if self.compile_mode else "not compiled",
        ]
        parts = [f"{what} ({why})" for what, why in zip(chosen, self.reasons, strict=True)]
        return f"setup: {self.device.type}, {', '.join(parts)}"


def choose_precision(device: torch.device, asked: str | None) -> tuple[str, str]:
    """The precision of autocast, "no" or "bf16", and why: as asked, else bf16 on CUDA that has it.

    Raises InputError for bf16 on a processor that has no instructions for it.
    """
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()  # AVX512 wherever there is AMX
        if asked == "bf16" and "AVX512" not in capability:
            raise InputError(
                f"--mixed-precision bf16: 40 to 500 times slower on this processor, which has neither AVX512 "
                f"nor AMX but {capability}"
            )
    if asked:
        return asked, "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "matrix units"
        return "no", "this GPU has no bf16"
    return "no", "no CUDA"


def compiler_trouble(device: torch.device) -> str | None:
    """Why torch.compile does not work on `device`, or None if it does: tried on a function of one line."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "TORCH_COMPILE_DISABLE is set"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds: no Triton, no C compiler, no Python headers, an old GPU
        torch.compiler.reset()
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return f"the compiler does not work here: {lines[0][:150]}"
    return None


def choose_setup(device: torch.device, precision: str | None, passes: int, training: bool) -> Setup:
    """What is fastest on `device` for so many `passes` through a network. Raises as `choose_precision`.

    Measured by benchmarks/speed.py; docs/speed.md has the figures.
    """
    precision, why_precision = choose_precision(device, precision)
    memory_format, why_format = torch.channels_last, "the matrix units' own layout"
    if device.type != "cuda":
        why_format = "faster for sampling in fp32"
        if training or precision == "bf16":
            memory_format, why_format = torch.contiguous_format, "channels_last is not faster here"
    compile_mode = None
    if device.type != "cuda":
        why_compile = "gains nothing without CUDA"
    elif passes < COMPILE_FROM:
        why_compile = f"pays from {COMPILE_FROM} passes, here {passes}"
    elif trouble := compiler_trouble(device):
        why_compile = trouble
    else:  # CUDA graphs for sampling, where the CPU would not keep up with small batches
        compile_mode = "default" if training else "reduce-overhead"
        why_compile = "static shapes"
    return Setup(device, precision, memory_format, compile_mode, (why_precision, why_format, why_compile))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device, or without CUDA the machine, has too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def out_of_memory(batch_size: int, grad_accum: int, processes: int) -> str:
    """What to say and to try where training had too little memory."""
    share = batch_size // processes
    parts = next((n for n in range(2, share + 1) if share % n == 0), None)
    line = f"{PartialState().device.type}: out of memory with --batch-size {batch_size}; "
    if not parts:
        return line + "not even one picture at a time fits"
    smaller = f"--batch-size {batch_size // parts} --grad-accum {grad_accum * parts}"
    return f"{line}try {smaller}, which gives the same result"
