"""How close samples are to the data: as a whole set, and each to its nearest training picture."""

import itertools
import warnings

import numpy as np
import torch
from scipy.stats import ks_2samp
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from dataset import to_float
from report.judge import Found
from scoring import BATCH_SIZE, Scoring


@torch.no_grad()
def features(pictures: torch.Tensor, evaluator: Scoring) -> torch.Tensor:
    """The evaluator's features [N, 512], the input of its last layer, of uint8 pictures [N, 3, 64, 64]."""
    body = nn.Sequential(*list(evaluator.resnet18.children())[:-1], nn.Flatten())
    parts = pictures.split(BATCH_SIZE)
    return torch.cat([body(to_float(part).to(evaluator.device)).cpu() for part in parts])


class _Given(nn.Module):
    """Returns its input: torchmetrics wants a network for the features, which are computed already."""

    num_features = 512

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def distances(real: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Frechet (arXiv 1706.08500) and kernel distance (arXiv 1801.01401) between features [N, 512] and
    [M, 512]; the kernel distance with its standard deviation over subsets."""
    given = _Given()
    frechet = FrechetInceptionDistance(feature=given, normalize=False)
    size = min(1000, len(real), len(other))
    with warnings.catch_warnings(action="ignore"):  # torchmetrics warns that it keeps all features in memory
        kernel = KernelInceptionDistance(feature=given, subset_size=size, subsets=50)
    for metric in (frechet, kernel):
        metric.update(real, real=True)
        metric.update(other, real=False)
    torch.manual_seed(0)  # the subsets are drawn at random
    mean, deviation = kernel.compute()
    return {"frechet": frechet.compute().item(), "kernel": mean.item(), "kernel_deviation": deviation.item()}


def places(found: list[list[Found]]) -> dict[str, np.ndarray]:
    """Places x and y and sizes of all objects that the second judge found in some pictures."""
    objects = list(itertools.chain.from_iterable(found))
    rows = np.array([(one.x, one.y, one.size) for one in objects]).reshape(-1, 3)
    return {"x": rows[:, 0], "y": rows[:, 1], "size": rows[:, 2]}


def place_distances(real: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """The Kolmogorov-Smirnov statistic between two sets of `places`, for each quantity."""
    return {quantity: float(ks_2samp(real[quantity], other[quantity]).statistic) for quantity in real}


def nearest(pictures: torch.Tensor, training: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest of `training`, uint8 [M, 3, 64, 64], to each of `pictures`, uint8 [N, 3, 64, 64]: its
    distance [N], root mean square in grey levels, and its index [N]."""
    ours = pictures.flatten(1).float() - 128
    best = torch.full((len(ours),), torch.inf)
    index = torch.zeros(len(ours), dtype=torch.long)
    for start in range(0, len(training), 1000):
        theirs = training[start : start + 1000].flatten(1).float() - 128
        # Squared distance [N, 1000] without |ours|^2, which does not change which one is nearest.
        squares = theirs.square().sum(1) - 2 * (ours @ theirs.T)
        low, at = squares.min(1)
        index = torch.where(low < best, start + at, index)
        best = torch.minimum(best, low)
    exact = (pictures.float() - training[index].float()).square().mean((1, 2, 3)).sqrt()
    return exact, index
