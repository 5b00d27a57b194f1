"""The command: compose a configuration, check it, start its processes, run the pipeline.

    python -m tdq_exp.run                                        the default, digits W4A4 LSQ + TDQ
    python -m tdq_exp.run +experiment=ddim_small_w4a4_lsq_tdq    one experiment
    python -m tdq_exp.run -m +experiment=ddim_small_w4a4_lsq_tdq bits=w8a8,w4a4,w3a3
    python -m tdq_exp.run ... plan_only=true                     what would be done and its cost

To resume, run the same command again.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from tdq_exp.config import assets, compose, schema


def main() -> None:
    """Run the command.

    Hydra does the rest, but its message about a mistake has five lines: it is looked for first.
    """
    arguments = sys.argv[1:]
    try:
        compose.register(arguments)
        # --help, -m and their like are Hydra's own.
        if not any(argument.startswith("-") for argument in arguments):
            compose.compose(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    _job()


@hydra.main(version_base="1.3", config_path=str(assets.configs()), config_name="config")
def _job(cfg: DictConfig) -> None:
    """Run one job; a user's mistake is one line and exit code 2."""
    try:
        _run(cfg)
    except (ValueError, OSError, FloatingPointError) as error:  # InterruptedError is an OSError
        if cfg.traceback:
            raise
        if not getattr(error, "told", False):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped: to go on, run the same command again", file=sys.stderr)
        sys.exit(130)


def _run(cfg: DictConfig) -> None:
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
        launch.relaunch(count, sys.argv[1:])

    show.print_row(job, pipeline.run(job))


if __name__ == "__main__":
    main()
