"""Options of the machine: processes, threads, and who follows a run.

Free of torch; no result depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tdq_exp.config.setting import setting

TRACKERS = ("none", "offline", "wandb")


@dataclass
class LauncherOptions:
    """The processes of a run."""

    nproc: str = setting("auto", help="a number, or auto: every visible GPU, 1 on a CPU")
    cpu: bool = setting(False, help="stay on the CPU although there is a GPU")
    threads: int = setting(0, low=0, help="torch threads of each process; 0 leaves torch's default")


@dataclass
class TrackerOptions:
    """Where a run's curves go."""

    kind: str = setting("none", choices=TRACKERS, help="none, offline (a local folder) or wandb")
    project: str = setting("tdq_exp", help="wandb's project")
