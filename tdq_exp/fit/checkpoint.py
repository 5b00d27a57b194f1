"""Training states on disk: written beside the target and renamed, read without executing anything.

`state.pt` holds all that the next update depends on: network, average, optimiser, and the random
state of dropout for each process. Draws of data need no state (see `diffusion.objective`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tdq_exp.runtime import files


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Replaces the state file in one step: a kill at any moment leaves the old one or the new one.

    Raises:
        OSError: if the folder can't be written or is full; the old file is untouched then.
    """
    with files.replacing(path) as part:
        try:
            torch.save(state, part)
        except RuntimeError as error:  # so torch reports a full disk
            raise OSError(str(error)) from error


def load_state(path: Path) -> dict[str, Any] | None:
    """The state, on the CPU, or None if there is none yet.

    Raises:
        ValueError: if the file is damaged, naming it and saying what to do.
    """
    if not path.exists():
        return None

    files.require_regular(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # zip, pickle and runtime errors: all mean that the file is not ours or not whole
        raise ValueError(
            f"{path}: damaged training state; remove it to start this fit again"
        ) from error
