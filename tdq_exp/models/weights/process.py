"""The diffusion process that a network of diffusers was trained for, from its scheduler's config.

Weights fit into a network whatever betas, T and target they were trained for, and give noise where
these are others. A diffusers folder says which they were; what it says must be what the model's
description says.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.models.weights.fill import SCHEDULER
from tdq_exp.models.weights.folder import config_of
from tdq_exp.models.weights.inert_pickle import CheckpointError

DEFINITION = "model.definition"


def require_same_process(source: str, schedule: Schedule, prediction_type: str) -> None:
    """Refuse weights whose scheduler contradicts a model's description.

    Args:
        source: of the weights; anything but a folder with a scheduler's config says nothing.
        schedule: T and the betas of the description.
        prediction_type: what its network answers.

    Raises:
        CheckpointError: one line that names the file, and the key to set.
    """
    path = _config_beside(Path(source).expanduser())
    if path is None:
        return
    config = config_of(path)

    try:
        _require_agreement(path, config, schedule, prediction_type)
    except CheckpointError:
        raise
    except (TypeError, ValueError, OverflowError) as error:  # a text in the place of a number
        raise CheckpointError(f"{path}: is no config of a scheduler ({error})") from error


def _require_agreement(
    path: Path, config: dict[str, Any], schedule: Schedule, prediction_type: str
) -> None:
    """Compare what a config says with a description, key by key."""
    if config.get("rescale_betas_zero_snr"):
        raise CheckpointError(
            f"{path}: rescale_betas_zero_snr is true; at the last step such an x_t is pure noise,"
            " and this project's schedules have none that ends so"
        )

    for key, has, wants, written in _pairs(config, schedule, prediction_type):
        if has != wants:
            plus = "+" if written.endswith("prediction_type") else ""
            raise CheckpointError(
                f"{path}: {key} is {has}, and the model's is {wants}; set"
                f" {plus}{DEFINITION}.{written}={has} if these weights are meant"
            )

    _require_same_betas(path, config, schedule)


def _pairs(
    config: dict[str, Any], schedule: Schedule, prediction_type: str
) -> list[tuple[str, Any, Any, str]]:
    """Return (their key, their value, ours, our key); absent keys have diffusers' defaults."""
    predicts = config.get("prediction_type")
    if predicts is None:  # before it had a name
        predicts = "epsilon" if config.get("predict_epsilon", True) else "sample"

    pairs = [
        ("prediction_type", predicts, prediction_type, "prediction_type"),
        (
            "num_train_timesteps",
            config.get("num_train_timesteps", 1000),
            schedule.steps,
            "schedule.steps",
        ),
    ]
    if config.get("trained_betas") is None:
        shape = config.get("beta_schedule", "linear")
        pairs.append(("beta_schedule", shape, schedule.shape, "schedule.shape"))
    return pairs


def _require_same_betas(path: Path, config: dict[str, Any], schedule: Schedule) -> None:
    """Compare the numbers: the ends of the betas, or all of them where they are listed."""
    listed = config.get("trained_betas")
    if listed is not None:
        ours = schedule.betas.tolist()
        if len(listed) != len(ours) or not all(map(_close, listed, ours)):
            raise CheckpointError(
                f"{path}: trained_betas are not the model's; choose {DEFINITION}.schedule.shape,"
                " .beta_start and .beta_end so that they are"
            )
        return

    if schedule.shape == "squaredcos_cap_v2":  # has no ends to choose
        return
    for key, default in (("beta_start", 1e-4), ("beta_end", 0.02)):
        has, wants = float(config.get(key, default)), getattr(schedule, key)
        if not _close(has, wants):
            raise CheckpointError(
                f"{path}: {key} is {has:g}, and the model's is {wants:g}; set"
                f" {DEFINITION}.schedule.{key}={has:g} if these weights are meant"
            )


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4)


def _config_beside(folder: Path) -> Path | None:
    """Return the scheduler's config of a diffusers folder: inside of it, or of its pipeline."""
    if not folder.is_dir():
        return None

    # PATH, PATH/unet and PATH/checkpoint-N/unet are all given as weights.
    places = [folder, folder / "scheduler"]
    above = folder.resolve()
    while above.name in ("unet", "unet_ema") or above.name.startswith("checkpoint-"):
        above = above.parent
        places += [above, above / "scheduler"]
    found = (place / SCHEDULER for place in places)
    return next((file for file in found if file.is_file()), None)
