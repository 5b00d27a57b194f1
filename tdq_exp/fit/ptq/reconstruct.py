"""Block reconstruction: step sizes are trained so that a block's output is the float block's.

    L = mean_{B, pixels} sum_channels |y_hat - y|^p,   p = 2.4
    y_hat = block_hat(x_hat),  x_hat from the already quantized network;   y from the float network

First, if asked for, each weight's rounding (AdaRound, p = 2); then step sizes and zero points of
the activations, or TDQ's generators. Adam, its rate falling to zero along a cosine. A block whose
loss on held-out samples did not fall keeps its start values.

L counts every sample alike, but a diffusion network's errors differ over t by orders of magnitude:
the few samples of the smallest t may be nearly all of the sum, while it is at large t that an error
becomes an image. `balance` divides each sample's part by what samples of like t lose at the start,
so that every time step counts alike.

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
from tdq_exp.fit.options import ReconstructOptions, cosine
from tdq_exp.fit.ptq.blocks import Block, Call
from tdq_exp.fit.ptq.capture import Spill
from tdq_exp.fit.qat import Rates, optimizer_groups
from tdq_exp.quant.convert import coded_weight
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import Bank, Interval
from tdq_exp.quant.layers import QuantLayer
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.rules.adaround import AdaRound, beta_at
from tdq_exp.quant.time import TimeContext
from tdq_exp.runtime.processes import Processes


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


def rates_of_block(options: ReconstructOptions) -> Rates:
    """Return the rates of step sizes, zero points and generators; weights are not trained."""
    return Rates(
        step_size=options.lr, zero_point=options.lr_zero_point, generator=options.lr_generator
    )


def output_loss(
    found: Tensor, target: Tensor, power: float, weights: Tensor | None = None
) -> Tensor:
    """Return `mean sum_c |found - target|^p` of `[B, C, ...]`, scalar.

    Args:
        weights: multiply each sample's part, `[B]`.
    """
    if weights is None:
        return (found - target).abs().pow(power).sum(1).mean()
    return (sample_losses(found, target, power) * weights).mean()


def sample_losses(found: Tensor, target: Tensor, power: float) -> Tensor:
    """Return the loss of each sample, `[B]`; see `output_loss`."""
    each = (found - target).abs().pow(power).sum(1)
    return each.flatten(1).mean(1) if each.dim() > 1 else each


def balancing_weights(t: Tensor, losses: Tensor, at: Tensor, groups: int = 20) -> Tensor:
    """Return 1 / the mean loss of samples of like t, `[N]`, scaled to keep the loss' size.

    Args:
        t: time steps of the samples whose losses are known, `[M]`.
        losses: theirs, positive.
        at: time steps to give weights to, `[N]`.
        groups: neighbours in t are averaged in so many groups of equal size; equal t stay together.
    """
    order = t.argsort(stable=True)
    edges = t[order][[round(g * (len(t) - 1) / groups) for g in range(1, groups)]].unique()
    group = torch.bucketize(t, edges)  # edges[g - 1] < t <= edges[g]

    sums = torch.zeros(len(edges) + 1).index_add_(0, group, losses)
    counts = torch.zeros(len(edges) + 1).index_add_(0, group, torch.ones_like(losses))
    means = sums / counts.clamp(min=1)
    means = torch.where(counts > 0, means, means[counts > 0].mean())

    # What is next to nothing gets no weight without bound.
    means = means.clamp(min=max(1e-4 * float(means.max()), 1e-30))

    weights = (1 / means)[torch.bucketize(at, edges)]
    return weights * (losses.mean() / (losses * (1 / means)[group]).mean())


@dataclass(frozen=True)
class Phase:
    """One of the two fits of a block.

    Args:
        number: part of the key of its draws.
        updates: how many.
        power: p of its loss.
        falling: whether the rates fall to zero along a cosine.
    """

    number: int
    updates: int
    power: float
    falling: bool


class Reconstruction:
    """One block under reconstruction.

    Args:
        net: the quantized network that the block is part of, in eval mode, its weights coded.
        block: which part.
        data: what the block is shown and what it should answer.
        options: numbers.
        key: of the draws: (seed, index of the block).
        processes: who shares a batch.
    """

    def __init__(
        self,
        net: nn.Module,
        block: Block,
        data: BlockData,
        options: ReconstructOptions,
        key: tuple[int, int],
        processes: Processes,
    ) -> None:
        self.module, self.block, self.data = net.get_submodule(block.name), block, data
        self.options, self.key, self.processes = options, key, processes
        self.time: TimeContext = net.time  # type: ignore[assignment]
        self.weights: Tensor | None = None  # of the samples, if time steps are balanced

    @torch.no_grad()
    def balance(self, index: Tensor) -> None:
        """Weigh samples by what those of `index` lose now; the main process decides for all."""
        o = self.options

        def losses_now() -> Tensor:
            each = []
            for part in index.split(o.batch_size):
                target = self.data.target.take(part).to(self.processes.device)
                each.append(sample_losses(self.output(part), target, o.power))
            return torch.cat(each).cpu()

        losses = self.processes.decide(losses_now)
        self.weights = balancing_weights(self.data.t[index], losses, self.data.t)

    def _weights(self, index: Tensor) -> Tensor | None:
        return None if self.weights is None else self.weights[index].to(self.processes.device)

    def output(self, index: Tensor) -> Tensor:
        """Return y_hat of some samples; their time steps stay set, for the backward pass."""
        device = self.processes.device
        self.time.set(self.data.t[index].to(device))
        inputs = [spill.take(index).to(device) for spill in self.data.inputs]
        return self.data.call.again(self.module, inputs)

    @torch.no_grad()
    def loss(self, index: Tensor, power: float) -> float:
        """Return the loss over some samples, in eval mode."""
        total = 0.0
        for part in index.split(self.options.batch_size):
            target = self.data.target.take(part).to(self.processes.device)
            mean = output_loss(self.output(part), target, power, self._weights(part))
            total += float(mean) * len(part)
        return total / len(index)

    def train_activations(self, advance: Callable[[str], None]) -> None:
        """Train step sizes, zero points and generators of the block's activations, in place."""
        o = self.options
        phase = Phase(number=0, updates=o.updates, power=o.power, falling=True)
        with trainable(self.block.quantizers) as learned:
            groups = optimizer_groups(learned, rates_of_block(o))
            self._descend(groups, phase, lambda update, loss: loss, advance)

    def train_rounding(
        self,
        layers: Mapping[str, QuantLayer],
        weights: Mapping[str, tuple[Tensor, Grid]],
        advance: Callable[[str], None],
    ) -> None:
        """Train the rounding of the block's weights, activations in float, and code them anew.

        Args:
            layers: the block's layers, by name, with coded weights.
            weights: of each, the float weight and its grid.
            advance: called after every update.
        """
        o = self.options

        # 1. AdaRound in place of the codes, and activations that pass through.
        rounding: dict[str, AdaRound] = {}
        for name, layer in layers.items():
            coded: Any = layer.weight_quantizer
            weight, grid = weights[name]
            zero = (
                torch.zeros_like(coded.step_size) if coded.zero_point is None else coded.zero_point
            )
            rounding[name] = AdaRound(weight, coded.step_size, zero, grid.n, grid.p)
            layer.weight_quantizer = rounding[name]

        for quantizer in self.block.quantizers.values():
            quantizer.observer = _pass_through

        # 2. V, with a regularizer that drives it to 0 or 1.
        def total(update: int, loss: Tensor) -> Tensor:
            ends = o.beta_start, o.beta_end
            beta = beta_at(update, o.rounding_updates, *ends, o.rounding_warmup, o.beta_schedule)
            if beta is None:
                return loss

            # Each process adds the whole term and gradients are averaged, so it counts once.
            terms = torch.stack([r.regularizer(beta) for r in rounding.values()])
            return loss + o.rounding_weight * terms.sum()

        groups = [{"params": [r.V for r in rounding.values()], "lr": o.lr_rounding}]
        phase = Phase(number=1, updates=o.rounding_updates, power=2.0, falling=False)

        try:
            self._descend(groups, phase, total, advance)
        finally:
            for quantizer in self.block.quantizers.values():
                quantizer.observer = None

        # 3. Codes again.
        for name, layer in layers.items():
            r = rounding[name]
            layer.weight_quantizer = coded_weight(r.codes(), r.s, r.z, r.n, r.p).to(
                self.processes.device
            )

    def _descend(
        self,
        groups: list[dict[str, Any]],
        phase: Phase,
        total: Callable[[int, Tensor], Tensor],
        advance: Callable[[str], None],
    ) -> None:
        """Minimise the block's loss with Adam.

        Args:
            groups: of parameters, with their rates.
            phase: which fit.
            total: (update, loss) -> what is minimised.
            advance: called after every update.
        """
        parameters = [p for group in groups for p in group["params"]]
        optimizer = torch.optim.Adam(groups, fused=True)
        rates = [group["lr"] for group in optimizer.param_groups]
        batch, train = self.options.batch_size, self.data.train
        share = share_of(batch, self.processes.rank, self.processes.world)

        for update in range(phase.updates):
            factor = cosine(update, phase.updates) if phase.falling else 1.0
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

            # This process' share of the batch.
            g = generator(self.key[0], Stream.BLOCK_BATCH, self.key[1], phase.number, update)
            index = train[torch.randint(len(train), (batch,), generator=g)][share]
            target = self.data.target.take(index).to(self.processes.device)

            output = self.output(index)
            loss = total(update, output_loss(output, target, phase.power, self._weights(index)))

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.processes.world > 1:
                self._average(parameters)
            optimizer.step()
            advance(f"{self.block.name} {float(loss.detach()):.3g}")

    def _average(self, parameters: list[nn.Parameter]) -> None:
        """Replace the gradients by their means over processes, in one message."""
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in parameters if p.grad is not None]

        mean = self.processes.mean(torch.cat([g.reshape(-1) for g in grads]))
        for grad, part in zip(grads, mean.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.reshape(grad.shape))


def _pass_through(x: Tensor) -> None:
    """Observe a tensor and keep nothing: a quantizer with an observer does not quantize."""


@contextmanager
def trainable(quantizers: Mapping[str, Quantizer]) -> Iterator[nn.ModuleList]:
    """Put some quantizers into training form, with trainable copies of what they share with others.

    The copies are taken back at the end.

    Yields:
        All that is to be trained, and nothing else of the network.
    """
    # Of the network's bank, the rows that these quantizers read.
    bank, readers = readers_of(quantizers)
    parts: list[Bank] = []
    if bank is not None:
        rows = [interval.row for interval in readers.values()]
        parts = [bank.subset(rows).train()]
        for row, (name, interval) in enumerate(readers.items()):
            quantizers[name].interval = interval.reading(parts[0], row)

    learned = nn.ModuleList([*(q.train() for q in quantizers.values()), *parts])

    try:
        yield learned
    finally:
        for q in quantizers.values():
            q.eval()

        if bank is not None:
            bank.take_back(parts[0])
        for name, interval in readers.items():
            quantizers[name].interval = interval


def readers_of(quantizers: Mapping[str, Quantizer]) -> tuple[Bank | None, dict[str, Interval]]:
    """Return the bank of some quantizers of one network, and the intervals that read it."""
    readers = {name: q.interval for name, q in quantizers.items() if q.interval.bank is not None}
    bank = next((interval.bank for interval in readers.values()), None)
    return bank, readers
