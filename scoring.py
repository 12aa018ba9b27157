"""What scoring takes beyond the lab's interface, which is `compute_acc` and `eval` alone.

The scripts need more than these, and run with our evaluator.py as with the lab's own: see lab.py.
"""

import hashlib
import math
import warnings
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import nn

from dataset import to_float
from infra.device import explained
from options import IMAGE_SIZE, NUM_OBJECTS

BATCH_SIZE = 250  # pictures that a network is given at once
OFFICIAL_BLOB = "ff70bd18a0c247595d56a8168cac7adcd61333e6"  # of the lab's file, by `git hash-object`


def is_official(path: Path) -> bool:
    """Whether the file is the lab's own checkpoint.pth, byte for byte: such a one may be unpickled."""
    data = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == OFFICIAL_BLOB


def check_images(images: torch.Tensor):
    """Raise ValueError for what is not [B, 3, H, W], and for no images at all."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[1:]:
        size = f"[B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}]"
        raise ValueError(f"expected images of shape {size}, got {list(images.shape)}")
    if len(images) == 0:
        raise ValueError("nothing to score: there are no images")


def check_labels(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Multi-hot labels [count, 24] of any dtype and device as bool [count, 24] on the CPU.

    Raises ValueError for no labels at all, for another shape, and for numbers other than 0 and 1.
    """
    if list(labels.shape) != [count, NUM_OBJECTS]:
        raise ValueError(f"expected labels of shape [{count}, {NUM_OBJECTS}], got {list(labels.shape)}")
    if count == 0:
        raise ValueError("nothing to score: there are no labels")
    labels = labels.detach().cpu()
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("expected multi-hot labels, got numbers other than 0 and 1")
    return labels.bool()


def value_range(images: torch.Tensor) -> tuple[float, float]:
    """Lowest and highest value of float images, as float32; NaN if one is. BATCH_SIZE images at a time."""
    ranges = torch.stack([torch.stack(part.float().aminmax()) for part in images.detach().split(BATCH_SIZE)])
    return ranges[:, 0].min().item(), ranges[:, 1].max().item()


class Scoring(ABC):
    """What both evaluators have beyond the lab's interface, which is that of a subclass.

    `path`: of the weights; `resnet18`: images [B, 3, 64, 64] in [-1, 1] -> probabilities [B, 24], on
    `device`; `threshold`: a probability above it says that the object is seen.
    """

    def __init__(self, path: Path, resnet18: nn.Module, device: torch.device, threshold: float):
        self.path = path
        self.resnet18 = resnet18
        self.device = device
        self.threshold = threshold
        self.warned: set[str] = set()  # kinds of unfit images that were warned about

    @abstractmethod
    def compute_acc(self, out: torch.Tensor, onehot_labels: torch.Tensor) -> float:
        """Accuracy of outputs [B, 24] against multi-hot labels [B, 24]."""

    @abstractmethod
    def eval(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Accuracy of images [B, 3, 64, 64] in [-1, 1] against multi-hot labels [B, 24]."""

    def exact_set(self, out: torch.Tensor, onehot_labels: torch.Tensor) -> float:
        """Share of pictures with outputs [B, 24] above the threshold for just their labels [B, 24], and no
        other object: what `compute_acc` is blind to counts here. Raises ValueError as `check_labels`."""
        labels = check_labels(onehot_labels, len(out))
        return ((out.cpu() > self.threshold) == labels).all(1).float().mean().item()

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Probability [B, 24], on the CPU, of each object in images [B, 3, 64, 64] in [-1, 1] of any float
        type, however many: the network is given BATCH_SIZE at a time, as float32.

        Warns, once for each kind, of images that look like [0, 1] or 0..255, that are not 64x64, or that have
        values beyond 1.05 (samples that were not clamped). Raises ValueError for another shape, no images,
        integers, and values that are not finite or so large that the network's outputs are not.
        """
        check_images(images)
        if not images.is_floating_point():
            raise ValueError(f"expected float images in [-1, 1], got {images.dtype}")
        low, high = value_range(images)
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"expected finite images in [-1, 1], got values from {low} to {high}")
        self._warn_of_size(images)
        self._warn_of_scale(low, high)
        return self._outputs(images)

    def judge(self, pictures: torch.Tensor) -> torch.Tensor:
        """The same for uint8 pictures [N, 3, 64, 64], whose scale is known."""
        check_images(pictures)
        if pictures.dtype != torch.uint8:
            raise ValueError(f"expected uint8 pictures, got {pictures.dtype}")
        self._warn_of_size(pictures)
        return torch.cat([self._outputs(to_float(part)) for part in pictures.split(BATCH_SIZE)])

    @torch.no_grad()
    def _outputs(self, images: torch.Tensor) -> torch.Tensor:
        with explained(self.device, "for the evaluator"):
            parts = [self.resnet18(p.float().to(self.device)).cpu() for p in images.split(BATCH_SIZE)]
        outputs = torch.cat(parts)
        if not outputs.isfinite().all():
            raise ValueError("expected images in [-1, 1]; for these the evaluator's outputs are not finite")
        return outputs

    def _warn_of_size(self, images: torch.Tensor):
        height, width = images.shape[2:]
        if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
            self._warn(
                "size",
                f"images are {width}x{height}, but the evaluator was trained on pictures squashed to "
                f"{IMAGE_SIZE}x{IMAGE_SIZE}: squash them, as dataset.read_picture does",
            )

    def _warn_of_scale(self, low: float, high: float):
        """Warn if the lowest and the highest value of float images do not look like [-1, 1]."""
        trained = "the evaluator was trained on [-1, 1]"
        if low >= 0 and 0 < high <= 1.05:
            self._warn("0 to 1", f"images look like [0, 1], but {trained}: give it images * 2 - 1")
        elif low >= 0 and high > 3:
            self._warn("0 to 255", f"images look like 0 to 255, but {trained}: give it images / 127.5 - 1")
        elif max(-low, high) > 1.05:
            self._warn("unclamped", f"images reach {max(-low, high):.2f}; {trained}")

    def _warn(self, kind: str, message: str):
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(message, stacklevel=4)  # the line that called `probabilities` or `judge`
