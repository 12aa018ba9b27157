"""The network: a diffusers UNet told by a multi-hot label what to paint.

It needs no other file of this project. A folder of weights holds a copy of it, so it can be loaded without the project.
"""

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from torch import nn
from torch.nn import functional as F


def normalize_queries_and_keys(network: nn.Module):
    """Give each attention of a network an RMSNorm for its queries and one for its keys (arXiv 2302.05442).

    Without it the logits grow without limit in long trainings with Muon, until each place sees only one other place
    and the gradient is little more than rounding errors of bf16.
    """
    for module in network.modules():
        if isinstance(module, Attention):
            width = module.to_q.out_features // module.heads
            module.norm_q = RMSNorm(width, eps=1e-6)
            module.norm_k = RMSNorm(width, eps=1e-6)


def cross_attention_unet(
    head_dim: int, token_width: int, down_block_types: tuple[str, ...], up_block_types: tuple[str, ...], options: dict
) -> UNet2DConditionModel:
    """A UNet whose blocks with attention attend to tokens too, which are `token_width` wide."""
    return UNet2DConditionModel(
        down_block_types=tuple(name.replace("Attn", "CrossAttn") for name in down_block_types),
        up_block_types=tuple(name.replace("Attn", "CrossAttn") for name in up_block_types),
        # by this name the number of heads
        attention_head_dim=tuple(max(1, channels // head_dim) for channels in options["block_out_channels"]),
        cross_attention_dim=token_width,
        **options,
    )


class MiddleTransformer(nn.Module):
    """Transformer blocks between the way down and the way up of a UNet, where its feature map is smallest.

    Places and objects are tokens of one sequence, so that each object can find out where it is, and which places
    are taken by others. It starts as the identity: trained weights can get one and be trained on.
    """

    def __init__(self, size: int, channels: int, embedding_width: int, num_objects: int, layers: int, width: int):
        super().__init__()
        self.norm_in = nn.GroupNorm(32, channels)
        self.project_in = nn.Linear(channels, width)
        self.positions = nn.Parameter(0.02 * torch.randn(size**2, width))
        self.object_tokens = nn.Parameter(torch.randn(num_objects, width))
        self.embedding_token = nn.Linear(embedding_width, width)
        head_dim = 64
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, width // head_dim, head_dim, activation_fn="gelu") for _ in range(layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.project_out = nn.Linear(width, channels)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, features: torch.Tensor, embedding: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Features [B, C, H, W] of the middle, told by the embedding [B, E] of timestep and label and by the
        labels [B, 24]: features [B, C, H, W]."""
        places = self.project_in(self.norm_in(features).flatten(2).mT) + self.positions  # [B, HW, width]
        timestep = self.embedding_token(embedding)[:, None]
        objects = labels[:, :, None] * self.object_tokens  # [B, 24, width]
        tokens = torch.cat([places, timestep, objects.to(places.dtype)], dim=1)
        # Objects that are not in the label are not seen.
        is_seen = F.pad(labels, (tokens.shape[1] - labels.shape[1], 0), value=1.0) > 0
        mask = torch.where(is_seen, 0.0, -1e4).to(tokens.dtype)[:, None]  # added to the attention's scores
        for block in self.blocks:
            tokens = block(tokens, attention_mask=mask)
        added = self.project_out(self.norm_out(tokens[:, : places.shape[1]]))
        return features + added.mT.reshape_as(features)


class ConditionalUNet(ModelMixin, ConfigMixin):
    """A UNet of diffusers that is told by a multi-hot label what to paint.

    `conditioning` says how the label enters. "linear": a linear embedding, added to that of the timestep. "tokens":
    cross-attention, in the blocks that have attention, to a token of each object in the label. "linear" may have
    a `MiddleTransformer` of `middle_layers` blocks and `middle_width` channels, a multiple of 64, besides.
    `normalize_attention` normalizes all that attention compares (`normalize_queries_and_keys`).

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
        normalize_attention: bool = False,
        middle_layers: int = 0,
        middle_width: int = 192,
        sample_size: int = 64,
        num_objects: int = 24,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"patches of {patch_size} do not divide {sample_size}")
        if conditioning not in ("linear", "tokens"):
            raise ValueError(f"no conditioning {conditioning}")
        if middle_layers and conditioning == "tokens":
            raise ValueError("no middle transformer beside cross-attention: expected middle_layers 0")
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
            self.unet = cross_attention_unet(attention_head_dim, width, down_block_types, up_block_types, options)
            # The first token is always seen, so that there is one also without a label.
            self.object_tokens = nn.Embedding(1 + num_objects, width)
        else:
            self.unet = UNet2DModel(
                down_block_types=down_block_types,
                up_block_types=up_block_types,
                attention_head_dim=attention_head_dim,
                class_embed_type="identity",  # the label arrives embedded
                # Without a number, diffusers leaves out the middle's norm where resnets have scale-shift.
                attn_norm_num_groups=32 if normalize_attention else None,
                **options,
            )
            self.class_embedding = nn.Linear(num_objects, width)
        if middle_layers:
            size = sample_size // patch_size // 2 ** (len(block_out_channels) - 1)
            self.middle = MiddleTransformer(
                size, block_out_channels[-1], width, num_objects, middle_layers, middle_width
            )
        if normalize_attention:
            normalize_queries_and_keys(self)

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
            prediction = self.predict_patches(patches, timesteps, labels)
        return F.pixel_shuffle(prediction, self.config.patch_size)

    def predict_patches(self, patches: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What the UNet predicts for patches [B, C, H, W], its label embedded linearly."""
        unet = self.unet
        label_embedding = self.class_embedding(labels)
        if not self.config.middle_layers:
            return unet(patches, timesteps, class_labels=label_embedding).sample
        # The forward pass of UNet2DModel, with the transformer in the middle.
        embedding = unet.time_embedding(unet.time_proj(timesteps).to(patches.dtype)) + label_embedding
        features = unet.conv_in(patches)
        skips = [features]
        for block in unet.down_blocks:
            features, outputs = block(features, embedding)
            skips.extend(outputs)
        features = unet.mid_block(features, embedding)
        features = self.middle(features, embedding, labels)
        for block in unet.up_blocks:
            first = len(skips) - len(block.resnets)
            features = block(features, tuple(skips[first:]), embedding)
            del skips[first:]
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(features)))
