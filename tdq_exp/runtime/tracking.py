"""Experiment tracking: the only importer of wandb.

`offline` writes a local folder that `wandb sync` can upload later; `wandb` is online if there is a
key, else offline.

A resumed fit goes on in the same run: one id, and wandb's step is the update. An update that was
logged before the interruption is made again, with the same numbers (see `fit.loop`), and not logged
again, so that steps never go backwards. Whatever wandb raises is one warning; the fit goes on
without it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from tdq_exp.runtime import files
from tdq_exp.runtime.progress import console

KINDS = ("none", "offline", "wandb")
POINTS = 100  # time steps of an interval that are logged


class Tracker:
    """One wandb run per fit, on the main process; everything is a no-op with kind `none`.

    Args:
        kind: see the module.
        project: wandb's project.
        name: of the run.
        folder: of the fit; the run's id and its last step are kept there, so that a resumed fit
            goes on in the same run.
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
        self._identity = folder / "wandb-id.json"
        self._id = ""
        self._first, self._step = 0, -1  # that this process may log; that it has logged

    def _guarded(self, call: Callable[[], None]) -> None:
        """Call what uses wandb; after its first error, nothing is tracked any more."""
        if self._start is None:
            return
        try:
            call()
        except Exception as error:  # its service, the network, a full disk: none stops a fit
            self._start = self._run = None
            if isinstance(error, OSError) and self._wandb is not None:
                # Its service is gone; else wandb would speak of that once more at the very end.
                with suppress(Exception):
                    self._wandb.teardown()

            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            console.print(
                f"warning: wandb failed ({reason}): the run goes on, its curves end here",
            )

    def _started(self) -> Any:
        """Return the run, begun at the first log: a command without work begins none."""
        if self._start is None or self._run is not None:
            return self._run

        import wandb

        kind, project, name, folder, config = self._start
        self._wandb = wandb

        # A resumed run goes on under its id, after its last step.
        found = files.read_json(self._identity) or {}
        if found.get("name", name) != name:
            raise ValueError(f"{self._identity}: is of {found['name']}; remove it")
        self._id = str(found.get("id") or secrets.token_hex(4))
        self._first = int(found.get("step", -1)) + 1
        self._remember(self._first - 1)

        online = kind == "wandb" and bool(wandb.setup().settings.api_key or wandb.api.api_key)
        self._run = wandb.init(
            project=project,
            name=name,
            id=self._id,
            dir=str(folder),
            config=config,
            mode="online" if online else "offline",
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")
        return self._run

    def _remember(self, step: int) -> None:
        """Note the last step whose values are complete: a resumed fit goes on after it."""
        assert self._start is not None
        about = {"id": self._id, "name": self._start[2], "step": step}
        files.write_json(self._identity, about)

    def _log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log values at a step, unless an interrupted run has; None: now, after all others."""
        run = self._started()
        if step is None:
            step = max(self._step, self._first)
        if step < self._first:
            return

        if step > self._step >= 0:
            self._remember(self._step)
        run.log({"update": step, **values}, step=step)
        self._step = step

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log numbers of an update."""
        self._guarded(lambda: self._log(values, step))

    def intervals(self, tables: Mapping[str, Tensor]) -> None:
        """Log every interval over t: a table of (quantizer, t, step size), about `POINTS` each."""

        def send() -> None:
            self._started()
            assert self._wandb is not None

            rows = []
            for name, table in tables.items():
                stride = max(len(table) // POINTS, 1)
                rows += [[name, t, float(table[t])] for t in range(0, len(table), stride)]

            columns = ["quantizer", "t", "step_size"]
            drawn = self._wandb.Table(columns=columns, data=rows)
            self._log({"intervals": drawn})

        self._guarded(send)

    def picture(self, name: str, path: Path) -> None:
        """Log an image file."""

        def send() -> None:
            self._started()
            assert self._wandb is not None
            self._log({name: self._wandb.Image(str(path))})

        self._guarded(send)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final numbers of the run."""

        def send() -> None:
            run = self._started()
            for key, value in values.items():
                run.summary[key] = value

        self._guarded(send)

    def close(self) -> None:
        """End the run, so that the next job of a sweep begins its own."""

        def end() -> None:
            self._run.finish()
            self._remember(max(self._step, self._first - 1))

        if self._run is not None:
            self._guarded(end)
            self._run = None
