"""Diffusion: noise schedule, training objective, random draws, the DDIM sampler. Plain torch.

The classes are imported when they are asked for, so that `diffusion.options` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {"Ddim": "tdq_exp.diffusion.ddim", "Schedule": "tdq_exp.diffusion.schedule"}

__all__ = ["Ddim", "Schedule"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
