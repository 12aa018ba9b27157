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
    pytest.param("small", marks=[pytest.mark.slow, pytest.mark.skipif(is_slow, reason="minutes without bf16")]),
    "tiny-mixed",
]


def flat(model: torch.nn.Module) -> torch.Tensor:
    """All weights in a row."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def take_steps(ours: torch.nn.Module, theirs: torch.nn.Module, count: int, gradient):
    """Steps of our Muon on one network and of timm's on the other, with `gradient(parameter)` of ours."""
    optimizers = [
        Muon(ours.parameters(), lr=3e-3, dtype=torch.bfloat16),
        TimmMuon(theirs.parameters(), lr=3e-3, nesterov=True),
    ]
    for _ in range(count):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = gradient(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_steps_from_the_same_gradients_give_the_weights_of_timms_bit_for_bit(preset):
    torch.manual_seed(0)
    ours, _ = build(preset)
    theirs = copy.deepcopy(ours)
    take_steps(ours, theirs, 4, lambda weight: torch.randn_like(weight) * 0.01 + weight.detach() * 0.1)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_the_order_of_memory_changes_nothing_but_rounding(preset):
    """As on a GPU, where convolutions are channels_last: columns are then orthogonalised in another order."""
    torch.manual_seed(0)
    ours, _ = build(preset)
    ours.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    start = flat(ours)
    take_steps(ours, theirs, 5, torch.randn_like)
    assert (flat(ours) - flat(theirs)).norm() < 0.005 * (flat(theirs) - start).norm()


def test_the_precision_of_the_iteration_changes_nothing_but_rounding():
    """On a CPU without instructions for bf16 it is fp32, which there takes a tenth of the time."""
    torch.manual_seed(0)
    single, _ = build("tiny-mixed")
    half = copy.deepcopy(single)
    start = flat(single)
    for model, dtype in ((single, torch.float32), (half, torch.bfloat16)):
        optimizer = Muon(model.parameters(), lr=3e-3, dtype=dtype)
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        optimizer.step()
    assert (flat(single) - flat(half)).norm() < 0.02 * (flat(half) - start).norm()
