"""A denoiser: a network together with the description that says how to call it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tdq_exp.models.pixel import DiffusionModel


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A function (x_t, t) -> eps_hat.

    Two denoisers are equal if they share network, description and condition, so that a sampler can
    keep what it recorded for one of them.

    Args:
        net: in eval mode.
        model: its description.
        condition: what the network is told beside t, such as class labels `[B]`; None for an
            unconditional model.
    """

    net: nn.Module
    model: DiffusionModel
    condition: Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in x_t.

        Args:
            x_t: `[B, C, H, W]`.
            t: `[B]`, or 0-dim for a batch at one time step.

        Returns:
            eps_hat, `[B, C, H, W]`.
        """
        return self.model.predict(self.net, x_t, t, self.condition)

    def conditioned(self, condition: Tensor | None, device: torch.device) -> Denoiser:
        """Return a denoiser of the same network with the condition of another batch.

        Args:
            condition: `[B, ...]`; a tensor on the device is read where it is, and None leaves this
                denoiser as it is.
            device: of the network.
        """
        return self if condition is None else replace(self, condition=condition.to(device))

    def residual_variance(self, t: int) -> float:
        """Return the variance of the prediction's own error at t, if the network knows it; else 0.

        A network with a correction (see `fit.correction`) holds it as a table over t.
        """
        correction = dict(self.net.named_children()).get("correction")
        return 0.0 if correction is None else float(correction.get_buffer("variance")[t])

    def _parts(self) -> tuple[int, int, int]:
        return id(self.net), id(self.model), id(self.condition)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Denoiser) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())
