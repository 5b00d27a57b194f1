"""What every stage of a run needs beside its own subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdq_exp.runtime.processes import Processes

Log = Callable[[Mapping[str, Any], int], None]


@dataclass(frozen=True)
class RunContext:
    """Where a fit works, under which fingerprint, and who shares the work.

    Args:
        folder: of the run; training states and finished parts lie here.
        fingerprint: of the fit; states of another fit are refused.
        seed: of the fit's draws.
        processes: who shares the work.
        cache: folder of what is kept between runs.
        micro_batches: passes in which a process computes its part of a batch.
        recompute: whether activations are computed again in the backward pass, to save memory.
        compile: whether torch compiles the network's blocks.
        log: receives (numbers by name, update); None on processes that say nothing.
    """

    folder: Path
    fingerprint: str
    seed: int
    processes: Processes
    cache: Path
    log: Log | None = None
    micro_batches: int = 1
    recompute: bool = False
    compile: bool = False
