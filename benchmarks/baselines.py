"""What speed.py compares our loops with: plain training, a bare training step, plain sampling."""

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from dataset import read_picture, to_float
from diffusion import target_of
from infra.device import Setup, new_accelerator
from model import build
from options import IMAGE_SIZE, PRESETS


class Files(Dataset):
    """Pictures from the files 0.png, 1.png and so on, decoded each time, with their labels."""

    def __init__(self, folder: Path, labels: torch.Tensor):
        self.folder = folder
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return to_float(read_picture(self.folder / f"{index}.png")), self.labels[index]


def loss_of(model, noise_scheduler: DDPMScheduler, clean: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(clean)
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
    prediction = model(noise_scheduler.add_noise(clean, noise, timesteps), timesteps, label)
    return F.mse_loss(prediction.float(), target_of(noise_scheduler, clean, noise, timesteps))


def plain_training(preset: str, folder: Path, labels: torch.Tensor, batch_size: int, device: torch.device) -> Callable:
    """The report's training loop on the `Files` in `folder`, as a function that does so many steps of it."""
    model, noise_scheduler = build(preset)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = DataLoader(
        Files(folder, labels), batch_size, shuffle=True, drop_last=True, persistent_workers=True,
        num_workers=min(4, os.cpu_count() or 1), pin_memory=device.type == "cuda",
    )  # fmt: skip
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def run(steps: int):
        for clean, label in itertools.islice(batches, steps):
            loss = loss_of(model, noise_scheduler, clean.to(device), label.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return run


def network_and_optimizer(preset: str, device: torch.device, setup: Setup):
    """What train.py trains, set up as it does."""
    model, _ = build(preset)
    model.to(device, memory_format=setup.memory_format).train()
    name = PRESETS[preset]["training"]["optimizer"]
    optimizer = train.OPTIMIZER_CLASSES[name](model.parameters(), lr=1e-4)
    return new_accelerator(mixed_precision=setup.precision).prepare_model(model), optimizer


def bare_training(preset: str, clean: torch.Tensor, label: torch.Tensor, setup: Setup) -> Callable:
    """Forward, backward and optimizer on one batch, set up as ours, as a function that does so many steps."""
    model, optimizer = network_and_optimizer(preset, clean.device, setup)
    timesteps = torch.randint(1000, (len(clean),), device=clean.device)

    def run(steps: int):
        for _ in range(steps):
            F.mse_loss(model(clean, timesteps, label).float(), clean).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


@torch.no_grad()
def plain_sampling(model, noise_scheduler: DDPMScheduler, label: torch.Tensor, steps: int, scale: float):
    """The plain loop over the first `steps` of 1000, guided by a second pass without labels."""
    scheduler = DDPMScheduler.from_config(noise_scheduler.config)
    scheduler.set_timesteps(1000)
    images = torch.randn(len(label), 3, IMAGE_SIZE, IMAGE_SIZE, device=label.device)
    for t in scheduler.timesteps[:steps]:
        timesteps = t.to(label.device).expand(len(label))
        prediction = model(images, timesteps, label)
        if scale != 1:
            unconditional = model(images, timesteps, torch.zeros_like(label))
            prediction = unconditional + scale * (prediction - unconditional)
        images = scheduler.step(prediction, t, images).prev_sample
