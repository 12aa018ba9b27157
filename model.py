"""Builds the network and its noise scheduler: from a preset, or from a file with care."""

import inspect
import warnings
from pathlib import Path

import torch
from diffusers import DDPMScheduler

from infra.commands import InputError, shown
from infra.files import load_json
from network import ConditionalUNet
from options import IMAGE_SIZE, NUM_OBJECTS, PRESETS, SCHEDULES


def build(preset: str, **schedule: str) -> tuple[ConditionalUNet, DDPMScheduler]:
    """The network, freshly initialised by torch's global generator, and the noise scheduler of a preset. `schedule`:
    what of the scheduler is to be otherwise."""
    return ConditionalUNet(**PRESETS[preset]["network"]), DDPMScheduler(**PRESETS[preset]["scheduler"] | schedule)


def fits(value, default) -> bool:
    """Whether a value of a config file is of the type and size of those that go where `default` stands."""
    if isinstance(default, tuple):
        return isinstance(value, list) and 1 <= len(value) <= 16 and all(fits(v, default[0]) for v in value)
    if isinstance(default, float):
        return type(value) in (int, float) and 0 <= value <= 1
    if type(default) is int:
        return type(value) is int and 0 <= value <= 4096
    return type(value) is type(default)


def load_config(path: Path, kind: type, obsolete: tuple[str, ...] = ()) -> dict:
    """The arguments of the diffusers class `kind` in a config file of it, checked against their defaults. Those that
    are `obsolete` are left out. Raises InputError."""
    config = load_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected the arguments of {kind.__name__}")
    # What starts with an underscore are diffusers' notes.
    config = {name: value for name, value in config.items() if not name.startswith("_") and name not in obsolete}
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    for name, value in config.items():
        if name not in defaults:
            raise InputError(f"{path}, entry {shown(name)}: no argument of {kind.__name__}")
        if not fits(value, defaults[name]):
            raise InputError(f"{path}, {name}: expected one like {defaults[name]!r}, got {shown(value)}")
    return config


def load_network(path: Path) -> ConditionalUNet:
    """The network of a config file, without weights: on the meta device, and seen to work there, so that a
    file asking for more than there is costs nothing. Raises InputError."""
    config = load_config(path, ConditionalUNet, obsolete=("up_block_types",))  # the mirror image of the way down
    layers = config.get("layers_per_block", 1)
    if layers > 16:
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
    allowed: dict[str, tuple] = {"num_train_timesteps": (1000,), "prediction_type": SCHEDULES["prediction_type"]}
    for name, known in allowed.items():
        value = config.get(name, known[0])
        if value not in known:
            raise InputError(f"{path}, {name}: expected {' or '.join(map(str, known))}, got {shown(value)}")
    try:
        return DDPMScheduler(**config)
    except Exception as error:
        raise InputError(f"{path}: no noise schedule ({error})") from None
