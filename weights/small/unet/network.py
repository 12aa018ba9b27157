"""The network: a diffusers UNet told by a multi-hot label what to paint.

It needs no other file of this project. A folder of weights holds a copy of it, so it can be loaded without the project.
"""

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F


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
        layers_per_block: int = 2,
        attention_head_dim: int = 8,
        dropout: float = 0.0,
        patch_size: int = 1,
        resnet_time_scale_shift: str = "default",
        conditioning: str = "linear",
        sample_size: int = 64,
        num_objects: int = 24,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"patches of {patch_size} do not divide {sample_size}")
        if conditioning not in ("linear", "tokens"):
            raise ValueError(f"no conditioning {conditioning}")
        channels = 3 * patch_size**2
        width = 4 * block_out_channels[0]  # of the timestep's embedding
        # The way up is the mirror image of the way down.
        up_block_types = tuple(name.replace("Down", "Up") for name in reversed(down_block_types))
        options = {
            "sample_size": sample_size // patch_size,
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
            self.object_tokens = nn.Embedding(1 + num_objects, width)
            return
        self.unet = UNet2DModel(
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            attention_head_dim=attention_head_dim,
            class_embed_type="identity",  # the label arrives embedded
            **options,
        )
        self.class_embedding = nn.Linear(num_objects, width)

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
