"""How a network is run: quantization simulated, or layers on integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.data.arrays import ImageStore
from tdq_exp.diffusion.draws import Stream
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console

ENGINE = "engine.json"  # which layers of a set run on integers


def engine(
    net: nn.Module,
    model: DiffusionModel,
    name: str,
    *,
    batch: int,
    min_speedup: float,
    folder: Path,
    processes: Processes,
    store: ImageStore,
) -> tuple[nn.Module, str]:
    """Return the network as an engine runs it, and what it is, for the row.

    Args:
        net: baked.
        model: its description.
        name: `fake` (simulated quantization) or `integer`.
        batch: images at a time.
        min_speedup: of a layer that is to run on integers.
        folder: where the choice of layers is kept, beside the images that are made with it.
        processes: who shares the work.
        store: of these images.

    Raises:
        ValueError: if the network has no quantized layers.
    """
    if name == "fake":
        return net, "fake"

    from tdq_exp.deploy import choose, integer  # not imported unless used

    reason = integer.unavailable(processes.device)
    if reason is None and not integer.codable(net):
        raise ValueError(
            "sampler.engine=integer: the network has no quantized layer that can run on integers"
        )
    if reason is None:
        net = net.to(processes.device)  # layers run, and are timed, where the images are made
    if reason is None and not integer.candidates(net):
        left = integer.left_out(net)
        reason = left[next(iter(integer.codable(net)))]
        reason = integer.INEXACT if integer.INEXACT in left.values() else reason

    # A machine that can't is told so in the row, not refused.
    if reason is not None:
        if processes.main:
            console.print(
                f"sampler.engine=integer: {reason}; quantization is simulated", markup=False
            )
        return net, f"fake: {reason}"

    # Layers that gain by it, measured once and kept beside the images.
    x = torch.zeros(batch, *model.sample_shape, device=processes.device)
    t = torch.tensor(model.schedule.steps // 2, device=processes.device)
    condition = model.draw_condition(0, Stream.IMAGE, range(batch))
    condition = None if condition is None else condition.to(processes.device)
    chains = model.chains(net)

    def choice() -> dict[str, Any]:
        kept = choose.Kept(folder / ENGINE, store.arrays.of, store.begun())
        return choose.choice(
            net, lambda n: model.predict(n, x, t, condition), min_speedup, kept, chains
        )

    found = processes.decide(choice)
    said = f"integer: {len(found['layers'])} of {found['of']} layers"
    return integer.integerize(net, chains, found["layers"], found.get("tiles")), said
