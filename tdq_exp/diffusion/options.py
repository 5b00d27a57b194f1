"""What a sampler is called with, declared once. Free of torch.

The samplers are subclasses, and so is the group `sampler` of the configuration, where a command
line sets these numbers. The fingerprint of a set does not read them there: it reads the node
`sampler.method`, which is what the sampler is made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tdq_exp.config.setting import setting


@dataclass
class StepOptions:
    """Which time steps are visited, and how much noise is added on the way."""

    steps: int = setting(low=1, fingerprint=False, help="S")
    spacing: str = setting(
        "leading", fingerprint=False, help="leading, uniform, trailing, linspace, quad"
    )
    eta: float = setting(
        0.0, low=0, high=1, fingerprint=False, help="0 is deterministic, 1 has DDPM's variance"
    )


@dataclass
class ModelConventions:
    """A model's own conventions of sampling."""

    clip: bool = setting(False, fingerprint=False, help="limit x0_hat to [-1, 1]")
    offset: int = setting(0, fingerprint=False, help="added to every time step")
    final_alpha_one: bool = setting(True, fingerprint=False, help="abar after the last step is 1")


@dataclass
class TrajectoryOptions(ModelConventions, StepOptions):
    """All that a sampler takes: steps, spacing, eta, clip, offset, final_alpha_one."""


def trajectory_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sampler's arguments from a mapping that has other keys, too."""
    return {field.name: values[field.name] for field in dataclasses.fields(TrajectoryOptions)}
