"""The Muon optimizer (Jordan et al., kellerjordan.github.io/posts/muon) in few kernels.

A step is that of `timm.optim.Muon(nesterov=True)`, whose own parts it is made of. timm takes one matrix after
the other, which on a GPU is a thousand small kernels; here matrices of one shape are orthogonalised together.
"""

from collections import defaultdict

import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from timm.optim.nadamw import nadamw

from infra.device import has_fast_bf16

# timm's:
MOMENTUM = 0.95
BETAS = (0.9, 0.95)
EPSILON = 1e-7
# Of the five Newton-Schulz iterations (leloykun.github.io/ponder/muon-opt-coeffs), timm's "quintic".
COEFFICIENTS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def is_matrix(parameter: torch.Tensor) -> bool:
    """Whether a parameter is orthogonalised: weights of linear layers and convolutions, unless very thin."""
    return parameter.ndim > 1 and min(parameter.shape[0], parameter[0].numel()) >= 4


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


def as_matrix(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A weight [out, in, ...], or another tensor of its shape, as a matrix [out, in * ...].

    The columns stand in the order of the parameter's memory, which on a GPU is channels_last, so that nothing
    is copied. To orthogonalise a matrix with its columns in another order is the same but for that order.
    """
    if tensor.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten(1)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by a Newton-Schulz iteration for matrices, NAdamW for all other parameters.

    `lr`: of both; a matrix's step is as large as AdamW's would be (arXiv 2502.16982, equation 4). `dtype`: of
    the iteration, by default bf16, as timm's, but fp32 on a CPU on which bf16 takes ten times as long.
    """

    def __init__(self, params, lr: float, dtype: torch.dtype | None = None):
        super().__init__(params, {"lr": lr})
        device = self.param_groups[0]["params"][0].device
        self.dtype = dtype or (torch.bfloat16 if has_fast_bf16(device) else torch.float32)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            self._step_matrices([p for p in parameters if is_matrix(p)], group["lr"])
            self._step_others([p for p in parameters if not is_matrix(p)], group["lr"])
        return loss

    def _step_matrices(self, parameters: list[torch.Tensor], lr: float):
        if not parameters:
            return
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [gradient_of(p) for p in parameters]
        momenta = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        updates = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's

        of_shape = defaultdict(list)  # shape of the matrix -> pairs of matrices: parameter and update
        for p, update in zip(parameters, updates, strict=True):
            matrix = as_matrix(p, p)
            of_shape[matrix.shape].append((matrix, as_matrix(update, p)))
        for shape, pairs in of_shape.items():
            stacked = torch.stack([update for _, update in pairs])  # [K, out, in]
            orthogonal = zeropower_via_newtonschulz(stacked, len(COEFFICIENTS), COEFFICIENTS, EPSILON, dtype=self.dtype)
            orthogonal = orthogonal.float().contiguous()
            scale = get_lr_scale(shape, "match_rms_adamw")
            torch._foreach_add_([matrix for matrix, _ in pairs], list(orthogonal), alpha=-lr * scale)

    def _step_others(self, parameters: list[torch.Tensor], lr: float):
        if not parameters:
            return
        for p in parameters:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros(())  # on the CPU, where it is read without waiting
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in parameters]
        nadamw(
            parameters,
            [gradient_of(p) for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=0.0,
            eps=EPSILON,
            caution=False,
            maximize=False,
            max_lr=None,
        )
