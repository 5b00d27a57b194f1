"""The registry of fits: stable name -> options and class. The only place that knows all of them.

The name is `fit.kind` in a configuration, in records and in fingerprints. This module is free of
torch: a class is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tdq_exp.fit.options import FitOptions, LoadOptions, PretrainOptions, PtqOptions, QatOptions

if TYPE_CHECKING:
    from tdq_exp.fit.fit import Fit

OPTIONS: dict[str, type[FitOptions]] = {
    "none": LoadOptions,
    "pretrain": PretrainOptions,
    "qat": QatOptions,
    "ptq": PtqOptions,
}

CLASSES = {
    LoadOptions: ("tdq_exp.fit.no_fit", "Load"),
    PretrainOptions: ("tdq_exp.fit.pretrain", "Pretrain"),
    QatOptions: ("tdq_exp.fit.qat", "Qat"),
    PtqOptions: ("tdq_exp.fit.ptq.ptq", "Ptq"),
}


def options_class(kind: Any) -> type[FitOptions]:
    """Return the options of a fit.

    Args:
        kind: its stable name.

    Raises:
        ValueError: if there is no such fit.
    """
    if kind not in OPTIONS:
        *names, last = OPTIONS
        raise ValueError(f"fit.kind={kind!r}: choose {', '.join(names)} or {last}")
    return OPTIONS[kind]


def fit_class(options: FitOptions) -> type[Fit]:
    """Return the class that takes these options."""
    module, name = CLASSES[type(options)]
    return getattr(importlib.import_module(module), name)
