"""Export a finished run as one ONNX file with its tables inside: (x_t, t) -> prediction.

python -m tdq_exp export results/runs/digits_w4a4_lsq_tdq/seed0 --out digits.onnx
python -m tdq_exp export results/runs/digits_w4a4_lsq_tdq/seed0 --out other.onnx --form portable
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from tdq_exp.commands import cli
from tdq_exp.config.setting import require
from tdq_exp.deploy.onnx import graph as onnx
from tdq_exp.diffusion.draws import BareSeed, Stream, bare_generator
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import sample_stage
from tdq_exp.experiment.finished_run import load
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.quant.convert import activation_quantizers
from tdq_exp.quant.layers import QuantConv2d
from tdq_exp.runtime import files
from tdq_exp.runtime.progress import console, print_table

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

GROUP = 16  # images sampled at a time
NEEDED = ("onnx", "onnxruntime", "onnxscript")

# Operators whose number is printed: on integers, then in float.
REPORTED = (
    *("QLinearConv", "ConvInteger", "MatMulIntegerToFloat", "MatMulInteger"),
    *("Conv", "FusedConv", "Gemm", "MatMul"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = cli.parser(__doc__, "python -m tdq_exp export")

    parser.add_argument("run", type=Path, help="folder of a finished run, or a packed network")

    parser.add_argument("--out", type=Path, required=True, help="file to write: *.onnx")
    parser.add_argument(
        "--form",
        default="integer",
        help="integer: QLinearConv and MatMulInteger, for ONNX Runtime (the default);"
        " portable: constant quantizers between multiplications, for other runtimes",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=16,
        help="images sampled to see the range of each convolution's output over t"
        " (integer form; default: 16)",
    )
    options = parser.parse_args(arguments)

    return cli.exit_code(
        export,
        options.run.expanduser(),
        options.out.expanduser(),
        options.form,
        options.images,
    )


def export(run: Path, out: Path, form: str = "integer", images: int = 16) -> Path:
    """Write the graph of a run, run it in ONNX Runtime, and print its size, operators and parity.

    Args:
        run: folder of a finished run, or a packed network.
        out: the file to write.
        form: `integer` or `portable`.
        images: sampled to see the range of each convolution's output over t.

    Returns:
        The file.

    Raises:
        ValueError: for a run that is not quantized, has no tables or takes a condition, a file
            that exists, or a missing package.
        FileNotFoundError: if there is no finished run.
    """
    _check_options(out, form, images)

    job, net = load(run)
    if job.recipe is None:
        raise ValueError(f"{run}: is a float run; diffusers' own export writes it")
    if job.model.draw_condition(0, Stream.IMAGE, range(1)) is not None:
        raise ValueError(f"{run}: is conditional; only networks of (x_t, t) can be exported")
    _require_tables(run, net)

    written = graph_file(job, net, out, form, images)
    console.print(f"{out}: {written / 1e6:.3f} MB, {form} form")

    # What became of the operators.
    counts = optimised_operators(out)
    listed = ", ".join(f"{counts[name]} {name}" for name in REPORTED if counts.get(name))
    console.print(f"as ONNX Runtime optimised it: {listed}")

    # And what it computes.
    print_table(
        "prediction, relative root mean square of the difference from simulated quantization",
        ["t", "ONNX Runtime", "control: simulated, another batch size"],
        [
            (str(t), f"{parity:.2e}", f"{control:.2e}")
            for t, parity, control in compare(job, net, out)
        ],
    )
    return out


def _require_tables(run: Path, net: nn.Module) -> None:
    """Refuse step sizes that are read from the input, before images are sampled for their ranges.

    Raises:
        ValueError: naming the run and a quantizer.
    """
    for name, quantizer in activation_quantizers(net).items():
        if quantizer.tables() is None:
            raise ValueError(
                f"{run}: can't be exported, {name} reads its step size from each input"
                " (tdq=dynamic)"
            )


def _check_options(out: Path, form: str, images: int) -> None:
    """Refuse what can be refused before a network is loaded."""
    if form not in onnx.FORMS:
        raise ValueError(f"--form={form}: choose {' or '.join(onnx.FORMS)}")
    require("--images", images, int, low=1, most=10**6)
    files.require_folder(out.parent, "--out")
    if out.suffix != ".onnx":
        raise ValueError(f"--out={out}: must end in .onnx")
    if out.exists():
        raise ValueError(f"--out={out}: exists; remove it or name another file")

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"export needs {', '.join(missing)}: pip install 'tdq_exp[onnx]'")


def graph_file(job: jobs.Experiment, net: nn.Module, out: Path, form: str, images: int) -> int:
    """Write the graph of a baked network and return its size in bytes. Arguments as `export`."""
    steps = job.model.schedule.steps
    ranges = (
        onnx.output_ranges(sums_over_time(job, net, images), steps) if form == "integer" else {}
    )
    graph = onnx.graph_of(net, ranges, form)

    with files.replacing(out) as part:
        return onnx.write(graph, job.model.sample_shape, part)


@torch.no_grad()
def sums_over_time(
    job: jobs.Experiment, net: nn.Module, images: int
) -> dict[str, list[tuple[int, float, float]]]:
    """Return the range of each convolution's first sum at every step of a sampling.

    Returns:
        Layer -> (t, smallest, largest).
    """
    ranges: dict[str, dict[int, tuple[float, float]]] = {}
    handles = []

    # 1. Watch every convolution.
    def watch(name: str, layer: QuantConv2d) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            low, high = (float(v) for v in onnx.first_sum(layer, args[0], y).aminmax())
            t = int(net.time.t)  # type: ignore[union-attr,operator,arg-type]
            before = ranges.setdefault(name, {}).get(t, (low, high))
            ranges[name][t] = (min(low, before[0]), max(high, before[1]))

        handles.append(layer.register_forward_hook(hook))

    for name, module in net.named_modules():
        if isinstance(module, QuantConv2d):
            watch(name, module)

    # 2. Sample images that no row is measured on.
    for start in range(0, images, GROUP):
        sample_stage.sample_group(
            Denoiser(net, job.model),
            job.sampler,
            range(start, min(start + GROUP, images)),
            seed=job.sampling.seed,
            stream=Stream.EXPORT_RANGE,
            device=torch.device("cpu"),
        )

    for handle in handles:
        handle.remove()
    return {name: [(t, *of) for t, of in by_t.items()] for name, by_t in ranges.items()}


@torch.no_grad()
def compare(job: jobs.Experiment, net: nn.Module, file: Path) -> list[tuple[int, float, float]]:
    """Compare the graph with the simulated network at four time steps.

    At few bits a sum on the border of two codes may fall on either side, and the layers behind it
    see it: what another order of summation does is the measure of parity.

    Returns:
        (t, difference of ONNX Runtime from the simulated network, difference of the simulated
        network from itself at another batch size).
    """
    run = session(file)
    steps = job.model.schedule.steps
    drawn = bare_generator(BareSeed.EXPORT_PARITY, 0)
    x = torch.randn(8, *job.model.sample_shape, generator=drawn)

    rows = []
    for t in (0, steps // 4, steps // 2, steps - 1):
        now = torch.tensor(t)
        expected = job.model.answer(net, x, now)

        feed = {"x_t": x.numpy(), "t": np.array(t, dtype=np.int64)}
        output = torch.from_numpy(run.run(None, feed)[0])

        # The control: how far simulated quantization differs from itself in a larger batch.
        larger = job.model.answer(net, x.repeat(8, 1, 1, 1), now)[:8]
        smaller = job.model.answer(net, x[:3], now)
        control = max(onnx.parity(larger, expected), onnx.parity(smaller, expected[:3]))
        rows.append((t, onnx.parity(output, expected), control))

    return rows


def session(
    file: Path, optimised: Path | None = None, threads: int = 0, spinning: bool = True
) -> InferenceSession:
    """Return a session of ONNX Runtime on the CPU.

    Args:
        file: the graph.
        optimised: where to write it as it will run.
        threads: of one operator; 0 leaves it to torch's number.
        spinning: may its threads wait busily? Not where others are timed beside it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def optimised_operators(file: Path) -> dict[str, int]:
    """Return how many operators of each kind ONNX Runtime will run."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        session(file, optimised)
        return onnx.operators(optimised)
