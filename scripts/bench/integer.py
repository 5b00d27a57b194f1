"""Measure the speed of a denoising step on integers -> results/bench/integer.md.

    python scripts/bench/integer.py [--threads 2] [--models ddim_small,ddim_cifar10]
        [--batches 1,8,64] [--no-compile]

Everything is compared within one process, in turn; numbers are medians. Weights are random and
W4A4: they do not change how long anything takes, and every layer runs on the same 8-bit kernels at
any number of bits. Memory is measured in a process of its own for each variant. Where a step's time
goes is measured by stopwatches around our own calls.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steps import denoising_step, medians, quantized
from torch import Tensor, nn

from tdq_exp.commands import export
from tdq_exp.config.compose import compose
from tdq_exp.deploy import coders, fuse, integer, packed
from tdq_exp.deploy.onnx import graph as onnx
from tdq_exp.experiment import build as jobs
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.models.weights.fill import save_weights
from tdq_exp.quant.convert import Recipe, bake
from tdq_exp.quant.intervals.dynamic import DynamicIntervals
from tdq_exp.quant.intervals.static import StaticIntervals
from tdq_exp.quant.intervals.temporal import TemporalIntervals
from tdq_exp.quant.kernels import cpu as kernels
from tdq_exp.quant.layers import QuantConv2d
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.report import pages
from tdq_exp.runtime import files

FLOATS = ("float32 eager", "float32 eager, channels last")
VARIANTS = (
    *FLOATS, "float32 compiled", "fake-quantized TDQ", "integer static", "integer TDQ", "integer Dynamic, per tensor",
    "integer Dynamic, per sample", "ONNX Runtime float", "ONNX Runtime integer TDQ",
)  # fmt: skip
AIMS = {("ddim_cifar10", 8): 0.40, ("ddim_small", 64): 0.65}
ROUNDS = 7
BUDGET = 60.0  # seconds for one model at one batch size, warm-up left out
T = 500


class Nets:
    """Every variant of one model, made when it is asked for.

    Args:
        name: `ddim_small` or `ddim_cifar10`.
        folder: for graphs.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.cached: dict[str, Any] = {}
        self.model: DiffusionModel = jobs.make(compose([f"model={name}"]), "model.definition")
        self.encoding = self.model.network["block_out_channels"][0]

    def get(self, key: str) -> Any:
        """A network, once made."""
        if key not in self.cached:
            self.cached[key] = self._make(key)
        return self.cached[key]

    def _make(self, key: str) -> Any:
        torch.manual_seed(0)
        if key == "float":
            return self.model.build().eval()
        if key.endswith(".onnx"):
            return self._graph(key)
        intervals: dict[str, Any] = {
            "static": StaticIntervals(), "TDQ": TemporalIntervals(encoding=self.encoding),
            "Dynamic, per tensor": DynamicIntervals(per_sample=False),
            "Dynamic, per sample": DynamicIntervals(per_sample=True),
        }  # fmt: skip
        form, _, kind = key.partition(" ")
        if form == "integer":
            baked = self.get(f"baked {kind}")
            return integer.integerize(baked, self.model.chains(baked))
        x = torch.randn(4, *self.model.sample_shape)
        net = quantized(self.model, Recipe(4, 4, Lsq, Lsq, intervals[kind]), x, torch.tensor(T))
        return bake(net)

    def _graph(self, key: str) -> Path:
        file, shape = self.folder / f"{self.name}_{key}", self.model.sample_shape
        if key == "float.onnx":
            clock = onnx.Clock()
            onnx.write(onnx.Graph(self.get("float"), clock).eval(), shape, file)
            return file
        net = self.get("baked TDQ")
        seen: dict[str, list[tuple[int, float, float]]] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, y: Tensor) -> None:
                low, high = onnx.first_sum(module, args[0], y).aminmax()
                seen[name] = [(T, float(low), float(high))]

            return hook

        handles = [
            m.register_forward_hook(watch(n))
            for n, m in net.named_modules()
            if isinstance(m, QuantConv2d)
        ]
        denoising_step(self.model, net, torch.randn(4, *shape))()
        for handle in handles:
            handle.remove()
        onnx.write(
            onnx.graph_of(net, onnx.output_ranges(seen, self.model.schedule.steps), "integer"),
            shape,
            file,
        )
        return file

    def step(self, variant: str, batch: int) -> Callable[[], object]:
        """One denoising step of a variant."""
        x = torch.randn(batch, *self.model.sample_shape, generator=torch.Generator().manual_seed(1))
        last = x.contiguous(memory_format=torch.channels_last)
        if variant.startswith("ONNX"):
            file = self.get("integer.onnx" if "integer" in variant else "float.onnx")
            session = export.session(file, spinning=False)
            feed = {"x_t": x.numpy(), "t": np.array(T, dtype=np.int64)}
            return lambda: session.run(None, feed)
        if variant == "float32 eager":
            return denoising_step(self.model, self.get("float"), x)
        if variant.startswith("float32"):
            net = copy.deepcopy(self.get("float")).to(memory_format=torch.channels_last)
            if "compiled" in variant:
                torch._dynamo.reset()
                net.forward = torch.compile(net.forward, dynamic=False)
            return denoising_step(self.model, net, last)
        if variant.startswith("fake"):
            return denoising_step(self.model, self.get("baked TDQ"), x)
        return denoising_step(self.model, self.get(variant), last)


def timed(nets: Nets, batch: int, variants: list[str]) -> dict[str, dict[str, float]]:
    """Medians of interleaved steps; as many rounds as the budget allows, at least 3."""
    with torch.no_grad():
        steps = {name: nets.step(name, batch) for name in variants}
        began = time.perf_counter()
        for step in steps.values():
            step()
        for step in steps.values():
            step()
    once = (time.perf_counter() - began) / 2
    return medians(steps, max(3, min(ROUNDS, int(BUDGET / once) - 2)), pause=0.03)


class Stopwatches:
    """Seconds by label; what a nested one takes is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    def around(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            self._inside.append(0.0)
            result = call(*args, **kwargs)
            whole, inner = time.perf_counter() - began, self._inside.pop()
            self.seconds[label] = self.seconds.get(label, 0.0) + whole - inner
            if self._inside:
                self._inside[-1] += whole
            return result

        return watched


@contextmanager
def watched(net: nn.Module, watches: Stopwatches) -> Iterator[None]:
    """Puts stopwatches around the parts of an integer step."""
    targets = [
        (kernels, "codes", "quantize"), (kernels, "norm_codes", "norm + SiLU + quantize"),
        (kernels, "normalised", "norm + SiLU"), (kernels, "ranges", "read ranges"),
        (integer.IntegerLayer, "forward", "call of integer layers"), (fuse.CodedAttention, "forward", "attention products"),
        (integer.IntegerLayer, "_product", "integer convolutions and linear layers"),
    ]  # fmt: skip
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in targets]
    for owner, name, label in targets:
        setattr(owner, name, watches.around(label, getattr(owner, name)))
    blocks = [
        m
        for m in net.modules()
        if isinstance(m, nn.SiLU | nn.GroupNorm) or type(m).__name__ == "CodedUpsample"
    ]
    for module in blocks:
        module.forward = watches.around(type(module).__name__, module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
        for module in blocks:
            del module.forward


def breakdown(nets: Nets, variant: str, batch: int, repeats: int = 5) -> dict[str, float]:
    """Milliseconds of a step by what they are spent on, and the rest."""
    step, watches = nets.step(variant, batch), Stopwatches()
    step()
    whole = watches.around("rest: sums, concatenations, time embedding, calls", step)
    with watched(nets.get(variant), watches):
        for _ in range(repeats):
            whole()
    return {label: 1e3 * seconds / repeats for label, seconds in watches.seconds.items()}


def memory(name: str, variant: str, batch: int, threads: int) -> float:
    """Working memory of a step, MB: what a process of its own takes at its peak above what it held before, weights included
    there. Linux resets its mark by `/proc/self/clear_refs`."""
    command = [
        sys.executable,
        __file__,
        "--threads",
        str(threads),
        "--memory",
        variant,
        "--models",
        name,
    ]
    done = subprocess.run(
        [*command, "--batches", str(batch)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def working_memory(step: Callable[[], object]) -> float:
    """See `memory`; of two steps in this process."""

    def status(field: str) -> float:
        line = next(
            x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
        )
        return float(line.split()[1]) / 1e3

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building the network freed is not there for the step
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    step()
    return status("VmHWM") - before


def sizes(nets: Nets) -> dict[str, float]:
    """MB of the files that a network can be kept in."""
    folder = nets.folder
    save_weights(nets.get("float").state_dict(), folder / "float.safetensors", {})
    save_weights(nets.get("baked TDQ").state_dict(), folder / "baked.safetensors", {})
    found = {"float32 weights": (folder / "float.safetensors").stat().st_size}
    found["baked W4A4 TDQ, codes as bytes"] = (folder / "baked.safetensors").stat().st_size
    found["packed W4A4 TDQ"] = packed.save(
        nets.get("baked TDQ").state_dict(), folder / "packed.safetensors", {}, ""
    )
    found["packed W4A4 static"] = packed.save(
        nets.get("baked static").state_dict(), folder / "static.safetensors", {}, ""
    )
    found["ONNX float"] = nets.get("float.onnx").stat().st_size
    found["ONNX integer W4A4 TDQ"] = nets.get("integer.onnx").stat().st_size
    return {key: size / 1e6 for key, size in found.items()}


def exactness(nets: Nets) -> float:
    """Largest relative difference of an integer layer's output from the simulated one's, over layers and time steps."""
    worst = 0.0
    net = nets.get("baked TDQ")
    layers = integer.candidates(net)
    x = torch.randn(2, *nets.model.sample_shape, generator=torch.Generator().manual_seed(2))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        net.get_submodule(n).register_forward_hook(
            lambda m, args, out, n=n: seen.update({n: (args[0], out)})
        )
        for n in layers
    ]
    with torch.no_grad():
        for t in (0, 250, 500, 999):
            nets.model.predict(net, x, torch.tensor(t))
            for name, (value, y) in seen.items():
                made: Any = layers[name]
                if made.coder is None:
                    reader = net.get_submodule(name.rpartition(".")[0]).processor.input_quantizer  # type: ignore[union-attr]
                    value = coders.coder_of(reader)(value)  # type: ignore[arg-type]
                worst = max(worst, float((made(value) - y).abs().max() / y.abs().max()))
    for handle in handles:
        handle.remove()
    return worst


def page(content: dict[str, Any]) -> list[str]:
    """Return the lines of the Markdown page."""
    about = content["about"]
    lines = [
        "# Integer execution: a denoising step",
        "",
        f"{about['machine']}, {about['threads']} threads, torch {torch.__version__}, Python {platform.python_version()}, commit"
        f" {about['commit']}. `make bench-integer`. Medians of interleaved rounds, milliseconds; in brackets: share of the"
        " best float32 eager one.",
    ]
    for name, of in content["models"].items():
        batches = list(of["ms"])
        lines += [
            "",
            f"## {name}",
            "",
            "| variant | " + " | ".join(f"batch {b}" for b in batches) + " | working memory, MB |",
        ]
        lines.append("|---" * (len(batches) + 2) + "|")
        best = {b: min(of["ms"][b][v]["median"] for v in FLOATS) for b in batches}
        for variant in VARIANTS:
            cells = [
                f"{of['ms'][b][variant]['median']:.1f} ({of['ms'][b][variant]['median'] / best[b]:.2f})"
                if variant in of["ms"][b]
                else "-"
                for b in batches
            ]
            peak = of["memory_mb"].get(variant)
            lines.append(
                f"| {variant} | "
                + " | ".join(cells)
                + f" | {'-' if peak is None else f'{peak:.0f}'} |"
            )
        for b in batches:
            median = {v: of["ms"][b][v]["median"] for v in of["ms"][b]}
            tdq, aim = median["integer TDQ"], AIMS.get((name, int(b)))
            said = f"Batch {b}: integer TDQ / best float32 eager {tdq / best[b]:.2f}"
            said += (
                f" (aim {aim:.2f}, {'met' if tdq <= aim * best[b] else 'missed'})" if aim else ""
            )
            said += (
                f"; integer TDQ / integer static {tdq / median['integer static']:.3f} (aim 1.02)"
            )
            for kind in ("per tensor", "per sample"):
                said += f"; Dynamic {kind} / static {median[f'integer Dynamic, {kind}'] / median['integer static']:.2f}"
            lines += ["", said + "."]
        lines += [
            "", f"Working memory: of a step at batch {of['memory_batch']}, above what its process held before, weights among it.",
            "", f"Largest difference of a layer's output from simulated quantization, relative: {of['exactness']:.1e}.",
        ]  # fmt: skip
        for key, parts in of["breakdown"].items():
            total = sum(parts.values())
            lines += [
                "",
                f"Where the time goes, {key} ({total:.1f} ms with stopwatches):",
                "",
                "| part | ms | share |",
                "|---|---|---|",
            ]
            lines += [
                f"| {label} | {ms:.2f} | {ms / total:.0%} |"
                for label, ms in sorted(parts.items(), key=lambda i: -i[1])
            ]
        lines += [
            "",
            "| file | MB |",
            "|---|---|",
            *(f"| {label} | {mb:.2f} |" for label, mb in of["sizes_mb"].items()),
        ]
        lines += ["", f"ONNX Runtime's optimised integer graph: {of['operators']}."]
    return lines


def besides_times(nets: Nets, variants: list[str], threads: int) -> dict[str, Any]:
    """Everything about a model but how long its steps take side by side."""
    shown = 8 if nets.name == "ddim_cifar10" else 64
    parts = ("integer TDQ", "integer Dynamic, per tensor")
    kinds = export.optimised_operators(nets.get("integer.onnx"))
    measured = [v for v in variants if "compiled" not in v]  # its peak is the compiler's
    return {
        "breakdown": {
            f"{variant}, batch {shown}": breakdown(nets, variant, shown) for variant in parts
        },
        "sizes_mb": sizes(nets),
        "exactness": exactness(nets),
        "operators": ", ".join(
            f"{kinds[k]} {k}" for k in ("QLinearConv", "MatMulIntegerToFloat", "Conv") if k in kinds
        ),
        "memory_batch": 8,
        "memory_mb": {v: memory(nets.name, v, 8, threads) for v in measured},
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default="ddim_small,ddim_cifar10")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes minutes"
    )
    parser.add_argument(
        "--keep-times",
        action="store_true",
        help="take the times from integer.json, measure the rest",
    )
    parser.add_argument("--memory", metavar="VARIANT", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names, batches = options.models.split(","), [int(b) for b in options.batches.split(",")]
    reason = integer.unavailable(torch.device("cpu"))
    if reason is not None:
        raise SystemExit(f"error: nothing to measure: {reason}")
    with tempfile.TemporaryDirectory() as scratch:
        if options.memory:
            step = Nets(names[0], Path(scratch)).step(options.memory, batches[0])
            print(working_memory(step))
            return
        variants = [v for v in VARIANTS if not (options.no_compile and "compiled" in v)]
        content: dict[str, Any] = {"about": pages.about(threads=options.threads), "models": {}}
        if options.keep_times:
            kept = files.read_json(options.out / "integer.json")
            if kept is None:
                raise SystemExit(
                    f"error: {options.out / 'integer.json'}: is not there; measure the times first"
                )
            content = kept
        for name in names:
            nets = Nets(name, Path(scratch))
            of = content["models"].setdefault(name, {"ms": {}})
            for batch in () if options.keep_times else batches:
                of["ms"][str(batch)] = timed(nets, batch, variants)
                print(
                    name,
                    batch,
                    {k: round(v["median"], 1) for k, v in of["ms"][str(batch)].items()},
                    flush=True,
                )
            of |= besides_times(nets, variants, options.threads)
        pages.report(
            options.out / "integer", {"models": content["models"]}, content["about"], page(content)
        )


if __name__ == "__main__":
    main()
