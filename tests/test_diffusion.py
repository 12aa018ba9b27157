"""From noise to pictures: each sampler takes exactly the steps that it was asked for, guidance does what its
options say, and what is not finite never becomes a picture."""

import pytest
import torch

import diffusion
import evaluator
from checkpoint import load_weights
from conftest import ROOT, SHIPPED
from data.pack import PACK
from dataset import ICLEVRDataset, to_float
from label_files import load_conditions, load_objects
from labels import hard_negatives, labels_with_one_mistake, multi_hot
from model import build
from network import ConditionalUNet
from options import SAMPLERS

OBJECTS = load_objects()
LABELS = multi_hot([["red cube"], ["cyan sphere", "gray cylinder"]], OBJECTS)

# -------------------------------------------------------------------------------------------------- timesteps


def is_grid(timesteps: list[int], steps: int) -> bool:
    """Whether these are so many different timesteps in 0 to 999, descending."""
    in_order = timesteps == sorted(set(timesteps), reverse=True)
    return in_order and len(timesteps) == steps and timesteps[0] <= 999 and timesteps[-1] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_has_as_many_different_timesteps_as_steps(sampler):
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
def test_timesteps_below_any_start_are_as_many_as_steps(start):
    for steps in range(1, 1001):
        timesteps = diffusion.timestep_grid(steps, start)
        assert is_grid(timesteps, steps) and timesteps[0] == max(start, steps) - 1, steps


def kept_in(frames: list) -> diffusion.Callback:
    """A callback that keeps the images of each step."""

    def callback(images: torch.Tensor) -> torch.Tensor:
        frames.append(images)
        return images

    return callback


class KnowingNetwork:
    """A network that knows the picture [3, 8, 8], and so predicts what there is: noise, velocity or the picture.
    It keeps the timesteps that it was asked for."""

    def __init__(self, noise_scheduler, picture: torch.Tensor):
        alpha_bar = noise_scheduler.alphas_cumprod.double().view(-1, 1, 1, 1)
        self.signals = alpha_bar.sqrt()  # [1000, 1, 1, 1], the share of the picture at each timestep
        self.rates = (1 - alpha_bar).sqrt()  # and that of the noise
        self.prediction_type = noise_scheduler.config.prediction_type
        self.picture = picture
        self.asked: list[int] = []

    def __call__(self, images: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.asked.append(timesteps[0].item())
        noise = self.noise_in(images, timesteps)
        if self.prediction_type == "epsilon":
            return noise.float()
        if self.prediction_type == "sample":
            return self.picture.expand_as(images).float()
        return (self.signals[timesteps] * noise - self.rates[timesteps] * self.picture).float()

    def noise_in(self, images: torch.Tensor, timesteps) -> torch.Tensor:
        """The noise [B, 3, 8, 8] in images at these timesteps."""
        return (images.double() - self.signals[timesteps] * self.picture) / self.rates[timesteps]


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_step_goes_to_the_next_timestep_and_the_last_one_to_the_clear_picture(
    sampler, prediction_type, monkeypatch
):
    """As a network shows that knows it.

    An image before a step is then picture and noise in the shares of its timestep, the noise that it started
    with unless the sampler draws more. In float32 a picture is known to 0.007 alone by the noise of timestep
    999, where alpha_bar is 2e-9.
    """
    monkeypatch.setattr(diffusion, "PICTURE", (3, 8, 8))  # which takes a tenth of the time
    noise_scheduler = build("small")[1]
    noise_scheduler.register_to_config(prediction_type=prediction_type)
    picture = torch.linspace(-0.9, 0.9, 3 * 8 * 8).double().view(3, 8, 8)
    tolerance = 1e-2 if prediction_type == "epsilon" else 1e-4

    for steps in (1, 2, 3, 7, 15, 61, 333, 501, 1000):
        network = KnowingNetwork(noise_scheduler, picture)
        frames = []
        diffusion.generate(network, noise_scheduler, LABELS[:1], [5], sampler, steps, 1.0, callback=kept_in(frames))
        assert is_grid(network.asked, steps)
        *before, last = torch.cat(frames).double()
        noises = network.noise_in(torch.stack(before), network.asked)  # [steps, 3, 8, 8]
        if sampler not in diffusion.STOCHASTIC:
            away = (noises - noises[0]) * network.rates[network.asked]
            assert away.abs().max() < tolerance, steps
        assert (noises.std((1, 2, 3)) - 1).abs().max() < 0.35, steps  # of 192 numbers
        assert (last - picture).abs().max() < (tolerance if steps == 1 else 1e-5), steps


PREDICTIONS = ("epsilon", "v_prediction", "sample")


def targets_of(prediction_type: str, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor):
    """The noise scheduler of `small` with another prediction, and what is then to be predicted."""
    noise_scheduler = build("small")[1]
    noise_scheduler.register_to_config(prediction_type=prediction_type)
    return noise_scheduler, diffusion.target_of(noise_scheduler, clean, noise, timesteps)


def test_guidance_by_the_evaluator_moves_the_picture_alike_whatever_is_predicted():
    judge = evaluator.evaluation_model(ROOT / "weights" / "evaluator.pth", "cpu").resnet18
    clean, noise = torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    t = torch.tensor(400)
    moved = []
    for prediction_type in PREDICTIONS:
        noise_scheduler, target = targets_of(prediction_type, clean, noise, t[None])
        noisy = noise_scheduler.add_noise(clean, noise, t[None])
        gradient = diffusion.evaluator_gradient(judge, noise_scheduler, noisy, target, t, LABELS[:1])
        guided = target - gradient
        signal = noise_scheduler.alphas_cumprod[t].sqrt()
        rate = (1 - noise_scheduler.alphas_cumprod[t]).sqrt()
        pictures = {
            "epsilon": (noisy - rate * guided) / signal,
            "v_prediction": signal * noisy - rate * guided,
            "sample": guided,
        }
        moved.append(pictures[prediction_type] - clean)
    assert moved[0].abs().max() > 1e-4
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], rtol=0.02, atol=2e-5)


@pytest.mark.slow
def test_ddim_paints_with_61_steps_what_it_paints_with_20():
    model, noise_scheduler, _ = load_weights(SHIPPED)
    model.eval()
    few = diffusion.generate(model, noise_scheduler, LABELS[:1], [5], "ddim", 20, 1.0)
    many = diffusion.generate(model, noise_scheduler, LABELS[:1], [5], "ddim", 61, 1.0)
    assert (few - many).abs().mean() < 0.02  # it painted noise: 0.35


@pytest.mark.slow
def test_more_steps_of_ddim_are_no_worse():
    """Noise and picture of a step have to belong together, also where guidance makes it clamp a lot."""
    model, noise_scheduler, metadata = load_weights(SHIPPED)
    labels = multi_hot(load_conditions(ROOT / "validation.json", OBJECTS)[-4:], OBJECTS)
    options = {"sampler": "ddim", "guidance_scale": metadata["sampling"]["guidance_scale"]}
    seeds = list(range(4))
    model.eval()
    few = diffusion.generate(model, noise_scheduler, labels, seeds, **{**options, "steps": 10})
    many = diffusion.generate(model, noise_scheduler, labels, seeds, **{**options, "steps": 40})
    judge = evaluator.evaluation_model(ROOT / "weights" / "evaluator.pth", "cpu")
    assert judge.eval(many, labels) >= judge.eval(few, labels) - 0.1  # it fell from 0.92 to 0.71
    assert (few - many).abs().mean() < 0.015  # the same pictures, nearly; it was 0.023


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_stays_in_range_and_repeats_itself(sampler):
    model, noise_scheduler, _ = load_weights(SHIPPED)
    model.eval()
    first = diffusion.generate(model, noise_scheduler, LABELS, [5, 6], sampler, 8, 2.0)
    second = diffusion.generate(model, noise_scheduler, LABELS, [5, 6], sampler, 8, 2.0)
    assert torch.equal(first, second) and first.abs().max() <= 1
    assert first.std() > 0.05


# --------------------------------------------------------------------------------------------------- guidance


def noting(model, passes: list[tuple[int, int]]):
    """A network as the model, which notes the timestep and the number of images of each pass."""

    def network(images, timesteps, labels):
        passes.append((int(timesteps[0]), len(images)))
        return model(images, timesteps, labels)

    return network


@pytest.mark.slow
def test_there_is_no_guidance_outside_of_its_interval():
    model, noise_scheduler, _ = load_weights(SHIPPED)
    labels = multi_hot([["red cube"]], OBJECTS)
    passes = []

    def paint(*guidance):
        network = noting(model, passes)
        return diffusion.generate(network, noise_scheduler, labels, [5], "ddim", 8, *guidance)

    none = paint(1.0)
    always = paint(3.0)
    assert torch.equal(paint(3.0, (2, 3)), none)
    assert torch.equal(paint(3.0, (0, 1000)), always) and not torch.equal(none, always)
    passes.clear()
    paint(3.0, (200, 700))
    assert [count for t, count in passes] == [2 if 200 <= t <= 700 else 1 for t, _ in passes]
    assert {count for _, count in passes} == {1, 2}


@pytest.mark.slow
def test_hard_negatives_change_only_pictures_with_two_objects_of_a_colour():
    model, noise_scheduler, _ = load_weights(SHIPPED)
    conditions = [["red cube", "blue sphere"], ["red cube", "red sphere"]]
    labels = multi_hot(conditions, OBJECTS)
    negatives = [hard_negatives(condition, OBJECTS) for condition in conditions]
    passes = []

    def paint(*some):
        common = (labels, [5, 6], "ddim", 8, 2.0, (0, 1000), negatives)
        return diffusion.generate(noting(model, passes), noise_scheduler, *common, *some)

    plain = paint()
    pushed = paint(4.0, (300, 800))
    assert torch.equal(plain, paint(4.0, (2, 3)))
    torch.testing.assert_close(plain[0], pushed[0], atol=1e-3, rtol=0)
    assert (plain[1] - pushed[1]).abs().max() > 0.1

    passes.clear()
    paint(4.0, (300, 800))
    guided = [t for t, count in passes if count == 4]
    expected = []
    for t in guided:
        expected.append((t, 4))
        if 300 <= t <= 800:
            expected.append((t, 2))
    assert passes == expected


def test_of_several_hard_negatives_only_the_nearest_counts():
    noise_scheduler = build("small")[1]
    labels = torch.zeros(1, 24)
    near = torch.full((1, 24), 0.01)
    far = torch.full((1, 24), 0.02)

    def network(images, timesteps, labels):
        return labels.sum(1).view(-1, 1, 1, 1) + images  # the further the label, the further the prediction

    def paint(*negatives):
        options = {"negative_labels": [torch.cat(negatives)], "negative_scale": 2.0}
        return diffusion.generate(network, noise_scheduler, labels, [5], "ddim", 4, 1.0, **options)

    assert torch.equal(paint(near), paint(far, near)) and not torch.equal(paint(near), paint(far))


# -------------------------------------------------------------------------------------------------- reranking


def test_the_lift_over_no_label_is_the_difference_of_two_errors():
    """Of a network that predicts a clean picture of 0.5 for a label of one object, and of 0 for none."""
    noise_scheduler = build("small", prediction_type="sample", beta_schedule="squaredcos_cap_v2")[1]
    values = torch.tensor([0.5, -0.5])
    images = values.view(2, 1, 1, 1).expand(2, *diffusion.PICTURE)

    def network(images, timesteps, labels):
        return 0.5 * labels.sum(1).view(-1, 1, 1, 1).expand_as(images)

    labels = multi_hot([["red cube"], ["blue sphere"]], OBJECTS)
    nothing = [torch.zeros(1, 24)] * 2
    ratios = diffusion.likelihood_ratio(network, noise_scheduler, images, labels, nothing)
    torch.testing.assert_close(ratios, values**2 - (values - 0.5) ** 2)

    def student(images, timesteps, labels):  # has learned to predict with guidance 3 on timesteps 500 to 1000
        guidance = torch.where(timesteps >= 500, 3, 1).view(-1, 1, 1, 1)
        return guidance * network(images, timesteps, labels)

    arguments = (student, noise_scheduler, images, labels, nothing)
    again = diffusion.likelihood_ratio(*arguments, learned_scale=3.0, learned_interval=(500, 1000))
    torch.testing.assert_close(again, ratios)
    assert not torch.allclose(diffusion.likelihood_ratio(*arguments), ratios)


@pytest.mark.slow
def test_the_likelihood_ratio_tells_right_labels_from_mistaken_ones():
    """On training pictures; also with a mistake for the label and the label for a mistake."""
    model, noise_scheduler, _ = load_weights(SHIPPED)
    model.eval()
    data = ICLEVRDataset(PACK, ROOT / "train.json", OBJECTS)
    images = to_float(data.images[:9])
    labels = data.labels[:9]
    mistakes = [labels_with_one_mistake(condition, OBJECTS) for condition in data.conditions[:9]]
    ratios = diffusion.likelihood_ratio(model, noise_scheduler, images, labels, mistakes)
    assert (ratios > 0).float().mean() >= 0.9

    first = torch.stack([mistake[0] for mistake in mistakes])
    swapped = diffusion.likelihood_ratio(model, noise_scheduler, images, first, list(labels.split(1)))
    assert (swapped < 0).float().mean() >= 0.9


# ----------------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("weight", [0.1, 1e38])
def test_weights_that_are_too_large_are_told(weight):
    blocks = {"down_block_types": ("DownBlock2D",) * 2}
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
def test_a_single_number_that_is_not_finite_is_told(sampler, value):
    """With the first step that had one, and no clear picture is given to the callback."""
    asked = []
    frames = []

    def network(images, timesteps, labels):
        asked.append(timesteps[0].item())
        prediction = torch.zeros_like(images)
        prediction[-1, 0, 5, 5] = value if len(asked) == 3 else 0
        return prediction

    arguments = (network, build("small")[1], LABELS, [5, 6], sampler, 15, 1.0)
    with pytest.raises(FloatingPointError) as caught:
        diffusion.generate(*arguments, callback=kept_in(frames))
    assert str(caught.value) == f"prediction not finite in step 3 of 15 (timestep {asked[2]})"
    assert len(frames) == len(asked) == 15


def test_a_picture_that_is_not_finite_is_told():
    images = torch.full((1, 3, 64, 64), torch.inf)
    with pytest.raises(FloatingPointError, match="^picture not finite after 2 steps$"):
        diffusion.check_finite([torch.zeros(()), torch.zeros(())], images, [999, 499])
