"""Files that travel with the package: configs and the small nets that are shipped with it.

In a checkout they lie at the top of the repository; a wheel carries them inside of the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parent


def configs() -> Path:
    """Return the folder of Hydra configs, absolute."""
    inside = _PACKAGE / "_configs"
    return inside if inside.is_dir() else _CHECKOUT / "configs"


def weights(name: str) -> Path:
    """Return the path of a weights file; `shipped:NAME` is one of the project's own nets.

    Raises:
        FileNotFoundError: if no net of that name is shipped.
    """
    if not name.startswith("shipped:"):
        return Path(name).expanduser()
    inside = _PACKAGE / "_weights"
    folder = inside if inside.is_dir() else _CHECKOUT / "results" / "weights"
    path = folder / f"{name.removeprefix('shipped:')}.safetensors"
    if not path.exists():
        have = ", ".join(sorted(f.stem for f in folder.glob("*.safetensors"))) or "none"
        raise FileNotFoundError(f"{name}: no such net is shipped (there are: {have})")
    return path


def read_yaml(path: Path) -> Any:
    """Return a YAML file as dicts, lists and scalars; `${...}` stays as it is written."""
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
