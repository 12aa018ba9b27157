"""The network, its presets and its way to disk and back."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import load_weights, write_weights
from conftest import METADATA
from infra.device import new_accelerator
from model import build
from network import ConditionalUNet
from options import PRESETS


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [B, 3, 64, 64], timesteps [B], labels [B, 24]."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(batch, 24, generator=generator) < 0.1).float()
    return torch.randn(batch, 3, 64, 64, generator=generator), torch.tensor([3, 970][:batch]), labels


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "tiny-attention", "tiny-mixed"])
def test_a_network_predicts_bit_for_bit_the_same_after_its_way_to_disk_and_back(tmp_path, preset):
    torch.manual_seed(1)
    model, noise_scheduler = build(preset)
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        expected = model.eval()(*inputs())
        assert expected.shape == (2, 3, 64, 64)
        assert torch.equal(ConditionalUNet.from_pretrained(tmp_path / "a").eval()(*inputs()), expected)
        write_weights(tmp_path / "b", model, noise_scheduler, METADATA)
        loaded, scheduler, metadata = load_weights(tmp_path / "b")
        assert torch.equal(loaded.eval()(*inputs()), expected)
    assert scheduler.config.prediction_type == noise_scheduler.config.prediction_type
    assert metadata == METADATA


CONDITIONINGS = {  # ways in which the label enters: options of the network
    "linear": {"conditioning": "linear", "middle_layers": 0},
    "tokens": {"conditioning": "tokens", "middle_layers": 0},
    "middle": {"conditioning": "linear", "middle_layers": 2, "normalize_attention": True},
}


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_each_object_changes_the_prediction_and_is_trained(conditioning, tmp_path):
    torch.manual_seed(1)
    model = ConditionalUNet(**PRESETS["small"]["network"] | CONDITIONINGS[conditioning])
    images, timesteps, labels = inputs()
    labels[1] = 0  # no label
    model(images, timesteps, labels).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        expected = model(images, timesteps, labels)
        for i in range(24):
            changed = labels.clone()
            changed[:, i] = 1 - labels[:, i]
            differences = (model(images, timesteps, changed) - expected).abs().amax((1, 2, 3))
            assert (differences > 1e-5).all(), i
        # A picture's label says nothing to the other pictures of a batch.
        alone = model(images[:1], timesteps[:1], labels[:1])
        torch.testing.assert_close(alone, expected[:1], rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = ConditionalUNet.from_pretrained(tmp_path)(images, timesteps, labels)
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_a_new_transformer_in_the_middle_changes_nothing_until_it_is_trained():
    torch.manual_seed(1)
    without = ConditionalUNet(**PRESETS["small"]["network"] | {"middle_layers": 0})
    with_one = ConditionalUNet(**PRESETS["small"]["network"] | {"middle_layers": 2})
    added = with_one.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert added and all(name.startswith("middle.") for name in added)
    assert torch.equal(with_one(*inputs()), without(*inputs()))
    with_one(*inputs()).square().mean().backward()
    assert with_one.middle.project_out.weight.grad.any()


def test_normalized_attention_does_not_depend_on_the_size_of_queries_keys_or_features():
    """Without it the middle's attention has logits of millions after long training, and learns no more."""
    torch.manual_seed(1)
    network = PRESETS["small"]["network"] | {"normalize_attention": True, "middle_layers": 1}
    model = ConditionalUNet(**network).eval()
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    with torch.no_grad():
        torch.nn.init.normal_(model.middle.project_out.weight)  # so that what it adds is seen
        expected = model(*inputs())
        for attention in attentions:
            for layer in (attention.to_q, attention.to_k):
                layer.weight.mul_(1000)
                if layer.bias is not None:
                    layer.bias.mul_(1000)
        torch.testing.assert_close(model(*inputs()), expected, rtol=0, atol=1e-4)
    [middle] = model.unet.mid_block.attentions
    features = torch.randn(1, 128, 8, 8)
    once, often = (middle(scale * features) - scale * features for scale in (1, 1000))
    torch.testing.assert_close(once, often, rtol=0, atol=1e-2)


def test_a_conditioning_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="no conditioning words"):
        ConditionalUNet(conditioning="words")
    with pytest.raises(ValueError, match="no middle transformer"):
        ConditionalUNet(conditioning="tokens", middle_layers=2)


def test_the_reference_preset_is_the_network_and_recipe_of_the_report():
    model, noise_scheduler = build("reference")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 113.7
    assert (model.class_embedding.in_features, model.class_embedding.out_features) == (24, 512)
    blocks = [type(b).__name__ for b in [*model.unet.down_blocks, *model.unet.up_blocks]]
    assert [i for i, b in enumerate(blocks) if b.startswith("Attn")] == [4, 7]  # 5th of 6 down, 2nd of 6 up
    assert noise_scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert noise_scheduler.config.prediction_type == "epsilon"
    recipe = PRESETS["reference"]["training"]
    assert (recipe["batch_size"], recipe["learning_rate"], recipe["epochs"]) == (32, 1e-4, 40)
    assert PRESETS["reference"]["sampling"] == {"sampler": "ddpm", "steps": 1000, "guidance_scale": 1.0}


def test_the_small_preset_is_small():
    model, _ = build("small")
    assert sum(p.numel() for p in model.parameters()) < 10e6
    with FlopCounterMode(display=False) as counter:
        model(*inputs(1))
    assert 0.7e9 < counter.get_total_flops() < 2.6e9


def gradients_of(output: torch.Tensor, network: torch.nn.Module) -> list[torch.Tensor]:
    """Of all weights, for the mean square of what the network predicted."""
    network.zero_grad()
    output.square().mean().backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "conditioning"), [("reference", "linear"), ("small", "linear"), ("small", "tokens"), ("small", "middle")]
)
def test_the_network_compiles_into_one_graph(preset, conditioning):
    """Prepared by accelerate as train.py does it; a break in the graph would raise."""
    blocks = build(preset)[0].config.block_out_channels
    small = {"block_out_channels": [32] * len(blocks), "layers_per_block": 1}
    network = ConditionalUNet(**PRESETS[preset]["network"] | small | CONDITIONINGS[conditioning]).train()
    prepared = new_accelerator(mixed_precision="no").prepare_model(network)
    compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True, dynamic=False)
    images, timesteps, labels = inputs()
    expected = prepared(images, timesteps, labels)
    got = compiled(images, timesteps, labels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    expected_gradients = gradients_of(expected, network)
    gradients = gradients_of(got, network)
    torch.testing.assert_close(expected_gradients, gradients, rtol=1e-3, atol=1e-6)
