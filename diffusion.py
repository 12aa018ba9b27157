"""Diffusion: noise onto pictures in training, pictures out of noise in sampling.

The sampler has classifier-free guidance, negative prompting and, for comparison, classifier guidance by the
evaluator. `likelihood_ratio` says how well a picture fits its label by the network's own error.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional as F

PICTURE = (3, 64, 64)  # shape of a picture

# `from_config` does not carry `clip_sample` to the others: thresholding at 1 clamps x_0 just so.
_CLAMP = {"thresholding": True, "sample_max_value": 1.0}
# Steps from noisier timesteps than that, where alpha_bar is nearly 0, are left out as in diffusers.
_DPM = _CLAMP | {"lambda_min_clipped": -5.1}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {  # of options.SAMPLERS
    "ddpm": (DDPMScheduler, {}),  # arXiv 2006.11239
    # arXiv 2010.02502 with eta 0, which is DPM-Solver++ of order 1 (arXiv 2211.01095). DDIMScheduler itself
    # goes to `t - 1000 // steps`, which is the next timestep only where `steps` divides 1000.
    "ddim": (DPMSolverMultistepScheduler, _CLAMP | {"solver_order": 1}),
    "dpmsolver++": (DPMSolverMultistepScheduler, _DPM),  # arXiv 2211.01095
    "sde-dpmsolver++": (DPMSolverMultistepScheduler, _DPM | {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, _CLAMP),  # arXiv 2302.04867
}
STOCHASTIC = ("ddpm", "sde-dpmsolver++")  # these draw noise on their way; from their mistakes they recover
# images [B, 3, 64, 64], timesteps [B], labels [B, 24] -> prediction [B, 3, 64, 64]
Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Interval = tuple[float, float]  # of timesteps, from clear to noise
Callback = Callable[[torch.Tensor], torch.Tensor]  # images [B, 3, 64, 64] on their way


def keep(images: torch.Tensor) -> torch.Tensor:
    """The callback that changes nothing."""
    return images


# --------------------------------------------------------------------------------------- noise onto pictures


def target_of(
    noise_scheduler: DDPMScheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network is to predict [B, 3, 64, 64] for `clean` pictures with `noise` at `timesteps` [B]: the
    noise (arXiv 2006.11239, equation 14), the velocity (arXiv 2202.00512, appendix D) or the clean pictures."""
    # sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) clean: also at the noisiest timesteps a task worth learning
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(clean, noise, timesteps)
    if noise_scheduler.config.prediction_type == "sample":
        return clean
    return noise


# ------------------------------------------------------------------------------------------- steps and seeds


def picture_seed(seed: int, index: int, candidate: int = 0) -> int:
    """The seed of picture `index` of a run with `seed`, and of its other candidates."""
    return int(np.random.SeedSequence([seed, index, candidate]).generate_state(1, np.uint64)[0]) >> 1


def timestep_grid(steps: int, start: int = 1000) -> list[int]:
    """The timesteps of so many steps, 1 to 1000: all different, descending, in 0 to 999.

    Trailing (arXiv 2305.08891): the first is `start` - 1, and they lie 1000 / steps apart, rounded as in
    diffusers. If so many do not fit below a lower `start`, they lie closer together. If they do not fit
    even then, the first is `steps` - 1.
    """
    grid = np.arange(start, 0, -1000 / steps).round()[:steps]  # by rounding, arange may give one too many
    # Rounded to the same timestep, or below the last: fewer than asked for would be left.
    if len(grid) < steps or grid[-1] < 1:
        start = max(start, steps)
        grid = np.arange(start, 0, -start / steps).round()[:steps]
    return [int(t) - 1 for t in grid]


def set_steps(scheduler, steps: int):
    """Set a scheduler, one of `SCHEDULERS`, to so many steps, 1 to 1000, at the timesteps of `timestep_grid`.

    Each step then goes to the next timestep of the grid, and the last one to the clear picture. The grid is
    trailing, whatever `timestep_spacing` the scheduler was made with.
    """
    start = 1000
    if "lambda_min_clipped" in scheduler.config:  # diffusers leaves out noisier ones, but not of a given list
        start = int((scheduler.lambda_t >= scheduler.config.lambda_min_clipped).sum())
    timesteps = timestep_grid(steps, start)  # kept on the CPU: a step then waits for nothing on a GPU
    if isinstance(scheduler, UniPCMultistepScheduler):  # takes no list: it is given what others make of one
        scheduler.set_timesteps(steps)
        # sigma is the noise by the signal; UniPC interpolates between these.
        alpha_bar = scheduler.alphas_cumprod[timesteps]
        sigmas = ((1 - alpha_bar) / alpha_bar) ** 0.5
        scheduler.timesteps = torch.tensor(timesteps)
        scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)])  # the last is that of the clear picture
    else:
        scheduler.set_timesteps(timesteps=timesteps)


def make_scheduler(noise_scheduler: DDPMScheduler, sampler: str, steps: int):
    """A scheduler of `SCHEDULERS` with the noise of `noise_scheduler`, set to so many steps, 1 to 1000."""
    scheduler_class, options = SCHEDULERS[sampler]
    scheduler = scheduler_class.from_config(noise_scheduler.config, **options)
    set_steps(scheduler, steps)
    return scheduler


def initial_noise(seeds: list[int], device: torch.device) -> torch.Tensor:
    """Noise [B, 3, 64, 64], a seed for each picture: drawn on the CPU, so it is the same on any device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return randn_tensor((len(seeds), *PICTURE), generator=generators).to(device)


# -------------------------------------------------------------------------------------------------- guidance


def is_within(interval: Interval, timesteps: torch.Tensor) -> torch.Tensor:
    """Whether timesteps, of any shape, lie in an interval, bounds included."""
    return (interval[0] <= timesteps) & (timesteps <= interval[1])


def predict(
    model: Network, images: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor, size: int
) -> torch.Tensor:
    """What the network predicts [B, 3, 64, 64], `size` at a time: B may be many times what a device likes."""
    predictions = torch.empty_like(images)
    for start in range(0, len(images), size):  # copied at once: a CUDA graph writes to the same place again
        part = slice(start, start + size)
        predictions[part] = model(images[part], timesteps[part], labels[part])
    return predictions


class Negatives:
    """The hard negatives of a batch of B pictures, K in all: for each picture those [k, 24] of `label_lists`,
    k >= 0, of what it might become by mistake."""

    def __init__(self, label_lists: Sequence[torch.Tensor], device: torch.device):
        # Pictures have different numbers of hard negatives, so all of them stand in one list with their owners.
        pairs = [(i, label) for i, own in enumerate(label_lists) for label in own]
        if device.type == "cuda":
            # A compiled network wants few sizes of batches: the first pair fills up to a multiple of B.
            pairs += pairs[:1] * (-len(pairs) % len(label_lists))
        labels = [label for _, label in pairs]
        owners = [i for i, _ in pairs]
        self.labels = torch.stack(labels).to(device) if labels else torch.zeros(0, 0, device=device)
        self.owners = torch.tensor(owners, dtype=torch.long, device=device)  # [K], the picture of each
        self.is_own = self.owners == torch.arange(len(label_lists), device=device)[:, None]  # [B, K]

    def __len__(self) -> int:
        return len(self.owners)

    def away(self, conditional: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """The direction [B, 3, 64, 64] away from the hard negative whose prediction, of `negative`
        [K, 3, 64, 64], lies nearest to the `conditional` one [B, 3, 64, 64]: the mistake that the picture is
        about to make. Zeros for a picture without any."""
        # All K are compared with the prediction of their own picture, then each picture takes its nearest.
        distances = (negative - conditional[self.owners]).square().mean((1, 2, 3))  # [K]
        nearest = torch.where(self.is_own, distances, torch.inf).argmin(1)  # [B]
        # A picture without hard negatives took some other picture's above: that counts nothing.
        has_any = self.is_own.any(1)[:, None, None, None]
        return (conditional - negative[nearest]) * has_any


def predict_together(
    model: Network,
    images: torch.Tensor,
    timesteps: torch.Tensor,
    labels: torch.Tensor,
    with_unconditional: bool,
    negatives: Negatives | None,
) -> list[torch.Tensor]:
    """The predictions for images [B, 3, 64, 64] at timesteps [B] given their labels [B, 24], then if asked
    for those given no label, then those given the hard negatives [K, 3, 64, 64]: in one pass."""
    everyone = torch.arange(len(images), device=images.device)
    rows = [everyone]  # of the image that each prediction is for
    parts = [labels]
    if with_unconditional:
        rows.append(everyone)
        parts.append(torch.zeros_like(labels))  # as label dropout has shown them in training
    if negatives:
        rows.append(negatives.owners)
        parts.append(negatives.labels)
    all_rows = torch.cat(rows)
    # At most twice the batch at a time: guidance alone then takes one pass, and so it is compiled.
    predictions = predict(model, images[all_rows], timesteps[all_rows], torch.cat(parts), 2 * len(images))
    return list(predictions.split([len(part) for part in parts]))


@torch.no_grad()
def guided_prediction(
    teacher: Network,
    images: torch.Tensor,
    timesteps: torch.Tensor,
    labels: torch.Tensor,
    negatives: Negatives,
    guidance_scale: float,
    guidance_interval: Interval = (0, 1000),
    negative_scale: float = 0.0,
    negative_interval: Interval = (0, 1000),
) -> torch.Tensor:
    """What a guided `teacher` predicts [B, 3, 64, 64] for images, each at a timestep of its own [B]: what the
    student of guidance distillation (arXiv 2210.03142, section 3.1) learns to predict in one pass.

    As in `generate`, with the same options. Labels [B, 24] of zeros are not guided.
    """
    predictions = predict_together(teacher, images, timesteps, labels, True, negatives if len(negatives) else None)
    conditional = predictions[0]
    unconditional = predictions[1]

    def scales(scale: float, interval: Interval, otherwise: float) -> torch.Tensor:
        is_changed = is_within(interval, timesteps) & labels.any(1)
        return torch.where(is_changed, scale, otherwise)[:, None, None, None]

    guidance = scales(guidance_scale, guidance_interval, 1.0)
    prediction = unconditional + guidance * (conditional - unconditional)
    if len(negatives):
        away = negatives.away(conditional, predictions[2])
        prediction = prediction + scales(negative_scale, negative_interval, 0.0) * away
    return prediction


@torch.enable_grad()
def evaluator_gradient(
    evaluator: torch.nn.Module,
    noise_scheduler: DDPMScheduler,
    images: torch.Tensor,
    prediction: torch.Tensor,
    timestep: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """What classifier guidance (arXiv 2105.05233, algorithm 2) subtracts from `prediction` [B, 3, 64, 64].

    As the evaluator knows no noise, it judges the estimate of the clean picture (arXiv 2302.07121), whose
    derivative by the noisy one is taken to be sqrt(alpha_bar), so that the network need not be gone back
    through: epsilon - s sqrt(1 - alpha_bar) sqrt(alpha_bar) gradient, v - s sqrt(1 - alpha_bar) gradient, or
    x_0 + s (1 - alpha_bar) gradient.
    """
    alpha_bar = noise_scheduler.alphas_cumprod[timestep]
    signal = alpha_bar.sqrt().item()
    noise = (1 - alpha_bar).sqrt().item()
    # The clean picture that a noisy one with this prediction stands for, and what its gradient is times.
    if noise_scheduler.config.prediction_type == "v_prediction":
        clean = signal * images - noise * prediction
        factor = noise
    elif noise_scheduler.config.prediction_type == "sample":
        clean = prediction
        factor = -(noise**2)
    else:
        clean = (images - noise * prediction) / signal
        factor = noise * signal
    clean = clean.clamp(-1, 1).detach().requires_grad_()
    log_likelihood = -F.binary_cross_entropy(evaluator(clean), labels, reduction="sum")
    return factor * torch.autograd.grad(log_likelihood, clean)[0]


# -------------------------------------------------------------------------------------------------- sampling


def check_finite(sums: list[torch.Tensor], images: torch.Tensor, timesteps: list[int]):
    """Raise FloatingPointError unless the sums [] of the predictions, one a timestep, and images are finite.

    A sum is not finite if a number in it is not. The device is waited for once.
    """
    finite = torch.stack([*sums, images.sum()]).isfinite().cpu().tolist()
    for step, timestep in enumerate(timesteps):
        if not finite[step]:
            where = f"step {step + 1} of {len(timesteps)} (timestep {timestep})"
            raise FloatingPointError(f"prediction not finite in {where}")
    if not finite[-1]:
        raise FloatingPointError(f"picture not finite after {len(timesteps)} steps")


@torch.no_grad()
def generate(
    model: Network,
    noise_scheduler: DDPMScheduler,
    labels: torch.Tensor,
    seeds: list[int],
    sampler: str,
    steps: int,
    guidance_scale: float,
    guidance_interval: Interval = (0, 1000),
    negative_labels: Sequence[torch.Tensor] = (),
    negative_scale: float = 0.0,
    negative_interval: Interval = (0, 1000),
    evaluator: torch.nn.Module | None = None,
    evaluator_scale: float = 0.0,
    callback: Callback = keep,
) -> torch.Tensor:
    """Samples [B, 3, 64, 64] in [-1, 1] for multi-hot labels [B, 24], on the device of `labels`.

    Each picture draws its noise from its own seed, so it does not depend on its neighbours in the batch.
    `guidance_scale` w: unconditional + w (conditional - unconditional) prediction (arXiv 2207.12598), at
    timesteps within `guidance_interval`, bounds included (arXiv 2404.07724); outside of it and for w 1 the
    unconditional one is not computed. `negative_labels`: for each picture its hard negatives [K, 24], K >= 0.
    Within `negative_interval`, `negative_scale` (conditional - nearest negative) is added. `evaluator`, for
    `evaluator_scale` above 0: images -> probabilities [B, 24]; see `evaluator_gradient`. `callback` is given
    the images before each step, and the clear ones at the end; those that it returns go on.

    Raises FloatingPointError if a prediction or a picture is not finite: clamped, it would be a picture.
    """
    scheduler = make_scheduler(noise_scheduler, sampler, steps)
    images = initial_noise(seeds, labels.device)
    step_options = {}
    if sampler in STOCHASTIC:  # noise of its own for each picture here too
        step_options["generator"] = [torch.Generator(labels.device).manual_seed(seed + 1) for seed in seeds]
    negatives = Negatives(negative_labels, labels.device)
    sums = []  # of each prediction: looked at once at the end, since to look is to wait for the device
    for t in scheduler.timesteps:
        images = callback(images)
        is_guided = guidance_scale != 1 and bool(is_within(guidance_interval, t))
        is_negated = negative_scale > 0 and len(negatives) > 0 and bool(is_within(negative_interval, t))
        inputs = scheduler.scale_model_input(images, t)
        timesteps = torch.full((len(images),), t.item(), device=images.device)
        predictions = predict_together(model, inputs, timesteps, labels, is_guided, negatives if is_negated else None)
        conditional = predictions[0]
        prediction = conditional
        # Classifier-free guidance: further in the direction in which the label changes the prediction.
        if is_guided:
            unconditional = predictions[1]
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        # Negative prompting: away from the mistake that the picture is about to make.
        if is_negated:
            prediction = prediction + negative_scale * negatives.away(conditional, predictions[-1])
        if evaluator is not None and evaluator_scale > 0:
            gradient = evaluator_gradient(evaluator, noise_scheduler, images, prediction, t, labels)
            prediction = prediction - evaluator_scale * gradient
        # diffusers clamps the clean picture it computes, which would hide a NaN: so the sum is kept.
        sums.append(prediction.sum())
        images = scheduler.step(prediction, t, images, **step_options).prev_sample
    check_finite(sums, images, scheduler.timesteps.tolist())
    return callback(images.clamp(-1, 1))


# --------------------------------------------------------------------------------------- best-of-N reranking

RATIO_TIMESTEPS = (400, 400, 600, 600)  # at which the denoising error is measured, each with a noise of its own


@torch.no_grad()
def likelihood_ratio(
    model: Network,
    noise_scheduler: DDPMScheduler,
    images: torch.Tensor,
    labels: torch.Tensor,
    other_labels: Sequence[torch.Tensor],
    learned_scale: float = 1.0,
    learned_interval: Interval = (0, 1000),
    ratio_timesteps: Sequence[int] = RATIO_TIMESTEPS,
) -> torch.Tensor:
    """How much better images [B, 3, 64, 64] in [-1, 1] fit their labels [B, 24] than any other label: [B].

    The denoising error given a label bounds the negative log likelihood of a picture given that label. The
    result is the least error among the other labels of a picture, [K, 24] with K > 0, minus the error of its
    own label: a log likelihood ratio but for a factor. Above 0 the picture shows what it should. With zeros
    for other label it is the lift of CompLift (arXiv 2505.13740). An error is the mean over `ratio_timesteps`, each
    with a draw of noise. All pictures get the same noise, so that candidates may be compared.

    What a student of guidance distillation predicts is guided, so its error bounds no likelihood. `learned_scale`
    and `learned_interval`: the guidance that it learned, which is taken back. Negative prompting is not.
    """
    device = images.device
    generator = torch.Generator().manual_seed(0)
    everyone = torch.arange(len(images), device=device)
    counts = torch.tensor([len(others) for others in other_labels], device=device)
    rows = torch.cat([everyone, everyone.repeat_interleave(counts)])  # [B + all K]
    tried = torch.cat([labels, *(others.to(device) for others in other_labels)])  # [B + all K, 24]
    # The mean squared error of the prediction, as in training, is the bound's only part that depends on the label.
    errors = torch.zeros(len(rows), device=device)
    for t in ratio_timesteps:
        # One noise for all: the difference of two errors has then far less variance than each of them.
        noise = torch.randn(1, *images.shape[1:], generator=generator).to(device).expand_as(images)
        timesteps = torch.full_like(everyone, t)
        noisy = noise_scheduler.add_noise(images, noise, timesteps)
        target = target_of(noise_scheduler, images, noise, timesteps)
        prediction = predict(model, noisy[rows], timesteps[rows], tried, 2 * len(images))
        if learned_scale not in (0, 1) and learned_interval[0] <= t <= learned_interval[1]:
            unconditional = model(noisy, timesteps, torch.zeros_like(labels))[rows]
            prediction = unconditional + (prediction - unconditional) / learned_scale
        errors += (prediction - target[rows]).square().mean((1, 2, 3))
    own = errors[: len(images)]
    others = errors[len(images) :]
    # The hardest of the other labels to tell from the own one.
    least = torch.full_like(own, torch.inf).scatter_reduce(0, rows[len(images) :], others, "amin")
    return (least - own) / len(ratio_timesteps)
