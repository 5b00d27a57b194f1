"""Quantization of diffusion models with time-dependent step sizes (TDQ), from options to tables.

net = tdq_exp.load("results/runs/digits_w4a4_lsq_tdq/seed0")     a baked network, ready to call

For a network and a training loop of one's own:

net = tdq_exp.quantize(unet, bits="w4a4", method="lsq", tdq="temporal")
tdq_exp.calibrate(net, batches); tdq_exp.parameter_groups(net, lr); tdq_exp.penalty(net)
tdq_exp.correct(net, unet, images); tdq_exp.bake(net); tdq_exp.save(net, "net.safetensors")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from tdq_exp.experiment.own_loop import (
        bake,
        calibrate,
        correct,
        parameter_groups,
        penalty,
        quantize,
        save,
    )

__all__ = [
    "bake",
    "calibrate",
    "correct",
    "load",
    "parameter_groups",
    "penalty",
    "quantize",
    "save",
]


def __getattr__(name: str) -> Any:
    """Return a function of `experiment.own_loop`; torch is imported only when one is wanted."""
    if name in __all__:
        from tdq_exp.experiment import own_loop

        return getattr(own_loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(run: str | Path) -> nn.Module:
    """Return the baked network of a finished run, in eval mode, on the CPU.

    `net(x_t, t, return_dict=False)[0]` is what the model predicts: the noise, x_0 or v.

    Args:
        run: the run's folder, `results/runs/<name>/seed<k>`, or a packed network
            (`python -m tdq_exp pack`).

    Raises:
        FileNotFoundError: if there is no finished run.
        ValueError: if its weights are missing, damaged, or of another configuration.
    """
    # torch and diffusers are imported only when a network is wanted.
    from tdq_exp.experiment.finished_run import load as load_run

    return load_run(run)[1]
