"""A training of the tiny network that takes a second."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tdq_exp.data.images import Images
from tdq_exp.fit.loop import TrainingSets
from tdq_exp.fit.options import QatOptions
from tdq_exp.fit.qat import QatTraining, optimizer_groups, rates_of
from tdq_exp.runtime.context import RunContext
from tdq_exp.runtime.processes import Processes
from tests.quant.builders import load_model

RATE = 2.0**-10  # float32 holds it, and its shares while warming up
UPDATES = 6


def training(
    net: nn.Module, folder: Path, device: str = "cpu", compiled: bool = False, **options: Any
) -> QatTraining:
    """A training of six updates of a copy of a network; its rates rise over four of them."""
    model, net = load_model("tiny"), copy.deepcopy(net).to(device).train()
    size, channels = model.sample_shape[-1], model.sample_shape[0]
    pixels = np.random.default_rng(0).integers(0, 256, (24, size, size, channels), dtype=np.uint8)
    sets = TrainingSets(Images(pixels, "noise", ""), Images(pixels[:4], "noise", ""))

    numbers = QatOptions(
        **{
            "kind": "qat", "updates": UPDATES, "batch_size": 4, "warmup": 4, "ema_decay": 0.5,
            "validate_every": 100, "validation_samples": 4, "real_rounding": 0.5,
            "lr": RATE, "lr_step_size": RATE / 2, "lr_zero_point": RATE, "lr_generator": RATE / 4,
            **options,
        }
    )  # fmt: skip
    optimizer = torch.optim.AdamW(optimizer_groups(net, rates_of(numbers)), fused=True)
    folder.mkdir(exist_ok=True)
    context = RunContext(folder, "fit", 0, Processes(cpu=device == "cpu"), folder, compile=compiled)
    return QatTraining(net, model, sets, optimizer, numbers, context)
