"""Float pre-training: `method=fp fit=pretrain`. Adam, warm-up, flips, and the average of the weights as the result."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tdq_exp.data.images import Images
from tdq_exp.fit.loop import History, Log, TrainOptions, train
from tdq_exp.models.model import DiffusionModel
from tdq_exp.processes import Processes


def pretrain(
    model: DiffusionModel,
    images: Images,
    held_out: Images,
    options: TrainOptions,
    *,
    lr: float,
    seed: int,
    folder: Path,
    mark: str,
    processes: Processes,
    log: Log | None = None,
) -> tuple[nn.Module, History]:
    """Trains a model from random weights; returns the average of the weights, and the history.

    Args:
        lr: learning rate of Adam after warm-up. The rest as in `loop.train`.
    """
    net = model.build(seed).to(processes.device)
    optimizer = torch.optim.Adam([{"params": list(net.parameters()), "lr": lr, "name": "weights"}])
    return train(
        net,
        model,
        images,
        held_out,
        optimizer,
        options,
        seed=seed,
        folder=folder,
        mark=mark,
        processes=processes,
        log=log,
    )
