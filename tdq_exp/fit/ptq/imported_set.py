"""Calibration sets of other projects: a PyTorch file of (x_t, t), as `calibration.path=FILE.pt`.

    (x, t)                 PTQ4DM, PTQD, TFMQ-DM: tensors [N, C, H, W] and [N]
    {"xs": ..., "ts": ...} Q-Diffusion: [S, B, C, H, W] and [S, B], or lists of S tensors
    {"x": ..., "t": ...}   the same, flat

Nothing in such a file is executed (see `models.weights.inert_pickle`). Which samples are of one
trajectory it does not say, so each sample is held out, or not, by itself. Such files are often in
the order of their steps: the samples that are held out are spread evenly over t all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tdq_exp.data.arrays import in_groups
from tdq_exp.data.completed import complete
from tdq_exp.fit.ptq.calibration_set import GROUP
from tdq_exp.fit.ptq.stored_set import CalibrationSet
from tdq_exp.models.weights.inert_pickle import CheckpointError, StoredTensor, read_tensors
from tdq_exp.models.weights.save import state_hash
from tdq_exp.runtime import files
from tdq_exp.runtime.processes import Processes

FORMAT = 'a PyTorch file of (x, t), {"x", "t"} or {"xs", "ts"}'
FEWEST = 2  # samples: one is held out
_NAMES = (("xs", "ts"), ("x", "t"))


@dataclass(frozen=True)
class ImportedSet:
    """What a file holds, checked.

    Args:
        x: x_t, float32 `[N, C, H, W]`.
        t: int64 `[N]`.
    """

    x: Tensor
    t: Tensor

    def parts(self) -> dict[str, Any]:
        """Return what the set is, for fingerprints: the hash of its content."""
        return {"version": 2, "imported": state_hash({"x": self.x, "t": self.t})}

    def stored(self, cache: Path, processes: Processes) -> CalibrationSet:
        """Return the set as arrays on disk, written on first use."""
        folder = cache / "calibration_sets" / files.fingerprint(self.parts())
        count = len(self.x)
        found = CalibrationSet(folder, count, count, self.x.shape[1:], GROUP, of=folder.name)
        images = spread_over_time(self.t)

        def make(indices: range) -> dict[str, NDArray[Any]]:
            part = slice(indices.start, indices.stop)
            x, t, image = self.x[part], self.t[part], images[part]
            rows = {"x": x, "t": t, "image": image, "x_0": torch.zeros_like(x)}  # none is known
            return {name: values.numpy() for name, values in rows.items()}

        processes.decide(lambda: found.create(self.parts()))
        title = "imported calibration set"
        batches = in_groups(count, GROUP)
        complete(found.arrays, batches, make, processes, title=title, making=f"an {title}")
        return found


def spread_over_time(t: Tensor) -> Tensor:
    """Return a number 0..N-1 for each sample, `[N]`, so that the last of them are of all t alike.

    In the order of t, multiples of the golden ratio leave no gap: their fractional parts are
    ranked.

    Args:
        t: of each sample, `[N]`.
    """
    place = torch.arange(len(t), dtype=torch.float64) * ((5**0.5 - 1) / 2) % 1
    numbers = torch.empty_like(t)
    numbers[t.argsort(stable=True)] = place.argsort(stable=True).argsort(stable=True)
    return numbers


def read_set(path: Path, shape: Sequence[int], steps: int) -> ImportedSet:
    """Read the calibration set of another project.

    Args:
        path: of the file.
        shape: (C, H, W) of what the network denoises.
        steps: T.

    Raises:
        ValueError: one line that names the file and the format.
    """
    where = f"calibration.path={path}"
    try:
        tensors = read_tensors(path, _named)
    except (CheckpointError, ValueError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{where}: {reason}; wanted {FORMAT}") from error

    x, t = _joined(tensors, "x"), _joined(tensors, "t")

    # Trajectories step by step are flattened.
    if t.dim() == 2 and x.dim() == 5 and x.shape[:2] == t.shape:
        x, t = x.flatten(0, 1), t.flatten()

    if tuple(x.shape[1:]) != tuple(shape) or t.shape != x.shape[:1]:
        raise ValueError(
            f"{where}: x is {list(x.shape)} and t {list(t.shape)}; wanted [N, "
            f"{', '.join(map(str, shape))}] and [N]"
        )
    if len(t) < FEWEST:
        raise ValueError(f"{where}: holds {len(t)} samples; wanted at least {FEWEST}")
    if not x.is_floating_point() or not bool(x.float().isfinite().all()):
        raise ValueError(f"{where}: x has values that are not finite real numbers")

    if t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"{where}: t is {t.dtype}; wanted whole numbers")
    whole = t.long()
    if not bool((whole == t).all()) or int(whole.min()) < 0 or int(whole.max()) >= steps:
        raise ValueError(f"{where}: t must be whole numbers from 0 to {steps - 1}")
    return ImportedSet(x.float().contiguous(), whole)


def _named(tree: Any) -> Mapping[str, Any]:
    """Return the tensors of a file's object by name: `x`, or `x.0`, `x.1`, ..., and so `t`."""
    if isinstance(tree, dict):
        pairs = [(tree[x], tree[t]) for x, t in _NAMES if x in tree and t in tree]
        if not pairs:
            raise ValueError(f"a dict of {', '.join(sorted(map(str, tree))[:4]) or 'nothing'}")
        if any(key not in {name for pair in _NAMES for name in pair} for key in tree):
            raise ValueError("holds more than x and t, which may be a condition of the network")
        (pair,) = pairs[:1]
    elif isinstance(tree, list | tuple) and len(tree) == 2:
        pair = (tree[0], tree[1])
    else:
        raise ValueError(f"holds a {type(tree).__name__}")

    named: dict[str, Any] = {}
    for name, value in zip(("x", "t"), pair, strict=True):
        if isinstance(value, StoredTensor):
            named[name] = value
        elif isinstance(value, list | tuple) and value:
            named |= {f"{name}.{i}": part for i, part in enumerate(value)}
        else:
            raise ValueError(f"its {name} is no tensor")
    return named


def _joined(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return one tensor, or the list of tensors stacked."""
    if name in tensors:
        return tensors[name]
    parts = [value for key, value in tensors.items() if key.startswith(f"{name}.")]
    if len({part.shape for part in parts}) != 1:
        return torch.cat([part.flatten() for part in parts])  # of no shape that is wanted
    return torch.stack(parts)
