"""Muon takes the steps of timm's, in fewer kernels."""

import copy

import pytest
import torch
from timm.optim import Muon as TimmMuon

from infra.device import has_fast_bf16
from model import build
from muon import Muon

is_slow = not has_fast_bf16(torch.device("cpu"))
PRESETS = [
    pytest.param("small", marks=pytest.mark.skipif(is_slow, reason="minutes without bf16")),
    "tiny-mixed",
]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_weights_after_some_steps(preset):
    """From the same gradients, bit for bit."""
    torch.manual_seed(0)
    ours, _ = build(preset)
    theirs = copy.deepcopy(ours)
    optimizers = [
        Muon(ours.parameters(), lr=3e-3, dtype=torch.bfloat16),
        TimmMuon(theirs.parameters(), lr=3e-3, nesterov=True),
    ]
    for _ in range(4):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a) * 0.01 + a.detach() * 0.1
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_order_of_memory_changes_rounding_alone(preset):
    """As on a GPU, where convolutions are channels_last: columns are then orthogonalised in another order."""
    torch.manual_seed(0)
    ours, _ = build(preset)
    ours.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    start = torch.cat([p.detach().flatten() for p in ours.parameters()])
    optimizers = [
        Muon(ours.parameters(), lr=3e-3, dtype=torch.bfloat16),
        TimmMuon(theirs.parameters(), lr=3e-3, nesterov=True),
    ]
    for _ in range(5):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    a, b = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (ours, theirs))
    assert (a - b).norm() < 0.005 * (b - start).norm()


def test_the_precision_of_the_iteration_changes_rounding_alone():
    """On a CPU without instructions for bf16 it is fp32, which there takes a tenth of the time."""
    torch.manual_seed(0)
    ours, _ = build("tiny-mixed")
    theirs = copy.deepcopy(ours)
    start = torch.cat([p.detach().flatten() for p in ours.parameters()])
    for model, dtype in ((ours, torch.float32), (theirs, torch.bfloat16)):
        optimizer = Muon(model.parameters(), lr=3e-3, dtype=dtype)
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        optimizer.step()
    a, b = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (ours, theirs))
    assert (a - b).norm() < 0.02 * (b - start).norm()
