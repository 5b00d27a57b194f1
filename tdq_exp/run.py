"""The command: compose a configuration, check it, start its processes, run the pipeline.

    python -m tdq_exp.run                                        the default, digits W4A4 LSQ + TDQ
    python -m tdq_exp.run +experiment=ddim_small_w4a4_lsq_tdq    one experiment
    python -m tdq_exp.run -m +experiment=ddim_small_w4a4_lsq_tdq bits=w8a8,w4a4,w3a3
    python -m tdq_exp.run ... plan_only=true                     what would be done and its cost

To resume, run the same command again. Exit codes: see `tdq_exp.commands.cli`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from tdq_exp.commands import cli, sweep
from tdq_exp.config import assets, compose, schema
from tdq_exp.runtime import signals


def main() -> None:
    """Run the command.

    Hydra does the rest, but its message about a mistake has five lines: it is looked for first. A
    sweep is our own, for Hydra's ends with its first failure.
    """
    arguments = sys.argv[1:]

    with signals.handled():
        ending = cli.attempt(_prepare, arguments)
        if ending.code:
            sys.exit(ending.code)

        jobs = sweep.jobs_of(arguments)
        if jobs is not None:
            sys.exit(sweep.run(jobs, _run))
        _job()


def _prepare(arguments: Sequence[str]) -> None:
    """Make the experiments known to Hydra, and refuse what can't be composed."""
    compose.register(arguments)
    sweep.jobs_of(arguments)  # a sweep that can't be listed

    # --help, -m and their like are Hydra's own.
    if not any(argument.startswith("-") for argument in arguments):
        compose.compose(arguments)


@hydra.main(version_base="1.3", config_path=str(assets.configs()), config_name="config")
def _job(cfg: DictConfig) -> None:
    """Run one job; a user's mistake is one line and an exit code."""
    # A launcher of Hydra's runs several jobs, and notes itself which of them failed.
    if cfg.traceback or HydraConfig.get().mode == RunMode.MULTIRUN:
        _run(cfg, list(HydraConfig.get().overrides.task))
        return

    ending = cli.attempt(_run, cfg, sys.argv[1:])
    if ending.shared:
        from tdq_exp.runtime import launch

        launch.leave_together()
    if ending.code:
        sys.exit(ending.code)


def _run(cfg: DictConfig, arguments: Sequence[str]) -> None:
    """Run one job.

    Args:
        cfg: its configuration.
        arguments: of the command line that gives this configuration, for further processes.
    """
    # 1. Everything that can be said without torch, so that a mistake is told at once.
    schema.typed(cfg)
    from tdq_exp.experiment import build as jobs
    from tdq_exp.experiment import cost as costs
    from tdq_exp.experiment import inputs, pipeline, show
    from tdq_exp.runtime import launch

    # 2. The experiment, and what it would cost.
    job = jobs.build(cfg)
    if cfg.plan_only:
        inputs.require_inputs(job, download=False)
        costs.show(job)
        return

    if cfg.protocol.scale == "paper" and not launch.gpus() and not cfg.go and not job.machine.smoke:
        costs.show(job)
        raise ValueError(
            "this is the paper's scale and there is no GPU: take model=ddim_small, or insist with"
            " go=true"
        )

    # 3. Its processes, each of which comes here again.
    count = launch.wanted(job.machine.launcher)
    if count > 1 and not launch.launched():
        launch.start(count, arguments)
        return

    # 4. The stages.
    with launch.watched():
        show.print_row(job, pipeline.run(job))


if __name__ == "__main__":
    main()
