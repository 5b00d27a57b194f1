"""What a row and the cell that shows it must have in common.

A row is *stale* if the command of its cell would compute other numbers today. So everything of a
configuration is compared that a number of a row depends on:

- the keys that the fingerprints of its stages read;
- `BESIDE`, which fingerprints read as what they lead to, such as the content of the images.

Not compared are names, places on a machine and speed. The files of networks, and images in a place
that a user's override names, are compared by their hashes (`Cell.contents`), the number of images
by `Cell.short`. Images in the place that a configuration names are compared between the rows of a
column alone (`protocol`): what it holds is not known before it is read.
`tests/report/test_compared.py` has a decision for each key that there is.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from tdq_exp.config import records
from tdq_exp.config.schema import QUANTIZERS, parts_of
from tdq_exp.fit.registry import options_class

# Keys of a group, beside those that its part of a fingerprint has.
BESIDE = {
    "model": ("ema",),  # which of two sets of weights
    "data": ("limit", "source"),
    "fit": ("report",),
}

# Nodes with the path of a file or folder, which may lie anywhere.
PATHS = {"data": ("source", "path"), "eval": ("features", "weights")}


def compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a row stale when it changes, by group, in today's names.

    Args:
        config: of a row or a cell, plain; read only.
    """
    config = records.upgrade(config)
    groups = ["model", "data", "sampler", "eval"]
    if config["method"]["quantized"]:  # a float model is loaded as it is
        groups += [*QUANTIZERS, "fit"]
        fit = options_class(config["fit"]["kind"])
        groups += ["calibration"] if fit.needs_calibration_set else []

    parts: dict[str, Any] = {group: _of_group(group, config[group]) for group in groups}
    del parts["sampler"]["images"]
    parts["eval"]["metrics"] = sorted(parts["eval"]["metrics"] or [])
    parts["seed"] = config.get("seed")

    plain: dict[str, Any] = json.loads(json.dumps(parts))  # lists for tuples, as a row has them
    return plain


def compared_of_fit(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same of the fit alone, whatever is sampled from it."""
    parts = compared(config)
    parts.get("fit", {}).pop("report", None)
    return {group: part for group, part in parts.items() if group not in ("sampler", "eval")}


def _of_group(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a group that are compared."""
    # An older row may lack a key that there is now: None, and so a change.
    parts = parts_of(group, defaultdict(lambda: None, values))
    parts |= {key: values.get(key) for key in BESIDE.get(group, ())}

    node, path = PATHS.get(group, (None, None))
    if node is not None:
        parts[node] = {key: value for key, value in parts[node].items() if key != path}
    return parts
