"""Options of the machine: processes, threads, and who follows a run.

Free of torch. Results depend on them by the order of sums, and by the noise that each process and
micro-batch draws; the record of a fit states them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tdq_exp.config.setting import setting

TRACKERS = ("none", "offline", "wandb")
MOST_THREADS = 1024  # of a process: beyond what a machine lets it start, it dies of a signal
MOST_PROCESSES = 1024
MOST_MICRO_BATCHES = 10**4


@dataclass
class LauncherOptions:
    """The processes of a run, their threads, and how training saves memory."""

    nproc: str = setting("auto", help="a number, or auto: every visible GPU, 1 on a CPU")
    cpu: bool = setting(False, help="stay on the CPU although there is a GPU")
    threads: int = setting(
        0,
        low=0,
        most=MOST_THREADS,
        help="torch threads of each process; 0 leaves torch's default",
    )
    micro_batches: int = setting(
        1,
        low=1,
        most=MOST_MICRO_BATCHES,
        help="training: passes into which a process splits its part of a batch, to save memory;"
        " gradients are the same up to summation order and the noise of dropout and NIPQ",
    )
    recompute: bool = setting(
        False,
        help="training: recompute activations in the backward pass, to save memory; the same"
        " gradients in about a third more time (several times as long with dropout or NIPQ on a"
        " GPU, whose random state can't be read while CUDA graphs are recorded)",
    )
    compile: bool = setting(
        False,
        help="training: let torch compile each residual and attention block, which takes minutes at"
        " first; other rounding, so rows say it; not together with recompute",
    )

    def check(self) -> None:
        """Refuse a number of processes that is none, and options that do not go together.

        Raises:
            ValueError: naming the key.
        """
        if self.compile and self.recompute:
            raise ValueError(
                "launcher.compile=true: not together with launcher.recompute=true; choose one"
            )
        if self.nproc == "auto":
            return
        if not (self.nproc.isdecimal() and 0 < int(self.nproc) <= MOST_PROCESSES):
            raise ValueError(
                f"launcher.nproc={self.nproc}: a whole number from 1 to {MOST_PROCESSES}, or auto"
            )


@dataclass
class TrackerOptions:
    """Where a run's curves go."""

    kind: str = setting("none", choices=TRACKERS, help="none, offline (a local folder) or wandb")
    project: str = setting("tdq_exp", is_name=True, help="wandb's project")
