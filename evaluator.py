"""The evaluator: a ResNet18 that tells which of the 24 objects a picture shows, with the lab's interface.

    python evaluator.py images/test                       # score a folder of PNGs against test.json
    python evaluator.py images/mine --labels mine.json
    python evaluator.py DIR [DIR ...] --train --out weights/evaluator.pth   # train it on rendered scenes

From code: `evaluation_model().eval(images, labels)`, as in the lab's own evaluator.py.
"""

import argparse
from pathlib import Path

from infra.commands import ROOT, InputError, Parser, command, number, read_early, shown, to_path, to_seed
from options import PRECISIONS


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Score a folder of pictures with the evaluator, or train one.")
    parser.add_argument("folders", type=to_path, nargs="+", help="folder of pictures; with --train one or more")
    parser.add_argument("--labels", type=to_path, help="default: FOLDER/labels.json, else <FOLDER's name>.json")
    parser.add_argument("--weights", type=to_path, help="default: checkpoint.pth if there, else weights/evaluator.pth")
    parser.add_argument("--train", action="store_true", help="train on the folders instead of scoring one")
    parser.add_argument("--epochs", type=number(int, 1), default=40, help="with --train (default: %(default)s)")
    parser.add_argument("--seed", type=to_seed, default=0, help="with --train (default: %(default)s)")
    parser.add_argument("--mixed-precision", choices=PRECISIONS, help="with --train (default: what is fastest here)")
    parser.add_argument("--out", type=to_path, help="with --train: weights file to write")
    args = parser.parse_args(argv)
    if args.train != bool(args.out):
        parser.error("--train and --out belong together")
    if len(args.folders) > 1 and not args.train:
        parser.error("one folder at a time is scored")
    return args


if __name__ == "__main__":
    read_early(parse_args)

import io
import os
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from dataset import ICLEVRDataset, read_picture, to_float
from infra.device import choose_precision, explained, join_processes, new_accelerator
from infra.files import load_json, write_whole
from label_files import LABELS_NAME, load_conditions, load_labels, load_objects, split_by_scene
from labels import multi_hot
from options import NUM_OBJECTS
from scoring import BATCH_SIZE as BATCH_SIZE  # code that uses this module may know it from here
from scoring import Scoring, check_images, check_labels, is_official


def build_network() -> nn.Module:
    """torchvision's ResNet18 with 24 sigmoid outputs: [B, 3, 64, 64] in [-1, 1] -> probabilities [B, 24]."""
    network = resnet18(weights=None)
    network.fc = nn.Sequential(nn.Linear(512, NUM_OBJECTS), nn.Sigmoid())
    return network


def default_weights() -> Path:
    """The lab's `checkpoint.pth` when it lies beside this file, else the weights that ship."""
    official = ROOT / "checkpoint.pth"
    return official if official.exists() else ROOT / "weights" / "evaluator.pth"


def load_checkpoint(path: Path) -> dict:
    """Load a checkpoint without running code from it; only the lab's own file may be unpickled instead.

    Raises InputError if the file is missing, broken, or holds anything but tensors and plain values.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is not a checkpoint
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected the evaluator's weights") from None
    except OSError:
        raise
    except Exception as error:  # of many kinds, by what is broken
        if is_official(path):
            return torch.load(path, map_location="cpu", weights_only=False)
        reason = type(error).__name__  # what PyTorch says advises to run the code in it
        raise InputError(f"{path}: not a checkpoint of tensors and plain values ({reason})") from None


class evaluation_model(Scoring):  # noqa: N801 - the lab's name, which its users' code imports
    """The evaluator in `path` (default: `default_weights()`) on `device` (default: CUDA if there is one).

    `probabilities`, `judge` and `exact_set` are those of scoring.py.
    """

    def __init__(self, path: Path | str | None = None, device: torch.device | str | None = None):
        path = Path(path or default_weights())
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network = build_network()
        checkpoint = load_checkpoint(path)
        try:
            network.load_state_dict(checkpoint["model"])
        except Exception:  # of many kinds, by what it is instead
            raise InputError(f"{path}: expected a ResNet18 with fc.0 of {NUM_OBJECTS} under the key 'model'") from None
        if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
            raise InputError(f"{path}, model: expected finite numbers")
        threshold = checkpoint.get("threshold", 0.5)
        if not isinstance(threshold, float) or not 0 <= threshold <= 1:
            raise InputError(f"{path}, threshold: expected one of 0 to 1, got {shown(threshold)}")
        with explained(device, "for the evaluator"):
            network.to(device).eval()
        super().__init__(path, network, device, threshold)
        self.classnum = NUM_OBJECTS

    def compute_acc(self, out: torch.Tensor, onehot_labels: torch.Tensor) -> float:
        """Micro top-k accuracy of outputs [B, 24] against multi-hot labels [B, 24], of any dtype and device.

        Each picture's k highest outputs, k its number of labels, are compared with its labels: hits of all
        pictures over labels of all pictures. Blind to objects too many, as the lab's measure is. Raises
        ValueError for labels of another shape, not of 0 and 1, or without a single 1.
        """
        labels = check_labels(onehot_labels, len(out))
        asked = int(labels.sum())
        if asked == 0:
            raise ValueError("nothing to score: no label asks for an object")
        hits = 0
        for scores, label in zip(out.cpu(), labels, strict=True):
            k = int(label.sum())
            hits += int(label[scores.topk(k).indices].sum())
        return hits / asked

    def eval(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Accuracy of images [B, 3, 64, 64] in [-1, 1] against multi-hot labels [B, 24]: `compute_acc`.

        Images may be of any float type, labels of any; both on any device. Warns and raises ValueError as
        `probabilities` and `compute_acc` do.
        """
        check_images(images)
        labels = check_labels(labels, len(images))  # before the network is at work
        return self.compute_acc(self.probabilities(images), labels)


def score_folder(
    evaluator: evaluation_model, folder: Path, labels_path: Path, objects: dict[str, int]
) -> tuple[float, float]:
    """Accuracy and exact set of a folder: `0.png` ... for a list like test.json, else the named files."""
    if isinstance(load_json(labels_path), dict):
        named = load_labels(labels_path, objects)
        filenames = list(named)
        conditions = list(named.values())
    else:
        conditions = load_conditions(labels_path, objects)
        filenames = [f"{i}.png" for i in range(len(conditions))]
    found = evaluator.judge(torch.stack([read_picture(folder / name) for name in filenames]))
    labels = multi_hot(conditions, objects)
    return evaluator.compute_acc(found, labels), evaluator.exact_set(found, labels)


# --------------------------------------------------------------------------------------------------- training


def soften(images: torch.Tensor, sigma: float, levels: float | torch.Tensor) -> torch.Tensor:
    """Blur images [B, 3, 64, 64] in [-1, 1] by a Gaussian of `sigma` pixels, then add noise of `levels` grey
    levels (one number or [B, 1, 1, 1]): so a model's samples differ from renders."""
    return gaussian_blur(images, kernel_size=7, sigma=sigma) + torch.randn_like(images) * (levels / 127.5)


def augment(images: torch.Tensor, labels: torch.Tensor, mix: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Random changes of pictures [B, 3, 64, 64] in [-1, 1] and labels [B, 24] that keep them true.

    Mirroring, shifts of up to 5 pixels and brightness; a quarter gets blur and noise, so that the judge does
    not mistake a sample's softness for a missing object. With `mix`, half is mixed with another picture
    (arXiv 1710.09412), as a ResNet learns pictures by heart otherwise.
    """
    count = len(images)
    change = torch.zeros(count, 2, 3)
    change[:, 0, 0] = torch.randint(0, 2, (count,)) * 2 - 1
    change[:, 1, 1] = 1
    change[:, :, 2] = torch.randint(-5, 6, (count, 2)) / 32  # in half widths: whole pixels
    grid = F.affine_grid(change, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="nearest", padding_mode="border", align_corners=False)
    images = images * torch.empty(count, 1, 1, 1).uniform_(0.95, 1.05)
    quarter = count // 4
    sigma = float(torch.empty(()).uniform_(0.2, 1.0))
    levels = torch.empty(quarter, 1, 1, 1).uniform_(0, 12)
    images = torch.cat([soften(images[:quarter], sigma, levels), images[quarter:]])
    if not mix:
        return images, labels
    share = torch.empty(count).uniform_(0, 0.5) * torch.randint(0, 2, (count,))
    other = torch.randperm(count)
    images = images.lerp(images[other], share[:, None, None, None])
    return images, labels.lerp(labels[other], share[:, None])


def fit_threshold(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """The threshold for [N, 24] that gets most pictures' sets of objects right: the middle of the best."""
    thresholds = torch.linspace(0.02, 0.98, 97)
    exact = torch.stack([((probabilities > t) == labels.bool()).all(1).sum() for t in thresholds])
    return round(thresholds[exact == exact.max()].median().item(), 2)


def train(
    images: torch.Tensor, labels: torch.Tensor, filenames: list[str], epochs: int, seed: int, precision: str
) -> dict:
    """Train on 19 of 20 scenes, fit the threshold on the rest; returns what the weights file holds.

    `images` uint8 [N, 3, 64, 64], `labels` [N, 24], `filenames` N.
    """
    torch.manual_seed(seed)
    accelerator = new_accelerator(mixed_precision=precision)
    kept, held = split_by_scene(filenames, held_out=0.05, seed=seed)
    held = [i for i in held if labels[i].sum() <= 3]  # what the task asks for
    if len(kept) < 4 or not held:
        raise InputError(f"{len(filenames)} pictures are too few to train on; render more scenes")
    batch_size = min(64, len(kept))
    steps = epochs * (len(kept) // batch_size)
    network = build_network().to(memory_format=torch.channels_last)
    # Logits: in half precision the sigmoid rounds what is nearly certain.
    network.fc = nn.Sequential(network.get_submodule("fc.0"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    network, optimizer = accelerator.prepare(network, optimizer)
    with tqdm(total=steps, unit="step") as bar:
        for epoch in range(epochs):
            order = torch.tensor(kept)[torch.randperm(len(kept))]
            for batch in order[: len(kept) // batch_size * batch_size].split(batch_size):
                mix = epoch < 0.75 * epochs  # the last epochs see pictures as they are
                inputs, targets = augment(to_float(images[batch]), labels[batch], mix)
                inputs = inputs.to(accelerator.device, memory_format=torch.channels_last)
                loss = F.binary_cross_entropy_with_logits(network(inputs), targets.to(accelerator.device))
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.4f}")
    state = {k: v.cpu() for k, v in accelerator.unwrap_model(network).state_dict().items()}
    # Half precision fits a repository; batch norm's counter stays an integer.
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    judge = build_network().eval()
    judge.load_state_dict(state)  # judged as it will be loaded
    inputs = to_float(images[held])
    with torch.no_grad():
        found = torch.cat([judge(inputs), judge(soften(inputs, 0.6, 4))])
    threshold = fit_threshold(found, labels[held].repeat(2, 1))
    return {"model": state, "threshold": threshold, "pictures": len(kept), "epochs": epochs, "seed": seed}


def labels_of(folder: Path, otherwise: Path) -> Path:
    """The label file that lies beside the pictures of `folder`, as render.py's random scenes have it."""
    return folder / LABELS_NAME if (folder / LABELS_NAME).exists() else otherwise


def refuse_other_file(path: Path):
    """Raise InputError if there is a file at `path` that is no evaluator trained here: the lab's is none."""
    if not os.path.lexists(path):
        return
    try:
        found = load_checkpoint(path)
    except InputError:
        found = {}
    if not isinstance(found, dict) or "threshold" not in found:
        raise InputError(f"{path}: there already, and no evaluator trained here; choose another --out")


def train_on_folders(args: argparse.Namespace, objects: dict[str, int]):
    """Train on `args.folders`, write the weights to `args.out`."""
    refuse_other_file(args.out)
    device = join_processes().device
    precision, _ = choose_precision(device, args.mixed_precision)
    sets = [ICLEVRDataset(f, args.labels or labels_of(f, ROOT / "train.json"), objects) for f in args.folders]
    images = torch.cat([data.images for data in sets])
    labels = torch.cat([data.labels for data in sets])
    filenames = [name for data in sets for name in data.filenames]
    with explained(device, "in training"):
        checkpoint = train(images, labels, filenames, args.epochs, args.seed, precision)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_whole(args.out, content.getvalue())
    print(f"{args.out}: trained on {checkpoint['pictures']:,} pictures, threshold {checkpoint['threshold']}")


@command
def main(argv: list[str] | None = None):
    args = parse_args(argv)
    objects = load_objects()
    if args.train:
        train_on_folders(args, objects)
        return
    folder = args.folders[0]
    labels_path = args.labels or labels_of(folder, ROOT / f"{folder.resolve().name}.json")
    evaluator = evaluation_model(args.weights)
    print(f"evaluator: {evaluator.path}, labels: {labels_path}")
    accuracy, exact = score_folder(evaluator, folder, labels_path, objects)
    print(f"accuracy: {accuracy:.4f}, exact set: {exact:.4f}")


if __name__ == "__main__":
    main()
