"""Experiment tracking: the only importer of wandb.

`offline` writes a local folder that `wandb sync` can upload later; `wandb` is online if there is a
key, else offline.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

KINDS = ("none", "offline", "wandb")
POINTS = 100  # time steps of an interval that are logged


class Tracker:
    """One wandb run per fit, on the main process; everything is a no-op with kind `none`.

    Args:
        kind: see the module.
        project: wandb's project.
        name: of the run.
        folder: of the fit; the run's id is kept there, so that a resumed fit goes on in the same
            run.
        config: whole configuration, plain values.

    Raises:
        ValueError: for an unknown kind.
    """

    def __init__(
        self, kind: str, project: str, name: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"tracker.kind={kind!r}: choose one of {', '.join(KINDS)}")
        self._run: Any = None
        self._wandb: ModuleType | None = None
        self._start = None if kind == "none" else (kind, project, name, folder, dict(config))

    def _started(self) -> Any:
        """Return the run, begun at the first log: a command without work begins none."""
        if self._start is None or self._run is not None:
            return self._run

        import wandb

        kind, project, name, folder, config = self._start
        self._wandb = wandb

        # A resumed run goes on under its id.
        folder.mkdir(parents=True, exist_ok=True)
        identity = folder / "wandb-id.json"
        run_id = (
            json.loads(identity.read_text())["id"] if identity.exists() else secrets.token_hex(4)
        )
        identity.write_text(json.dumps({"id": run_id}))

        online = kind == "wandb" and bool(wandb.setup().settings.api_key or wandb.api.api_key)
        self._run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            dir=str(folder),
            config=config,
            mode="online" if online else "offline",
            resume="allow" if online else None,
            settings=wandb.Settings(silent=True, console="off"),
        )

        return self._run

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log numbers of an update."""
        if self._started() is not None:
            self._run.log({"update": step, **values})

    def intervals(self, tables: Mapping[str, Tensor]) -> None:
        """Log every interval over t: a table of (quantizer, t, step size), about `POINTS` each."""
        if self._started() is None or self._wandb is None:
            return
        rows = []
        for name, table in tables.items():
            stride = max(len(table) // POINTS, 1)
            rows += [[name, t, float(table[t])] for t in range(0, len(table), stride)]
        self._run.log(
            {"intervals": self._wandb.Table(columns=["quantizer", "t", "step_size"], data=rows)}
        )

    def picture(self, name: str, path: Path) -> None:
        """Log an image file."""
        if self._started() is not None and self._wandb is not None:
            self._run.log({name: self._wandb.Image(str(path))})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final numbers of the run."""
        if self._started() is not None:
            for key, value in values.items():
                self._run.summary[key] = value

    def close(self) -> None:
        """End the run, so that the next job of a sweep begins its own."""
        if self._run is not None:
            self._run.finish()
            self._run = None
