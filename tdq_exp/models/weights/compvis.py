"""Files of CompVis' latent diffusion, taken apart into U-Net, average, first stage and the rest.

    model.diffusion_model.*    the U-Net
    model_ema.*                the average of its weights, the dots taken out of their names
    first_stage_model.*        the autoencoder; in a file of its own without this prefix
    scale_factor               the scale of the latents, 0-dim
    loss.*                     networks of the autoencoder's training loss, which is not needed
    `NOT_WEIGHTS`              the schedule's buffers, the average's counters

Every key of a file is one of these; any other is an error that names it.

References:
    https://github.com/CompVis/latent-diffusion (ldm/models/diffusion/ddpm.py,
        ldm/models/autoencoder.py, ldm/modules/ema.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdq_exp.models.weights.inert_pickle import CheckpointError

NOT_WEIGHTS = frozenset(
    [
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "lvlb_weights",
        "logvar",
        "model_ema.decay",
        "model_ema.num_updates",
    ]
)
SCALE = "scale_factor"
_UNET, _AVERAGE, _FIRST_STAGE, _LOSS = (
    "model.diffusion_model.",
    "model_ema.",
    "first_stage_model.",
    "loss.",
)


def is_whole(names: Mapping[str, Any]) -> bool:
    """Return whether it is a file of everything."""
    return any(name.startswith(_UNET) for name in names)


def is_autoencoder(names: Mapping[str, Any]) -> bool:
    """Return whether it is a file of the first stage alone."""
    return any(name.startswith("encoder.down.") for name in names)


def part_of(path: Path, state: Mapping[str, Any], part: str, ema: bool) -> dict[str, Any]:
    """Return the weights of one network in a file of everything, by their original names.

    Args:
        path: of the file, for messages.
        state: its state dict.
        part: `unet` or `vae`.
        ema: of the U-Net the average, not the raw weights; of the autoencoder there is one set.

    Raises:
        CheckpointError: for keys that belong nowhere, or an average that is not the U-Net's.
    """
    known = (_UNET, _AVERAGE, _FIRST_STAGE)

    # Nothing in the file may be left unexplained.
    left = [
        name
        for name in state
        if not name.startswith(known) and name not in NOT_WEIGHTS and name != SCALE
    ]
    if left:
        raise CheckpointError(f"{path}: {len(left)} keys of no known part ({'; '.join(left[:3])})")

    if part == "vae":
        return without_loss(
            {
                n.removeprefix(_FIRST_STAGE): v
                for n, v in state.items()
                if n.startswith(_FIRST_STAGE)
            }
        )

    raw = {name: value for name, value in state.items() if name.startswith(_UNET)}

    found = _averages(path, state, raw) if ema else raw
    return {name.removeprefix(_UNET): value for name, value in found.items()}


def without_loss(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an autoencoder's weights, without its training loss and scale, which is read apart."""
    return {
        name: value for name, value in state.items() if not name.startswith(_LOSS) and name != SCALE
    }


def _averages(path: Path, state: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the average of each raw weight, by the raw weight's name.

    A shadow's name can't be read back, for a dot may have stood anywhere; but each raw name gives
    the name of its shadow.
    """
    shadows = {name for name in state if name.startswith(_AVERAGE)} - NOT_WEIGHTS
    if not shadows:
        raise CheckpointError(
            f"{path}: a file without EMA weights; ask for its raw ones (model.ema=false)"
        )

    # From each raw name to its shadow, and no two to one.
    owner: dict[str, str] = {}
    for name in raw:
        shadow = _AVERAGE + name.removeprefix("model.").replace(".", "")
        if shadow in owner:
            raise CheckpointError(
                f"{path}: {shadow} is the average of two weights, {owner[shadow]} and {name}"
            )

        owner[shadow] = name

    if missing := [shadow for shadow in owner if shadow not in shadows]:
        raise CheckpointError(
            f"{path}: {len(missing)} EMA weights are missing ({'; '.join(missing[:3])})"
        )

    if left := sorted(shadows - owner.keys()):
        raise CheckpointError(
            f"{path}: {len(left)} EMA weights are of no weight ({'; '.join(left[:3])})"
        )

    return {name: state[shadow] for shadow, name in owner.items()}
