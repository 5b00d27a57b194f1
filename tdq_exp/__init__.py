"""Quantization of diffusion models with time-dependent step sizes (TDQ), from options to tables.

net = tdq_exp.load("results/runs/digits_w4a4_lsq_tdq/seed0")     a baked network, ready to call
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


def load(run: str | Path) -> nn.Module:
    """Return the baked network of a finished run, in eval mode, on the CPU.

    `net(x_t, t, return_dict=False)[0]` is eps_hat.

    Args:
        run: the run's folder, `results/runs/<name>/seed<k>`, or a packed network
            (`python -m tdq_exp pack`).

    Raises:
        FileNotFoundError: if there is no finished run.
        ValueError: if its weights are missing, damaged, or of another configuration.
    """
    from tdq_exp.experiment.load import (
        load as load_run,  # torch and diffusers are imported only when a network is wanted
    )

    return load_run(run)[1]
