"""Pack a finished run into one file that is all that sampling needs: weights at their real bit width, tables of step sizes.

python -m tdq_exp pack results/runs/digits_w4a4_lsq_tdq/seed0 --out digits_w4a4.safetensors
python -m tdq_exp sample digits_w4a4.safetensors --images 64
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tdq_exp.deploy import packed
from tdq_exp.experiment.load import load
from tdq_exp.runtime import files
from tdq_exp.runtime.progress import console


def main() -> None:
    """The command; `--help` lists its options."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="\n".join((__doc__ or "").splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="folder of a finished run: results/runs/<name>/seed<k>")
    parser.add_argument("--out", type=Path, help="file to write (default: packed.safetensors in the run's folder)")
    options = parser.parse_args()
    try:
        pack(options.run.expanduser(), options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def pack(run: Path, out: Path | None = None) -> Path:
    """Writes the packed file of a run, and prints its size beside that of the float weights.

    Raises:
        ValueError: for a run that is not quantized, or a file that exists.
        FileNotFoundError: if there is no finished run.
    """
    out = out or run / "packed.safetensors"
    if out.exists():
        raise ValueError(f"--out={out}: exists; remove it or name another file")
    job, net = load(run)
    if job.recipe is None:
        raise ValueError(f"{run}: is a float run; there is nothing to pack")
    found = files.read_json(run / "fit.json")
    assert found is not None
    size = packed.save(net.state_dict(), out, found["config"], found["fingerprint"], job.model.parts())
    parameters = sum(p.numel() for p in job.model.build().parameters())
    console.print(
        f"{out}: {size / 1e6:.3f} MB, {size / (4 * parameters):.3f} of the {4 * parameters / 1e6:.3f} MB of the float"
        " weights; read back and compared",
        markup=False,
    )
    return out
