"""Adapts a configuration to this machine and to the user's files before anything is built.

The configuration itself is changed, so that the name, the record and the fingerprint of a run
state what is computed.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from tdq_exp.fit.calibration_options import IMPORTED
from tdq_exp.runtime import environment, launch


def adapted(cfg: DictConfig) -> tuple[DictConfig, tuple[str, ...]]:
    """Return a composed config as it is run, and lines that tell a reader what was changed.

    Raises:
        FileNotFoundError: if it names a calibration set that is not there.
    """
    return _in_a_precision_of_this_machine(_with_imported_set(cfg))


def _with_imported_set(cfg: DictConfig) -> DictConfig:
    """Return a config that says so where the calibration set is a file of another project.

    Name, record and row say `imported` then, and not how a set of ours would have been made.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it is neither.
    """
    path = cfg.calibration.get("path")
    if not isinstance(path, str):
        return cfg

    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(
            f"calibration.path={path}: no such file or folder; a set is a folder with about.json,"
            " or another project's FILE.pt of (x, t)"
        )
    if place.is_dir():
        return cfg
    if not place.is_file():  # a pipe would be waited for
        raise ValueError(f"calibration.path={path}: is no regular file")

    cfg = cfg.copy()
    own = {"kind": IMPORTED, "label": IMPORTED, "samples": 0, "images": 0}
    for key, value in own.items():
        cfg.calibration[key] = value
    return cfg


def _in_a_precision_of_this_machine(cfg: DictConfig) -> tuple[DictConfig, tuple[str, ...]]:
    """Return a config that trains in float32 where a protocol's bfloat16 would only be imitated.

    The config that is recorded, and the fingerprint, say float32 then: it is what was computed.
    A precision that the user sets (`fit.precision=bfloat16`) and that of a record stay.

    Returns:
        The config, and a line for the reader if it was changed.
    """
    by_protocol = "precision" in cfg.fit and OmegaConf.is_interpolation(cfg.fit, "precision")
    if not by_protocol or cfg.fit.precision != "bfloat16":
        return cfg, ()

    on_cpu = cfg.launcher.get("cpu") or launch.gpus() == 0
    if not on_cpu or environment.cpu_multiplies_bfloat16():
        return cfg, ()

    cfg = cfg.copy()
    cfg.fit.precision = "float32"
    note = (
        "this CPU has no instructions for bfloat16 and would take about ten times as long with it:"
        " fit.precision is float32, and recorded so (fit.precision=bfloat16 insists)"
    )
    return cfg, (note,)
