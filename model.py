"""The network, a diffusers UNet that is told what to paint by a multi-hot label, and the presets."""

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F

from dataset import IMAGE_SIZE, NUM_OBJECTS


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
    ):
        super().__init__()
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
                 "epochs": 40, "ema_decay": 0.0, "label_dropout": 0.0},
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
        },
        "scheduler": _COSINE | {"prediction_type": "v_prediction"},
        "training": {"batch_size": 16, "learning_rate": 7e-4, "lr_schedule": "linear", "warmup_steps": 200,
                     "epochs": 40, "ema_decay": 0.999, "label_dropout": 0.1},
        "sampling": {"sampler": "dpmsolver++", "steps": 15, "guidance_scale": 4.0},
    },
}  # fmt: skip


def build(preset: str) -> tuple[ConditionalUNet, DDPMScheduler]:
    """The network, freshly initialised by torch's global generator, and the noise scheduler of a preset."""
    return ConditionalUNet(**PRESETS[preset]["network"]), DDPMScheduler(**PRESETS[preset]["scheduler"])
