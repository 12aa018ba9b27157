"""The network: a diffusers UNet told what to paint by a multi-hot label, from a preset or from a file."""

import inspect
import warnings
from pathlib import Path

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F

from infra.commands import InputError, shown
from infra.files import load_json
from options import IMAGE_SIZE, NUM_OBJECTS, PRESETS


class ConditionalUNet(ModelMixin, ConfigMixin):
    """A UNet of diffusers that is told by a multi-hot label what to paint.

    `conditioning` says how the label enters. "linear": a linear embedding, added to that of the timestep. "tokens":
    cross-attention, in the blocks that have attention, to a token of each object in the label.

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
        conditioning: str = "linear",
    ):
        super().__init__()
        if IMAGE_SIZE % patch_size:
            raise ValueError(f"patches of {patch_size} do not divide {IMAGE_SIZE}")
        if conditioning not in ("linear", "tokens"):
            raise ValueError(f"no conditioning {conditioning}")
        channels = 3 * patch_size**2
        width = 4 * block_out_channels[0]  # of the timestep's embedding
        options = {
            "sample_size": IMAGE_SIZE // patch_size,
            "in_channels": channels,
            "out_channels": channels,
            "layers_per_block": layers_per_block,
            "block_out_channels": block_out_channels,
            "dropout": dropout,
            "resnet_time_scale_shift": resnet_time_scale_shift,
        }
        if conditioning == "tokens":
            self.unet = UNet2DConditionModel(
                down_block_types=tuple(name.replace("Attn", "CrossAttn") for name in down_block_types),
                up_block_types=tuple(name.replace("Attn", "CrossAttn") for name in up_block_types),
                attention_head_dim=tuple(max(1, c // attention_head_dim) for c in block_out_channels),  # their number
                cross_attention_dim=width,
                **options,
            )
            # The first token is always seen, so that there is one also without a label.
            self.object_tokens = nn.Embedding(1 + NUM_OBJECTS, width)
            return
        self.unet = UNet2DModel(
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            attention_head_dim=attention_head_dim,
            class_embed_type="identity",  # the label arrives embedded
            **options,
        )
        self.class_embedding = nn.Linear(NUM_OBJECTS, width)

    def forward(self, images: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Predict noise, velocity or clean images [B, 3, 64, 64] of noisy images [B, 3, 64, 64] at timesteps [B] in
        0..999.

        `labels` are multi-hot [B, 24]; all zeros is the unconditional label of classifier-free guidance.
        """
        patches = F.pixel_unshuffle(images, self.config.patch_size)
        if self.config.conditioning == "tokens":
            tokens = self.object_tokens.weight.expand(len(labels), -1, -1)
            is_seen = F.pad(labels, (1, 0), value=1.0) > 0  # [B, 1 + 24]
            prediction = self.unet(patches, timesteps, tokens, encoder_attention_mask=is_seen).sample
        else:
            prediction = self.unet(patches, timesteps, class_labels=self.class_embedding(labels)).sample
        return F.pixel_shuffle(prediction, self.config.patch_size)


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
    config = load_config(path, ConditionalUNet)
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
    allowed: dict[str, list] = {"num_train_timesteps": [1000], "prediction_type": ["epsilon", "v_prediction", "sample"]}
    for name, known in allowed.items():
        value = config.get(name, known[0])
        if value not in known:
            raise InputError(f"{path}, {name}: expected {' or '.join(map(str, known))}, got {shown(value)}")
    try:
        return DDPMScheduler(**config)
    except Exception as error:
        raise InputError(f"{path}: no noise schedule ({error})") from None
