"""Generators fitted to each tensor's own quantization error over t, without reconstruction: MinMax + TDQ.

    L = sum over quantizers of  mean (x_hat(t) - x)^2 / mean x^2

x are random values of each tensor in the float network, kept with the t of their sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.draws import Stream, generator, seed_global
from tdq_exp.fit.loop import cosine
from tdq_exp.fit.ptq.reconstruct import trainable
from tdq_exp.fit.qat import Rates, optimizer_groups
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.time import TimeContext
from tdq_exp.runtime.progress import track

VALUES = 256  # of each tensor and sample


@dataclass
class Values:
    """An observer that keeps random values of every sample.

    Args:
        seen: by number of the batch, `[B, VALUES]`.
    """

    batch: int = 0
    seen: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        rows = x.detach().float().flatten(1)
        g = torch.Generator().manual_seed(self.batch)
        pick = torch.randint(rows.shape[1], (VALUES,), generator=g)
        self.seen[self.batch] = rows[:, pick.to(rows.device)].cpu()

    def all(self) -> Tensor:
        """`[N, VALUES]`, in the order of the batches."""
        return torch.cat([self.seen[number] for number in sorted(self.seen)])


@contextmanager
def observed(quantizers: Mapping[str, Quantizer]) -> Iterator[dict[str, Values]]:
    """Quantizers let everything pass within the block, and keep random values of it."""
    observers = {name: Values() for name in quantizers}
    for name, quantizer in quantizers.items():
        quantizer.observer = observers[name]
    try:
        yield observers
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None


def fit_over_time(
    quantizers: dict[str, Quantizer], values: dict[str, Tensor], t: Tensor, time: TimeContext, *, updates: int,
    batch_size: int, rates: Rates, seed: int, device: torch.device, show: bool = True,
) -> tuple[float, float]:  # fmt: skip
    """Trains step sizes over t and zero points, in place; returns the mean relative error before and after.

    Args:
        quantizers: activation quantizers of one network, calibrated.
        values: of each, `[N, V]`.
        t: of each sample, `[N]`.
        time: the network's.
        updates, batch_size, rates: of Adam; the rates fall to zero along a cosine.
        seed: of the draws.
    """
    scale = {name: float(v.square().mean().clamp(min=1e-20)) for name, v in values.items()}

    def error(index: Tensor) -> Tensor:
        time.set(t[index].to(device))
        terms = []
        for name, quantizer in quantizers.items():
            x = values[name][index].to(device)
            terms.append((quantizer(x) - x).square().mean() / scale[name])
        return torch.stack(terms).mean()

    def whole() -> float:
        with torch.no_grad():
            parts = torch.arange(len(t)).split(1024)
            return sum(float(error(part)) * len(part) for part in parts) / len(t)

    seed_global(seed, Stream.OVER_TIME_NOISE)  # dropout of generators, if any: the same in every process
    before = whole()
    with trainable(quantizers) as learned, track("fitting over time", updates, show=show) as advance:
        optimizer = torch.optim.Adam(optimizer_groups(learned, rates), fused=True)
        full = [group["lr"] for group in optimizer.param_groups]
        for update in range(updates):
            for group, rate in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = rate * cosine(update, updates)
            g = generator(seed, Stream.OVER_TIME_BATCH, update)
            loss = error(torch.randint(len(t), (batch_size,), generator=g))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
            optimizer.step()
            advance(f"error {float(loss.detach()):.4f}")
    return before, whole()
