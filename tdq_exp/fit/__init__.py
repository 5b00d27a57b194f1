"""Fits: how a network comes by its weights. `registry` knows all of them, by their stable names.

The classes are imported when they are asked for, so that `fit.options` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "Load": "tdq_exp.fit.no_fit",
    "Pretrain": "tdq_exp.fit.pretrain",
    "Ptq": "tdq_exp.fit.ptq.ptq",
    "Qat": "tdq_exp.fit.qat",
}

__all__ = ["Load", "Pretrain", "Ptq", "Qat"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
