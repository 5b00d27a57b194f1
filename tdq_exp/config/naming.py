"""Names of runs: what a folder of results is called, and the files in it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from tdq_exp.config.setting import labels
from tdq_exp.fit.registry import options_class

# Groups whose labels follow the method's, in this order.
LABELLED = ("tdq", "weight", "act", "plan", "habits", "data", "fit")

# In the folder of a run.
FIT_RECORD = "fit.json"
PACKED = "packed.safetensors"


def fit_name(cfg: DictConfig) -> str:
    """Return `${model}_${bits}_${method}[_${tdq}]`, then the label of every group that differs.

    A calibration set is named if it differs from the method's default. Settings of the fit that
    have a label of their own follow, then the user's label. A trial run (`debug=smoke`) always ends
    in `smoke`, so it never takes the name of the real run.
    """
    parts = [cfg.model.label, cfg.bits.label if cfg.method.quantized else "", cfg.method.label]
    parts += [cfg[group].label for group in LABELLED]

    if cfg.calibration.label != cfg.method.calibration:
        parts.append(cfg.calibration.label)

    parts += [*labels(options_class(cfg.fit.kind), cfg.fit), cfg.label]

    if cfg.smoke and cfg.label != "smoke":
        parts.append("smoke")
    return "_".join(part for part in parts if part)


def sample_name(cfg: DictConfig) -> str:
    """Return sampler, images and what differs: `ddim50_n5000`, `ddim50quad_n5000_seed1`."""
    s = cfg.sampler

    name = s.label
    name += "" if s.spacing == "leading" else s.spacing
    name += f"eta{s.eta:g}" if s.eta else ""
    name += f"_n{s.images}"
    name += f"_seed{s.seed}" if s.seed else ""
    name += "_best5" if cfg.fit.report == "best_of_5" else ""

    if s.engine != "fake":
        name += f"_{s.engine}" + (f"{s.min_speedup:g}" if s.min_speedup != 1 else "")
    return name


def run_folder(cfg: DictConfig, name: str | None = None) -> Path:
    """Return `<out>/runs/<fit name>/seed<k>`.

    Args:
        cfg: of the run.
        name: of its fit, if it is known already.
    """
    name = name or fit_name(cfg)
    return Path(cfg.out).expanduser().resolve() / "runs" / name / f"seed{cfg.seed}"
