"""The evaluator that evaluator.py holds: ours, or the lab's own file in its place."""

import inspect
import os
import pickle
from pathlib import Path

import torch

from infra.commands import InputError
from infra.device import explained
from scoring import Scoring, is_official

LAB_CHECKPOINT = Path("checkpoint.pth")  # that the lab's evaluator.py loads, from the working directory
FORCE_UNPICKLING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # PyTorch's own variable, which torch.load looks at


class LabScoring(Scoring):
    """`lab`: the lab's own evaluation_model. Its accuracy counts; it has no threshold, so 0.5 is taken."""

    def __init__(self, lab, device: torch.device | str | None):
        network = lab.resnet18
        if device:  # what is sampled on may be another one
            network = network.to(device)
        super().__init__(LAB_CHECKPOINT, network, next(network.parameters()).device, threshold=0.5)
        self.lab = lab
        self.classnum = lab.classnum

    def compute_acc(self, out: torch.Tensor, onehot_labels: torch.Tensor) -> float:
        """The lab's: outputs [B, 24] against multi-hot labels [B, 24]."""
        return float(self.lab.compute_acc(out, onehot_labels))

    def eval(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """The lab's: images [B, 3, 64, 64] in [-1, 1] against multi-hot labels [B, 24]."""
        return float(self.lab.eval(images, labels))


def load_evaluator(path: Path | str | None = None, device: torch.device | str | None = None) -> Scoring:
    """The evaluator of evaluator.py: ours with the weights in `path` on `device`, defaults as there, or the
    lab's, which has its own weights.

    Raises InputError if it cannot be loaded; with the lab's file also for another `path` than checkpoint.pth
    and where there is no CUDA.
    """
    try:
        from evaluator import evaluation_model  # not at the top: what it raises is told in one line
    except Exception as error:  # of any kind: the file may be another's
        raise InputError(f"evaluator.py: cannot be imported ({_reason(error)})") from None
    if "path" in inspect.signature(evaluation_model).parameters:
        return evaluation_model(path, device)
    return _load_lab(evaluation_model, path, device)


def _load_lab(evaluation_model: type, path: Path | str | None, device) -> LabScoring:
    """The lab's class, loaded. Raises InputError."""
    if path and Path(path).resolve() != LAB_CHECKPOINT.resolve():
        raise InputError(
            f"{path}: the lab's evaluator.py loads {LAB_CHECKPOINT} from the working directory and nothing "
            f"else; leave --evaluator out and let sample.py score again what another one scored, or put "
            f"this project's evaluator.py back"
        )
    if not torch.cuda.is_available():
        raise InputError(
            "evaluator.py: the lab's own file needs CUDA, and there is none here; put this project's "
            "evaluator.py back, which scores on a CPU as well"
        )
    if not LAB_CHECKPOINT.is_file():
        raise InputError(f"{LAB_CHECKPOINT}: no such file; the lab's evaluator.py loads it from the working directory")
    before = os.environ.get(FORCE_UNPICKLING)
    if is_official(LAB_CHECKPOINT):
        # The lab's file calls torch.load as of old, which today refuses what is not a tensor. This one is
        # known, so it may be unpickled.
        os.environ[FORCE_UNPICKLING] = "1"
    try:
        with explained(torch.device("cuda"), "for the evaluator"):
            return LabScoring(evaluation_model(), device)
    except InputError:
        raise
    except pickle.UnpicklingError:  # what PyTorch says advises to run the code in it
        raise InputError(f"{LAB_CHECKPOINT}: not the lab's own file, nor one of tensors and plain values") from None
    except Exception as error:  # of any kind: the file is another's
        raise InputError(f"evaluator.py: the lab's own file cannot be loaded ({_reason(error)})") from None
    finally:
        os.environ.pop(FORCE_UNPICKLING, None)
        if before is not None:
            os.environ[FORCE_UNPICKLING] = before


def _reason(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])[:200]
