"""Whether the attention of trained weights still compares, or has saturated: a table in Markdown.

    python benchmarks/checks/check_attention.py weights/small

One row for each attention of the network, over noisy pictures of data/held_out.npz at timesteps from 100 to 900.
Logits are what the softmax gets. "Keys seen" is the exponential of the entropy of its weights: from 1, where a token
sees one token alone, to the number of tokens. Attention with logits in the hundreds sees one key; it hardly gets a
gradient, and in bf16 most of what it gets are rounding errors.
"""

import sys
from collections import defaultdict
from pathlib import Path

import torch
from diffusers.models.attention_processor import Attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from checkpoint import load_weights
from data.pack import HELD_OUT
from dataset import ICLEVRDataset, to_float
from infra.commands import ROOT, Parser, command, to_path
from label_files import load_objects

TIMESTEPS = (100, 300, 500, 700, 900)
PICTURES = 16  # at each timestep
COLUMNS = ("tokens", "rms of features", "largest logit", "keys seen")


def inspect(attention: Attention, features: torch.Tensor, mask: torch.Tensor | None) -> list[float]:
    """The COLUMNS of a self-attention for its features, [B, C, H, W] or [B, T, C]. `mask` [B, 1, T] is added to the
    logits, but does not count as one."""
    if features.ndim == 4:
        features = features.flatten(2).mT
    if attention.group_norm is not None:
        features = attention.group_norm(features.mT).mT
    queries = attention.to_q(features).unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # [B, heads, T, width]
    keys = attention.to_k(features).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    if attention.norm_q is not None:
        queries = attention.norm_q(queries)
        keys = attention.norm_k(keys)
    logits = attention.scale * queries @ keys.mT
    largest = logits.abs().max().item()
    if mask is not None:
        logits = logits + mask[:, None]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    rms = features.square().mean().sqrt().item()
    return [features.shape[1], rms, largest, entropy.exp().mean().item()]


@torch.inference_mode()
def measure(folder: Path) -> dict[str, list[float]]:
    """For each attention of the weights in `folder`: the COLUMNS, the largest of the logits and the mean of the
    others. Raises InputError."""
    model, noise_scheduler, _ = load_weights(folder)
    data = ICLEVRDataset(HELD_OUT, ROOT / "train.json", load_objects())
    found: dict[str, list[list[float]]] = defaultdict(list)

    def watch(name: str):
        def hook(attention: Attention, args: tuple, options: dict):
            found[name].append(inspect(attention, args[0], options.get("attention_mask")))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(watch(name), with_kwargs=True)
    torch.manual_seed(0)
    clean = to_float(data.images[:PICTURES])
    for timestep in TIMESTEPS:
        timesteps = torch.full((PICTURES,), timestep)
        noisy = noise_scheduler.add_noise(clean, torch.randn_like(clean), timesteps)
        model(noisy, timesteps, data.labels[:PICTURES])
    summary = {}
    for name, calls in found.items():
        rows = torch.tensor(calls)
        means = rows.mean(0).tolist()
        means[2] = rows[:, 2].max().item()
        summary[name] = means
    return summary


@command
def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=to_path, nargs="+", help="folder of weights, or of a run")
    args = parser.parse_args(argv)
    for folder in args.weights:
        print(f"\n{folder}\n\n| attention | {' | '.join(COLUMNS)} |\n" + "|---" * 5 + "|")
        for name, (tokens, rms, logit, keys) in measure(folder).items():
            print(f"| {name} | {tokens:.0f} | {rms:.1f} | {logit:.0f} | {keys:.1f} |")


if __name__ == "__main__":
    main()
