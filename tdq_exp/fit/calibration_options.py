"""Options of calibration sets: what a set holds, and what it depends on. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tdq_exp.config.setting import SEED, setting
from tdq_exp.fit.options import MOST_SAMPLES

CALIBRATION_KINDS = ("uniform", "ndtc", "ndtc_published", "forward")
IMPORTED = "imported"  # the kind of another project's set: what it holds is its own affair


@dataclass
class CalibrationSpec:
    """What a calibration set holds; see `fit.ptq.calibration_set` for its kinds.

    Raises:
        ValueError: naming the key.
    """

    kind: str = setting(
        "none", help="none, uniform, ndtc, ndtc_published, forward; imported if `path` is a file"
    )
    samples: int = setting(0, low=0, most=MOST_SAMPLES, help="N, a multiple of `images`")
    images: int = setting(
        0, low=0, most=MOST_SAMPLES, help="number of trajectories, or of training images"
    )
    mu: float = setting(0.4, low=0, high=1, help="mean of t, as a share of T (ndtc)")
    sigma: float = setting(
        0.4, low=0, most=100, help="standard deviation of t, as a share of T (ndtc)"
    )
    seed: int = setting(0, low=0, high=SEED, help="seed of noise and time steps")
    label: str = setting("", fingerprint=False, is_name=True, help="label in the run's name")
    path: str | None = setting(
        None,
        fingerprint=False,
        help="calibration set to use: the folder of a finished one, or another project's FILE.pt"
        " of (x, t); if not given, a set is made and cached",
    )

    def __post_init__(self) -> None:
        if not self.wanted or self.kind == IMPORTED:
            return
        if self.kind not in CALIBRATION_KINDS:
            raise ValueError(
                f"calibration.kind={self.kind!r}: choose one of {', '.join(CALIBRATION_KINDS)}"
            )
        if self.images < 1 or self.samples < 1 or self.samples % self.images:
            raise ValueError(
                f"calibration.samples={self.samples}: must be a positive multiple of"
                f" calibration.images={self.images}"
            )

    @property
    def wanted(self) -> bool:
        """Whether there is a set at all."""
        return self.kind != "none"

    @property
    def encodes_images(self) -> bool:
        """Whether the samples are noised training images, and not the network's own runs."""
        return self.kind == "forward"

    def parts(
        self, model: Mapping[str, Any], weights: str, sampler: Mapping[str, Any], data: str
    ) -> dict[str, Any]:
        """Return what the set depends on, for its fingerprint.

        Args:
            model: the model's definition.
            weights: hash of the float weights.
            sampler: the method of the trajectories.
            data: hash of the training images; only `forward` sets depend on it.
        """
        names = ["kind", "samples", "images", "seed"]

        if self.encodes_images:  # no weights: the same set for any float network of the same data
            spec = {name: getattr(self, name) for name in names}
            return {"version": 1, "calibration": spec, "model": dict(model), "data": data}

        if self.kind != "uniform":
            names += ["mu", "sigma"]
        spec = {name: getattr(self, name) for name in names}
        return {
            "version": 1,
            "calibration": spec,
            "model": dict(model),
            "weights": weights,
            "sampler": dict(sampler),
        }
