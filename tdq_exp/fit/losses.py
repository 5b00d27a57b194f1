"""Batches of a training or validation set, and the model's loss of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.draws import Draws, Stream, fixed_draws
from tdq_exp.diffusion.objective import Samples
from tdq_exp.fit.gradients import Batch
from tdq_exp.models.trainable import Trainable
from tdq_exp.runtime.precision import products
from tdq_exp.runtime.processes import Processes


def validation_draws(model: Trainable, held_out: Samples, samples: int, seed: int) -> Draws:
    """Return the fixed draws of the validation loss."""
    return fixed_draws(
        seed,
        Stream.VALIDATION,
        samples=samples,
        images=len(held_out),
        shape=model.sample_shape,
        steps=model.steps,
        random=held_out.random,
    )


def batch_of(images: Samples, draws: Draws) -> Batch:
    """Return (x_0, t, eps), and the condition where there is one, of some draws; on the CPU."""
    x_0 = images.batch(draws.index, draws.flip, draws.noise)
    condition = images.condition(draws.index)
    return (x_0, draws.t, draws.eps, *(() if condition is None else (condition,)))


def batch_loss(
    net: nn.Module,
    model: Trainable,
    images: Samples,
    draws: Draws,
    device: torch.device,
) -> Tensor:
    """Return the model's loss of one batch, scalar."""
    batch = [tensor.to(device) for tensor in batch_of(images, draws)]
    return model.training_loss(net, *batch)


@torch.no_grad()
def validation_loss(
    net: nn.Module,
    model: Trainable,
    images: Samples,
    draws: Draws,
    batch_size: int,
    processes: Processes,
) -> float:
    """Return the mean loss over fixed draws, in float32. Processes take batches in turn.

    Args:
        net: to validate.
        model: its description.
        images: the held-out samples.
        draws: see `validation_draws`.
        batch_size: samples that are computed together.
        processes: who shares the work.
    """
    was_training = net.training
    net.eval()
    total, samples = torch.zeros((), dtype=torch.float64), len(draws.t)

    for number, start in enumerate(range(0, samples, batch_size)):
        if number % processes.world == processes.rank:
            batch = draws.of(slice(start, min(start + batch_size, samples)))
            with products("float32"):
                loss = batch_loss(net, model, images, batch, processes.device)
            total += float(loss) * len(batch.t)

    net.train(was_training)
    return float(processes.sum(total.float().to(processes.device))) / samples
