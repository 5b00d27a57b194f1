"""Block reconstruction: the intervals of one block are trained so that its output is the float block's.

    L = mean_{B, pixels} sum_channels |y_hat - y|^p,   p = 2.4
    y_hat = block_hat(x_hat),  x_hat from the already quantized network;   y from the float network

First, if asked for, each weight's rounding (AdaRound, p = 2); then step sizes and zero points of the activations, or
TDQ's generators. Adam, its rate falling to zero along a cosine. A block whose loss on held-out samples did not fall keeps
its start values.

L counts every sample alike, but a diffusion network's errors differ over t by orders of magnitude: the few samples of the
smallest t may be nearly all of the sum, while it is at large t that an error becomes an image. `balance` divides each
sample's part by what samples of like t lose at the start, so that every time step counts alike.

Source: Li et al., *BRECQ*, arXiv 2102.05426, section 3.2, and its published options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.draws import Stream, generator, share_of
from tdq_exp.fit.loop import cosine
from tdq_exp.fit.ptq.blocks import Block, Call
from tdq_exp.fit.ptq.capture import Spill
from tdq_exp.fit.qat import Rates, optimizer_groups
from tdq_exp.quant.convert import coded_weight
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.temporal import GeneratorBank, Temporal
from tdq_exp.quant.layers import QuantLayer
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.rules.adaround import AdaRound, beta_at
from tdq_exp.quant.time import TimeContext
from tdq_exp.runtime.processes import Processes


@dataclass(frozen=True)
class ReconstructOptions:
    """Numbers of one block's reconstruction.

    Args:
        updates: of the activations' intervals.
        batch_size: samples of an update, over all processes.
        lr: of rho (step sizes) and of lower bounds.
        lr_zero_point: of zeta, the share of the grid that one update can move.
        lr_generator: of TDQ's generators.
        power: p of the activations' loss.
        balance: weigh time steps alike, see the module.
        rounding: `nearest`, or `adaround`.
        rounding_updates, lr_rounding, rounding_weight: AdaRound's number of updates, rate of V, and lambda.
        beta_start, beta_end, rounding_warmup: see `adaround.beta_at`.
    """

    updates: int
    batch_size: int
    lr: float
    lr_zero_point: float
    lr_generator: float
    power: float = 2.4
    balance: bool = False
    rounding: str = "nearest"
    rounding_updates: int = 20000
    lr_rounding: float = 1e-3
    rounding_weight: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    rounding_warmup: float = 0.2

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "adaround"):
            raise ValueError(f"fit.rounding={self.rounding!r}: choose nearest or adaround")
        for name in ("updates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"fit.{name}={getattr(self, name)}: must be at least 1")


@dataclass
class BlockData:
    """What a block is shown and what it should answer.

    Args:
        call: how the block is called; its tensors are an example.
        inputs: of each tensor argument, one row per sample.
        target: the float block's output, one row per sample.
        t: time step of every sample, `[N]`.
        train, held_out: indices of the samples.
    """

    call: Call
    inputs: list[Spill]
    target: Spill
    t: Tensor
    train: Tensor
    held_out: Tensor


def output_loss(found: Tensor, target: Tensor, power: float, weights: Tensor | None = None) -> Tensor:
    """`mean sum_c |found - target|^p` of `[B, C, ...]`, scalar.

    Args:
        weights: multiply each sample's part, `[B]`.
    """
    if weights is None:
        return (found - target).abs().pow(power).sum(1).mean()
    return (sample_losses(found, target, power) * weights).mean()


def sample_losses(found: Tensor, target: Tensor, power: float) -> Tensor:
    """As `output_loss`, of each sample, `[B]`."""
    each = (found - target).abs().pow(power).sum(1)
    return each.flatten(1).mean(1) if each.dim() > 1 else each


def balancing_weights(t: Tensor, losses: Tensor, at: Tensor, groups: int = 20) -> Tensor:
    """1 / the mean loss of samples of like t, over their mean, `[N]`: the weighted loss is of the plain one's size.

    Args:
        t: time steps of the samples whose losses are known, `[M]`.
        losses: theirs, positive.
        at: time steps to give weights to, `[N]`.
        groups: neighbours in t are averaged in so many groups of equal size; equal t are never parted.
    """
    order = t.argsort(stable=True)
    edges = t[order][[round(g * (len(t) - 1) / groups) for g in range(1, groups)]].unique()
    group = torch.bucketize(t, edges)  # edges[g - 1] < t <= edges[g]
    sums = torch.zeros(len(edges) + 1).index_add_(0, group, losses)
    counts = torch.zeros(len(edges) + 1).index_add_(0, group, torch.ones_like(losses))
    means = sums / counts.clamp(min=1)
    means = torch.where(counts > 0, means, means[counts > 0].mean())
    means = means.clamp(
        min=max(1e-4 * float(means.max()), 1e-30)
    )  # what is next to nothing gets no weight without bound
    weights = (1 / means)[torch.bucketize(at, edges)]
    return weights * (losses.mean() / (losses * (1 / means)[group]).mean())


class Reconstruction:
    """One block under reconstruction.

    Args:
        net: the quantized network that the block is part of, in eval mode, its weights coded.
        block: which part.
        data: see `BlockData`.
        options: numbers.
        key: of the draws: (seed, index of the block).
        processes: who shares a batch.
    """

    def __init__(
        self, net: nn.Module, block: Block, data: BlockData, options: ReconstructOptions, key: tuple[int, int],
        processes: Processes,
    ) -> None:  # fmt: skip
        self.module, self.block, self.data, self.options = net.get_submodule(block.name), block, data, options
        self.key, self.processes = key, processes
        self.time: TimeContext = net.time  # type: ignore[assignment]
        self.weights: Tensor | None = None  # of the samples, if time steps are balanced

    @torch.no_grad()
    def balance(self, index: Tensor) -> None:
        """Weighs samples by what those of `index` lose now, which every process learns from the main one."""
        o = self.options

        def each() -> Tensor:
            parts = index.split(o.batch_size)
            targets = (self.data.target.take(part).to(self.processes.device) for part in parts)
            found = (sample_losses(self.output(p), y, o.power) for p, y in zip(parts, targets, strict=True))
            return torch.cat(list(found))

        losses = self.processes.decide(lambda: each().cpu())
        self.weights = balancing_weights(self.data.t[index], losses, self.data.t)

    def _weights(self, index: Tensor) -> Tensor | None:
        return None if self.weights is None else self.weights[index].to(self.processes.device)

    def output(self, index: Tensor) -> Tensor:
        """y_hat of some samples; their time steps stay set, for the backward pass."""
        device = self.processes.device
        self.time.set(self.data.t[index].to(device))
        return self.data.call.again(self.module, [spill.take(index).to(device) for spill in self.data.inputs])

    @torch.no_grad()
    def loss(self, index: Tensor, power: float) -> float:
        """Loss over some samples, in eval mode."""
        total = 0.0
        for part in index.split(self.options.batch_size):
            target = self.data.target.take(part).to(self.processes.device)
            total += float(output_loss(self.output(part), target, power, self._weights(part))) * len(part)
        return total / len(index)

    def train_activations(self, advance: Callable[[str], None]) -> None:
        """Trains step sizes, zero points and generators of the block's activation quantizers, in place."""
        o = self.options
        rates = Rates(0.0, 0.0, o.lr, o.lr_zero_point, o.lr_generator, 0.0)
        with trainable(self.block.quantizers) as learned:
            self._descend(optimizer_groups(learned, rates), o.updates, 0, lambda u, loss: loss, o.power, advance)

    def train_rounding(
        self,
        layers: Mapping[str, QuantLayer],
        weights: Mapping[str, tuple[Tensor, Grid]],
        advance: Callable[[str], None],
    ) -> None:
        """Trains the rounding of the block's weights with its activations in float, and codes them anew, in place.

        Args:
            layers: the block's layers, by name, with coded weights.
            weights: of each, the float weight and its grid.
        """
        options, rounding = self.options, {}
        for name, layer in layers.items():
            coded: Any = layer.weight_quantizer
            weight, grid = weights[name]
            zero = torch.zeros_like(coded.step_size) if coded.zero_point is None else coded.zero_point
            rounding[name] = AdaRound(weight, coded.step_size, zero, grid.n, grid.p)
            layer.weight_quantizer = rounding[name]
        for quantizer in self.block.quantizers.values():
            quantizer.observer = lambda x: None  # passes through

        def total(update: int, loss: Tensor) -> Tensor:
            beta = beta_at(
                update, options.rounding_updates, options.beta_start, options.beta_end, options.rounding_warmup
            )
            if beta is None:
                return loss
            # Each process adds the whole term and gradients are averaged, so it counts once.
            return loss + options.rounding_weight * torch.stack([r.regularizer(beta) for r in rounding.values()]).sum()

        groups = [{"params": [r.V for r in rounding.values()], "lr": options.lr_rounding}]
        try:
            self._descend(groups, options.rounding_updates, 1, total, 2.0, advance, falling=False)
        finally:
            for quantizer in self.block.quantizers.values():
                quantizer.observer = None
        for name, layer in layers.items():
            r = rounding[name]
            layer.weight_quantizer = coded_weight(r.codes(), r.s, r.z, r.n, r.p).to(self.processes.device)

    def _descend(
        self, groups: list[dict[str, Any]], updates: int, phase: int, total: Callable[[int, Tensor], Tensor],
        power: float, advance: Callable[[str], None], falling: bool = True,
    ) -> None:  # fmt: skip
        parameters = [p for group in groups for p in group["params"]]
        optimizer = torch.optim.Adam(groups, fused=True)
        rates = [group["lr"] for group in optimizer.param_groups]
        batch = self.options.batch_size
        share = share_of(batch, self.processes.rank, self.processes.world)
        for update in range(updates):
            factor = cosine(update, updates) if falling else 1.0
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            g = generator(self.key[0], Stream.BLOCK_BATCH, self.key[1], phase, update)
            index = self.data.train[torch.randint(len(self.data.train), (batch,), generator=g)][share]
            target = self.data.target.take(index).to(self.processes.device)
            loss = total(update, output_loss(self.output(index), target, power, self._weights(index)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.processes.world > 1:
                self._average(parameters)
            optimizer.step()
            advance(f"{self.block.name} {float(loss.detach()):.3g}")

    def _average(self, parameters: list[nn.Parameter]) -> None:
        """Means of the gradients over processes, in one message."""
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in parameters if p.grad is not None]
        mean = self.processes.mean(torch.cat([g.reshape(-1) for g in grads]))
        for grad, part in zip(grads, mean.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.reshape(grad.shape))


@contextmanager
def trainable(quantizers: Mapping[str, Quantizer]) -> Iterator[nn.ModuleList]:
    """Some quantizers in training form, with trainable copies of their generators; these are taken back at the end.

    Yields:
        All that is to be trained, and nothing else of the network.
    """
    timed = {name: q.interval for name, q in quantizers.items() if isinstance(q.interval, Temporal)}
    banks = {id(interval.bank): interval.bank for interval in timed.values()}
    parts: dict[int, GeneratorBank] = {}
    for key, bank in banks.items():
        rows = [interval.row for interval in timed.values() if interval.bank is bank]
        parts[key] = bank.subset(rows).train()
        for name, interval in timed.items():
            if interval.bank is bank:
                quantizers[name].interval = Temporal(parts[key], rows.index(interval.row))
    learned = nn.ModuleList([*(q.train() for q in quantizers.values()), *parts.values()])
    try:
        yield learned
    finally:
        for q in quantizers.values():
            q.eval()
        for key, bank in banks.items():
            bank.take_back(parts[key])
        for name, interval in timed.items():
            quantizers[name].interval = interval
