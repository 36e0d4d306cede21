"""Muon, worked out in float32.

`torch.optim.Muon` turns matrices in bfloat16, which a CPU without instructions for it imitates: that took
seven tenths of a training step of the bundled models. Here they are turned in float32, those of one shape together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# Of the odd polynomial that takes singular values in (0, 1] near 1 in five rounds (Jordan et al. 2024, "Muon").
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315
ROUNDS = 5


def turned(matrices: Tensor) -> Tensor:
    """Nearly orthogonal factors of matrices, float32 [count, rows, columns]: singular vectors kept, values near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=CUBIC, alpha=QUINTIC), x, beta=LINEAR)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum turned into an orthogonal matrix, with steps as large as AdamW's (Jordan et al. 2024).

    Args:
        params: matrices [rows, columns], float32.
        lr: the learning rate; a matrix moves by 0.2 lr in the root of its mean square, as under AdamW.
        momentum: of the running mean of gradients, looked ahead by one step (Nesterov).
        weight_decay: decoupled from the gradient.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for (rows, columns), matrices in alike.items():
                ahead = torch.stack([self._ahead(matrix, group["momentum"]) for matrix in matrices])
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(rows, columns) ** 0.5
                torch._foreach_add_(matrices, list(turned(ahead)), alpha=-group["lr"] * size)

    def _ahead(self, matrix: Tensor, momentum: float) -> Tensor:
        """The gradient's running mean, one step ahead."""
        state = self.state[matrix]
        if not state:
            state["mean"] = torch.zeros_like(matrix)
        mean = state["mean"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(mean, momentum)
