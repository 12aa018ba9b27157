"""Give trained weights normalized attention and a transformer in the middle, to be trained on:

    python benchmarks/grow.py runs/small runs/grown
    python train.py --model small --init runs/grown

For weights whose attention has saturated (benchmarks/checks/check_attention.py). All weights are kept but those of the
attention in the middle, which starts anew.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import load_weights, write_weights
from infra.commands import InputError, Parser, command, number, to_path, to_seed
from infra.files import refuse_foreign
from network import ConditionalUNet

LARGEST_LOGIT = 12.0  # of a query and a key in the same direction, to start with


def grow(model: ConditionalUNet, layers: int) -> ConditionalUNet:
    """The network of `model` with normalized attention and a transformer of so many layers in its middle.

    Queries and keys lose their lengths. In the middle of the network the attention gets a group norm too, so what it
    predicted is lost: it starts with zeros, as the transformer does.
    """
    grown = ConditionalUNet.from_config(model.config, normalize_attention=True, middle_layers=layers)
    grown.load_state_dict(model.state_dict(), strict=False)  # the norms and the transformer are new
    for name, weight in grown.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight")) and not name.startswith("middle."):
            # normed queries and keys have a squared length of `head_dim`, and logits are divided by its root
            torch.nn.init.constant_(weight, (LARGEST_LOGIT / len(weight) ** 0.5) ** 0.5)
    middle = grown.unet.mid_block.attentions[0]
    torch.nn.init.zeros_(middle.to_out[0].weight)
    torch.nn.init.zeros_(middle.to_out[0].bias)
    for part in (middle.to_q, middle.to_k, middle.to_v):
        part.reset_parameters()
    return grown


@command
def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__.split(",")[0] + ".")
    parser.add_argument("source", type=to_path, help="folder of weights, or of a run")
    parser.add_argument("out", type=to_path, help="folder to write")
    parser.add_argument("--layers", type=number(int, 1, 16), default=4, help="of the transformer (default: 4)")
    parser.add_argument("--seed", type=to_seed, default=0, help="of what is new (default: 0)")
    args = parser.parse_args(argv)
    refuse_foreign(args.out, False, "nothing")
    model, noise_scheduler, metadata = load_weights(args.source)
    config = model.config
    if config.conditioning != "linear" or config.normalize_attention or config.middle_layers:
        raise InputError(
            f"{args.source}: expected a network without cross-attention, normalized attention or transformer"
        )
    torch.manual_seed(args.seed)
    grown = grow(model, args.layers)
    write_weights(args.out, grown, noise_scheduler, metadata)
    parameters = sum(p.numel() for p in grown.parameters())
    print(f"{args.out}: {parameters / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
