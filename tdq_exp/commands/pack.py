"""Pack a finished run into one file: weights at their real bit width, tables of step sizes.

python -m tdq_exp pack results/runs/digits_w4a4_lsq_tdq/seed0 --out digits_w4a4.safetensors
python -m tdq_exp sample digits_w4a4.safetensors --images 64
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tdq_exp.commands import cli
from tdq_exp.config.naming import FIT_RECORD, PACKED
from tdq_exp.deploy import packed
from tdq_exp.experiment.finished_run import load
from tdq_exp.runtime import files
from tdq_exp.runtime.progress import console


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = cli.parser(__doc__, "python -m tdq_exp pack")
    parser.add_argument(
        "run", type=Path, help="folder of a finished run: results/runs/<name>/seed<k>"
    )
    parser.add_argument(
        "--out", type=Path, help="file to write (default: packed.safetensors in the run's folder)"
    )
    options = parser.parse_args(arguments)

    return cli.exit_code(pack, options.run.expanduser(), options.out)


def pack(run: Path, out: Path | None = None) -> Path:
    """Write the packed file of a run, print its size beside the float weights', return its path.

    Raises:
        ValueError: for a run that is not quantized, or a file that exists.
        FileNotFoundError: if there is no finished run.
    """
    out = (out or run / PACKED).expanduser()
    if out.exists():
        raise ValueError(f"--out={out}: exists; remove it or name another file")

    if out.suffix != ".safetensors":
        raise ValueError(f"--out={out}: must end in .safetensors, by which it is known as packed")
    files.require_folder(out.parent, "--out")

    job, net = load(run)
    if job.recipe is None:
        raise ValueError(f"{run}: is a float run; there is nothing to pack")

    if job.fit.options.chooses_checkpoint and out == (run / PACKED).expanduser():
        raise ValueError(
            f"{out}: is reserved for the last network, but this run's row is of an earlier"
            " checkpoint; name another file with --out"
        )

    # What the file must say of its run.
    record = files.read_json(run / FIT_RECORD)
    assert record is not None
    size = packed.save(
        net.state_dict(), out, record["config"], record["fingerprint"], job.model.parts()
    )

    parameters = sum(p.numel() for p in job.model.build().parameters())
    float_mb = 4 * parameters / 1e6
    console.print(
        f"{out}: {size / 1e6:.3f} MB, {size / (4 * parameters):.3f} of the {float_mb:.3f} MB of the"
        " float weights; read back and compared",
    )
    return out
