"""Float pre-training: `method=fp fit=pretrain`. Adam, warm-up, flips, and the average of the weights as the result."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tdq_exp.diffusion.objective import Samples
from tdq_exp.fit.loop import History, Log, TrainOptions, train
from tdq_exp.models.pixel import Trainable
from tdq_exp.runtime.processes import Processes


def pretrain(
    model: Trainable,
    samples: Samples,
    held_out: Samples,
    options: TrainOptions,
    *,
    lr: float,
    seed: int,
    folder: Path,
    mark: str,
    processes: Processes,
    log: Log | None = None,
) -> tuple[nn.Module, History]:
    """Trains a model, or a part of one, from random weights; returns the average of the weights, and the history.

    Args:
        lr: learning rate of Adam after warm-up. The rest as in `loop.train`.
    """
    net = model.build(seed).to(processes.device)
    optimizer = torch.optim.Adam([{"params": list(net.parameters()), "lr": lr, "name": "weights"}])
    average, history = train(
        net, model, samples, held_out, optimizer, options, seed=seed, folder=folder, mark=mark, processes=processes,
        log=log,
    )  # fmt: skip
    model.settle(average, samples, processes.device)
    return average, history
