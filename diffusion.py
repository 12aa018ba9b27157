"""From noise to pictures: the sampling loop with its ways of guidance, and the lift that tells a good sample.

`sample.py` paints whole lists with it, `train.py` its grids.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional as F

from labels import load_objects, mistaken_labels, multi_hot, twin_labels
from options import IMAGE_SIZE, NUM_OBJECTS

# `from_config` does not carry `clip_sample` to the others: thresholding at 1 clamps x_0 just so.
_CLAMP = {"thresholding": True, "sample_max_value": 1.0}
_DPM = _CLAMP | {"lambda_min_clipped": -5.1}
SCHEDULERS = {  # of options.SAMPLERS
    "ddpm": (DDPMScheduler, {}),  # arXiv 2006.11239
    # arXiv 2010.02502 with eta 0, which is DPM-Solver++ of order 1 (arXiv 2211.01095). DDIMScheduler itself
    # goes to `t - 1000 // steps`, which is the next timestep only where `steps` divides 1000.
    "ddim": (DPMSolverMultistepScheduler, _CLAMP | {"solver_order": 1}),
    "dpmsolver++": (DPMSolverMultistepScheduler, _DPM),  # arXiv 2211.01095
    "sde-dpmsolver++": (DPMSolverMultistepScheduler, _DPM | {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, _CLAMP),  # arXiv 2302.04867
}
STOCHASTIC = ("ddpm", "sde-dpmsolver++")  # these draw noise on their way; from their mistakes they recover
Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # images, timesteps, labels


def batch_size_for(device: torch.device, pictures: int, processes: int, most: int | None) -> int:
    """Pictures at a time, of so many in all.

    `most`: None for what the device likes, 64, but 16 on a CPU: guidance doubles it, and more than 32 at once
    are slower there. Elsewhere as many as make the batches of all processes even, since the last one is
    filled up: a compiled network wants all batches of one size.
    """
    if device.type == "cpu":
        return min(most or 16, math.ceil(pictures / processes))
    rounds = math.ceil(pictures / processes / (most or 64))
    return math.ceil(pictures / processes / rounds)


def picture_seed(seed: int, index: int, candidate: int = 0) -> int:
    """The seed of picture `index` of a run with `seed`, and of its other candidates."""
    return int(np.random.SeedSequence([seed, index, candidate]).generate_state(1, np.uint64)[0] >> 1)


def predict(
    model: Network, images: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor, size: int
) -> torch.Tensor:
    """What the network predicts [B, 3, 64, 64], `size` at a time: B may be many times what a device likes."""
    predictions = torch.empty_like(images)
    for start in range(0, len(images), size):  # copied at once: a CUDA graph writes to the same place again
        part = slice(start, start + size)
        predictions[part] = model(images[part], timesteps[part], labels[part])
    return predictions


def timestep_grid(steps: int, start: int = 1000) -> list[int]:
    """The timesteps of so many steps, 1 to 1000: all different, descending, in 0 to 999.

    Trailing (arXiv 2305.08891): the first is `start` - 1, and they lie 1000 / steps apart, rounded as in
    diffusers. If so many do not fit below a lower `start`, they lie closer together. If they do not fit
    even then, the first is `steps` - 1.
    """
    grid = np.arange(start, 0, -1000 / steps).round()[:steps]  # by rounding, arange may give one too many
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
        alpha_bar = scheduler.alphas_cumprod[timesteps]
        sigmas = ((1 - alpha_bar) / alpha_bar) ** 0.5
        scheduler.timesteps = torch.tensor(timesteps)
        scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)])  # the last is that of the clear picture
    else:
        scheduler.set_timesteps(timesteps=timesteps)


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
    guidance_interval: tuple[float, float] = (0, 1000),
    negative_labels: Sequence[torch.Tensor] = (),
    negative_scale: float = 0.0,
    negative_interval: tuple[float, float] = (0, 1000),
    evaluator: torch.nn.Module | None = None,
    evaluator_scale: float = 0.0,
    callback: Callable[[torch.Tensor], None] = lambda images: None,
) -> torch.Tensor:
    """Samples [B, 3, 64, 64] in [-1, 1] for multi-hot labels [B, 24], on the device of `labels`.

    Each picture draws its noise from its own seed, so it does not depend on its neighbours in the batch.
    `guidance_scale` w: unconditional + w (conditional - unconditional) prediction (arXiv 2207.12598), at
    timesteps within `guidance_interval`, bounds included (arXiv 2404.07724); outside of it and for w 1 the
    unconditional one is not computed.

    `negative_labels`: for each picture those [K, 24], K >= 0, of what it might become by mistake. Within
    `negative_interval`, `negative_scale` (conditional - negative) is added, for the negative label whose
    prediction lies nearest to the conditional one: the mistake that the picture is about to make.

    `evaluator`, for `evaluator_scale` above 0: [B, 3, 64, 64] in [-1, 1] -> probabilities [B, 24]; see
    `evaluator_gradient`. `callback` is given the images before each step, and the clear ones at the end.

    Raises FloatingPointError if a prediction or a picture is not finite: clamped, it would be a picture.
    """
    device, count = labels.device, len(labels)
    scheduler_class, options = SCHEDULERS[sampler]
    scheduler = scheduler_class.from_config(noise_scheduler.config, **options)
    set_steps(scheduler, steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # the same start on any device
    images = randn_tensor((count, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generators).to(device)
    step_options = {}
    if sampler in STOCHASTIC:
        step_options["generator"] = [torch.Generator(device).manual_seed(seed + 1) for seed in seeds]
    everyone = torch.arange(count, device=device)
    mistakes = [(i, label) for i, own in enumerate(negative_labels) for label in own]
    if device.type == "cuda":  # a compiled network wants few sizes of batches
        mistakes += mistakes[:1] * (-len(mistakes) % count)
    owners = torch.tensor([i for i, _ in mistakes], dtype=torch.long, device=device)  # [K]
    negatives = (
        torch.stack([label for _, label in mistakes]).to(device) if mistakes else labels[:0]
    )  # [K, 24]
    owned = owners == everyone[:, None]  # [B, K]
    sums = []  # of each prediction: looked at once at the end, since to look is to wait for the device
    for t in scheduler.timesteps:
        callback(images)
        guided = guidance_scale != 1 and guidance_interval[0] <= t <= guidance_interval[1]
        negated = negative_scale > 0 and mistakes and negative_interval[0] <= t <= negative_interval[1]
        parts = {"conditional": (everyone, labels)}
        if guided:
            parts["unconditional"] = (everyone, torch.zeros_like(labels))
        if negated:
            parts["negative"] = (owners, negatives)
        rows, batch_labels = (torch.cat(column) for column in zip(*parts.values(), strict=True))
        inputs, timesteps = scheduler.scale_model_input(images, t), torch.full_like(rows, t.item())
        predictions = predict(model, inputs[rows], timesteps, batch_labels, 2 * count)
        predictions = predictions.split([len(part) for part, _ in parts.values()])
        predictions = dict(zip(parts, predictions, strict=True))
        prediction = conditional = predictions["conditional"]
        if guided:
            unconditional = predictions["unconditional"]
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        if negated:
            negative = predictions["negative"]
            distances = (negative - conditional[owners]).square().mean((1, 2, 3))  # [K]
            nearest = torch.where(owned, distances, torch.inf).argmin(1)  # [B]
            away = (conditional - negative[nearest]) * owned.any(1)[:, None, None, None]
            prediction = prediction + negative_scale * away
        if evaluator_scale > 0:
            gradient = evaluator_gradient(evaluator, noise_scheduler, images, prediction, t, labels)
            prediction = prediction - evaluator_scale * gradient
        sums.append(prediction.sum())
        images = scheduler.step(prediction, t, images, **step_options).prev_sample
    check_finite(sums, images, scheduler.timesteps.tolist())
    images = images.clamp(-1, 1)
    callback(images)
    return images


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
    through: epsilon - s sqrt(1 - alpha_bar) sqrt(alpha_bar) gradient, or v - s sqrt(1 - alpha_bar) gradient.
    """
    alpha_bar = noise_scheduler.alphas_cumprod[timestep]
    signal, noise = alpha_bar.sqrt().item(), (1 - alpha_bar).sqrt().item()
    if noise_scheduler.config.prediction_type == "v_prediction":
        clean, factor = signal * images - noise * prediction, noise
    else:
        clean, factor = (images - noise * prediction) / signal, noise * signal
    clean = clean.clamp(-1, 1).detach().requires_grad_()
    log_likelihood = -F.binary_cross_entropy(evaluator(clean), labels, reduction="sum")
    return factor * torch.autograd.grad(log_likelihood, clean)[0]


# -------------------------------------------------------------------------------------------------- best of N

LIFT_TIMESTEPS, LIFT_DRAWS = (400, 600), 2  # at which the denoising error is measured, of so many noises each


@torch.no_grad()
def lift(
    model: Network,
    noise_scheduler: DDPMScheduler,
    images: torch.Tensor,
    labels: torch.Tensor,
    other_labels: Sequence[torch.Tensor],
) -> torch.Tensor:
    """How much better images [B, 3, 64, 64] in [-1, 1] fit their labels [B, 24] than any of the others: [B].

    The denoising error given a label bounds how unlikely it makes the picture. The lift is that of the other
    label with the least error, of those [K, 24], K > 0, of each picture, less that of its own; above 0 the
    picture shows what it should. With zeros for other label it is CompLift's (arXiv 2505.13740).
    The noise is the same for all pictures, so candidates may be compared.
    """
    device, generator = images.device, torch.Generator().manual_seed(0)
    everyone = torch.arange(len(images), device=device)
    counts = torch.tensor([len(others) for others in other_labels], device=device)
    rows = torch.cat([everyone, everyone.repeat_interleave(counts)])  # [B + all K]
    tried = torch.cat([labels, *(others.to(device) for others in other_labels)])  # [B + all K, 24]
    errors = torch.zeros(len(rows), device=device)
    for t in LIFT_TIMESTEPS:
        for _ in range(LIFT_DRAWS):
            noise = torch.randn(1, *images.shape[1:], generator=generator).to(device).expand_as(images)
            timesteps = torch.full_like(everyone, t)
            noisy = noise_scheduler.add_noise(images, noise, timesteps)
            target = noise
            if noise_scheduler.config.prediction_type == "v_prediction":
                target = noise_scheduler.get_velocity(images, noise, timesteps)
            prediction = predict(model, noisy[rows], timesteps[rows], tried, 2 * len(images))
            errors += (prediction - target[rows]).square().mean((1, 2, 3))
    own, others = errors.split([len(images), len(rows) - len(images)])
    least = torch.full_like(own, torch.inf).scatter_reduce(0, rows[len(images) :], others, "amin")
    return (least - own) / (len(LIFT_TIMESTEPS) * LIFT_DRAWS)


def paint(
    network: Network,
    plain_network: Network,
    noise_scheduler: DDPMScheduler,
    conditions: list[list[str]],
    places: list[tuple[int, int]],
    options: dict,
    device: torch.device,
    evaluator: torch.nn.Module,
    best_of: int = 1,
    lift_over: str = "mistakes",
    callback: Callable[[torch.Tensor], None] = lambda images: None,
) -> torch.Tensor:
    """Pictures [B, 3, 64, 64] in [-1, 1] of `conditions`, each the best of so many candidates by its lift.

    `network` may be compiled for batches of B; `plain_network` is the same, not compiled. `places`: (seed of
    the run, index in the list), on which a picture's noise depends. `options`: of `generate`. `lift_over`:
    "mistakes", labels with one mistake in them, or "unconditional", none at all. `callback` as in `generate`.
    """
    objects = load_objects()
    labels = multi_hot(conditions, objects).to(device)
    options = options | {
        "negative_labels": [twin_labels(condition, objects) for condition in conditions],
        "evaluator": evaluator,
        "callback": callback,
    }
    candidates = []
    for k in range(best_of):
        seeds = [picture_seed(seed, index, k) for seed, index in places]
        candidates.append(generate(network, noise_scheduler, labels, seeds, **options))
    if best_of == 1:
        return candidates[0]
    if lift_over == "mistakes":
        others = [mistaken_labels(condition, objects) for condition in conditions]
    else:
        others = [torch.zeros(1, NUM_OBJECTS)] * len(conditions)
    lifts = [lift(plain_network, noise_scheduler, images, labels, others) for images in candidates]
    best = torch.stack(lifts).argmax(0)  # [B]
    return torch.stack(candidates)[best, torch.arange(len(best))]
