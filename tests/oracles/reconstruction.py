"""Block reconstruction as one plain loop: draws, a forward pass written out, autograd, and Adam by its formulas.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   p <- p - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + 1e-8)
    lr_u = lr (1 + cos(pi u / U)) / 2,   u = 0..U-1,   k = u + 1

Source: Kingma and Ba, *Adam*, arXiv 1412.6980, algorithm 1; the block and its loss: BRECQ, arXiv 2102.05426.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles.generator import encode
from tests.oracles.straight_through import rounded

B1, B2, EPSILON = 0.9, 0.999, 1e-8


@dataclass
class FakeQuantizer:
    """An activation quantizer as numbers; LSQ's gradients by plain autograd.

    Args:
        p: codes are 0..p.
        rho: raw step size, 0-dim or one for each group of time steps; None where there is a generator.
        generator: (weight, bias) of each layer of f; None where there is a rho.
        zeta: z = round(p zeta), or None.
        beta: z = round(-beta / s), or None.
    """

    p: int
    rho: Tensor | None = None
    generator: list[tuple[Tensor, Tensor]] | None = None
    zeta: Tensor | None = None
    beta: Tensor | None = None

    def step_size(self, t: int, total: int) -> Tensor:
        """s at one time step, 0-dim."""
        if self.generator is None:
            assert self.rho is not None
            rho = self.rho if self.rho.dim() == 0 else self.rho[t * len(self.rho) // total]
            return F.softplus(rho)
        h = torch.tensor(encode(t, self.generator[0][0].shape[1]), dtype=torch.float64)
        for layer, (weight, bias) in enumerate(self.generator):
            h = weight.double() @ (h if layer == 0 else h.relu()) + bias.double()
        return F.softplus(h).squeeze().float()

    def __call__(self, x: Tensor, t: Tensor, total: int) -> Tensor:
        """x_hat, a sample at a time."""
        samples = []
        for sample, at in zip(x, t.tolist(), strict=True):
            s = self.step_size(at, total)
            scale = (sample.numel() * self.p) ** -0.5  # LSQ's, on the gradient of s alone
            s = s.detach() + (s - s.detach()) * scale
            z = rounded(self.zeta * self.p) if self.beta is None else rounded(-self.beta / s)
            v = torch.minimum(torch.maximum(sample / s, 0 - z), self.p - z)
            samples.append(rounded(v) * s)
        return torch.stack(samples)


def block_loss(found: Tensor, target: Tensor, power: float) -> float:
    """`mean_{B, pixels} sum_channels |found - target|^p` of `[B, C, ...]`, added up number by number."""
    total = 0.0
    for one, other in zip(found.flatten().tolist(), target.flatten().tolist(), strict=True):
        total += abs(one - other) ** power
    return total / (found.numel() / found.shape[1])


def residual_block(
    block: dict[str, Tensor],
    groups: int,
    epsilon: float,
    x: Tensor,
    temb: Tensor,
    quantize: Callable[[str, Tensor], Tensor],
) -> Tensor:
    """diffusers' `ResnetBlock2D`, without up- or downsampling.

    Args:
        block: weights (quantized already) and biases, `conv1.weight`, `norm1.bias` and so on.
        groups, epsilon: of the group norms.
        x: `[B, C, H, W]`.
        temb: embedding of the time step, `[B, D]`.
        quantize: x_hat of a layer's input, by the layer's name.
    """
    h = F.silu(F.group_norm(x, groups, block["norm1.weight"], block["norm1.bias"], epsilon))
    h = F.conv2d(quantize("conv1", h), block["conv1.weight"], block["conv1.bias"], padding=1)
    shift = F.linear(
        quantize("time_emb_proj", F.silu(temb)),
        block["time_emb_proj.weight"],
        block["time_emb_proj.bias"],
    )
    h = h + shift[:, :, None, None]
    h = F.silu(F.group_norm(h, groups, block["norm2.weight"], block["norm2.bias"], epsilon))
    h = F.conv2d(quantize("conv2", h), block["conv2.weight"], block["conv2.bias"], padding=1)
    if "conv_shortcut.weight" in block:
        x = F.conv2d(
            quantize("conv_shortcut", x), block["conv_shortcut.weight"], block["conv_shortcut.bias"]
        )
    return x + h


def descend(
    parameters: list[tuple[Tensor, float]],
    loss_at: Callable[[int], Tensor],
    updates: int,
    cosine: bool = True,
) -> list[float]:
    """Adam on some leaves, in place; the losses.

    Args:
        parameters: each with its full learning rate.
        loss_at: the loss of an update, on that update's samples.
        updates: U.
        cosine: let the rates fall to zero.
    """
    m = [torch.zeros_like(p) for p, _ in parameters]
    v = [torch.zeros_like(p) for p, _ in parameters]
    losses = []
    for update in range(updates):
        loss = loss_at(update)
        gradients = torch.autograd.grad(loss, [p for p, _ in parameters], allow_unused=True)
        share = (1 + math.cos(math.pi * update / updates)) / 2 if cosine else 1.0
        for i, ((p, lr), g) in enumerate(zip(parameters, gradients, strict=True)):
            if g is None:
                continue
            m[i] = B1 * m[i] + (1 - B1) * g
            v[i] = B2 * v[i] + (1 - B2) * g * g
            mean, square = m[i] / (1 - B1 ** (update + 1)), v[i] / (1 - B2 ** (update + 1))
            with torch.no_grad():
                p -= lr * share * mean / (square.sqrt() + EPSILON)
        losses.append(float(loss.detach()))
    return losses
