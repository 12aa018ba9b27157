"""The sampling loop: each sampler takes exactly the steps that it was asked for, and what is not finite never
becomes a picture."""

import pytest
import torch
from conftest import ROOT

import diffusion
from checkpoint import load_weights
from labels import load_objects, multi_hot
from model import ConditionalUNet, build
from options import SAMPLERS

LABELS = multi_hot([["red cube"], ["cyan sphere", "gray cylinder"]], load_objects())


def is_grid(timesteps: list[int], steps: int) -> bool:
    """Whether these are so many different timesteps in 0 to 999, descending."""
    in_order = timesteps == sorted(set(timesteps), reverse=True)
    return in_order and len(timesteps) == steps and timesteps[0] <= 999 and timesteps[-1] >= 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_as_many_different_timesteps_as_steps(sampler):
    """Diffusers makes one of -1 for 62 of the counts, and fewer than asked for where it clips the start."""
    scheduler_class, options = diffusion.SCHEDULERS[sampler]
    scheduler = scheduler_class.from_config(build("small")[1].config, **options)
    wrong = []
    for steps in range(1, 1001):
        diffusion.set_steps(scheduler, steps)
        timesteps = scheduler.timesteps.tolist()
        if not is_grid(timesteps, steps):
            wrong.append(steps)
        if sampler != "ddpm":  # these step from one sigma to the next
            alpha_bar = scheduler.alphas_cumprod[timesteps]
            sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
            assert torch.equal(scheduler.sigmas, torch.cat([sigmas, torch.zeros(1)])), steps
    assert wrong == []


@pytest.mark.parametrize("start", [1, 500, 973, 996, 1000])
def test_grids_below_any_start(start):
    for steps in range(1, 1001):
        timesteps = diffusion.timestep_grid(steps, start)
        assert is_grid(timesteps, steps) and timesteps[0] == max(start, steps) - 1, steps


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_step_goes_to_the_next_timestep(sampler, prediction_type, monkeypatch):
    """And the last one to the clear picture, as a network shows that knows it.

    An image before a step is then picture and noise in the shares of its timestep, the noise that it started
    with unless the sampler draws more. In float32 a picture is known to 0.007 alone by the noise of timestep
    999, where alpha_bar is 2e-9.
    """
    monkeypatch.setattr(diffusion, "IMAGE_SIZE", 8)  # which takes a tenth of the time
    noise_scheduler = build("small")[1]
    noise_scheduler.register_to_config(prediction_type=prediction_type)
    alpha_bar = noise_scheduler.alphas_cumprod.double().view(-1, 1, 1, 1)
    signals, rates = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    picture = torch.linspace(-0.9, 0.9, 3 * 8 * 8).double().view(3, 8, 8)

    def network(images, timesteps, labels):
        asked.append(timesteps[0].item())
        signal, rate = signals[timesteps], rates[timesteps]
        noise = (images.double() - signal * picture) / rate
        target = noise if prediction_type == "epsilon" else signal * noise - rate * picture
        return target.float()

    for steps in (1, 2, 3, 7, 15, 61, 333, 501, 1000):
        asked, frames = [], []
        diffusion.generate(
            network, noise_scheduler, LABELS[:1], [5], sampler, steps, 1.0, callback=frames.append
        )
        assert is_grid(asked, steps)
        *before, last = torch.cat(frames).double()
        noises = (torch.stack(before) - signals[asked] * picture) / rates[asked]  # [steps, 3, 8, 8]
        tolerance = 1e-2 if prediction_type == "epsilon" else 1e-4
        if sampler not in diffusion.STOCHASTIC:
            away = (noises - noises[0]) * rates[asked]
            assert away.abs().max() < tolerance, steps
        assert (noises.std((1, 2, 3)) - 1).abs().max() < 0.35, steps  # of 192 numbers
        assert (last - picture).abs().max() < (tolerance if steps == 1 else 1e-5), steps


def test_ddim_paints_with_61_steps_what_it_paints_with_20():
    model, noise_scheduler, _ = load_weights(ROOT / "weights" / "small")
    few, many = (
        diffusion.generate(model.eval(), noise_scheduler, LABELS[:1], [5], "ddim", steps, 1.0)
        for steps in (20, 61)
    )
    assert (few - many).abs().mean() < 0.02  # it painted noise: 0.35


@pytest.mark.parametrize("weight", [0.1, 1e38])
def test_weights_that_are_too_large_are_told(weight):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = ConditionalUNet(block_out_channels=(32, 32), layers_per_block=1, patch_size=4, **blocks).eval()
    torch.nn.init.constant_(model.class_embedding.weight, weight)
    arguments = (model, build("small")[1], LABELS, [5, 6], "ddim", 4, 2.0)
    if weight == 0.1:
        assert diffusion.generate(*arguments).isfinite().all()
        return
    with pytest.raises(FloatingPointError, match=r"^prediction not finite in step 1 of 4 \(timestep 999\)$"):
        diffusion.generate(*arguments)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_number_that_is_not_finite_is_told(sampler, value):
    """With the first step that had one, and no clear picture is given to the callback."""
    asked, frames = [], []

    def network(images, timesteps, labels):
        asked.append(timesteps[0].item())
        prediction = torch.zeros_like(images)
        prediction[-1, 0, 5, 5] = value if len(asked) == 3 else 0
        return prediction

    arguments = (network, build("small")[1], LABELS, [5, 6], sampler, 15, 1.0)
    with pytest.raises(FloatingPointError) as caught:
        diffusion.generate(*arguments, callback=frames.append)
    assert str(caught.value) == f"prediction not finite in step 3 of 15 (timestep {asked[2]})"
    assert len(frames) == len(asked) == 15


def test_a_picture_that_is_not_finite_is_told():
    images = torch.full((1, 3, 64, 64), torch.inf)
    with pytest.raises(FloatingPointError, match="^picture not finite after 2 steps$"):
        diffusion.check_finite([torch.zeros(()), torch.zeros(())], images, [999, 499])
