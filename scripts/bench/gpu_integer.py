"""Integers against simulated quantization on a GPU: by shape of layer, and as a denoising step.

Everything is recorded in CUDA graphs, at each precision of what is not an integer; bfloat16, compiled,
is what integers have to beat. `sampler.engine=integer` itself compares with float32 alone, in which
sets are sampled. Part of `gpu.py`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.deploy import choose, integer
from tdq_exp.diffusion.denoising_graph import RecordedSteps
from tdq_exp.diffusion.objective import NoisePredictor
from tdq_exp.experiment import build as jobs
from tdq_exp.runtime.precision import autocast, products

TIME = 500
SIMULATED, LAST, COMPILED = "simulated", "simulated, channels-last", "simulated, compiled"
ALL, CHOSEN = "integers in every layer", "integers where a layer gains"
NOISE = 0.02  # of two times: a smaller gain is none


def integers(bench: Any, job: jobs.Experiment, net: nn.Module, batch: int) -> None:
    """Measure all that there is to know, bfloat16 first.

    Args:
        bench: where results go (`gpu.Bench`).
        job: of the model.
        net: baked, on the device, in eval mode.
        batch: images.
    """
    if bench.small:  # a rehearsal: the layers for GPUs, by single operations on the CPU
        integer.runs_on_gpu = choose.runs_on_gpu = _rehearsed  # type: ignore[assignment]
    reason = integer.unavailable(bench.device)
    if reason is not None:
        raise RuntimeError(f"no integers: {reason}")

    with bench.part("product of bytes"):
        product_of_bytes(bench)
    x = torch.randn(batch, *job.model.sample_shape, device=bench.device)
    for precision in reversed(bench.precisions):
        with bench.part(f"integers {precision}"), torch.no_grad():
            of_precision(bench, job, net, x, precision)
    bench.note("about", "integers", verdict(bench.results["milliseconds"], bench.precisions))


def _rehearsed(net: nn.Module) -> bool:
    return True


def product_of_bytes(bench: Any) -> None:
    """Measure torch's own product of bytes, for what the card can do."""
    size = 256 if bench.small else 8192
    a = torch.randint(-128, 128, (size, size), dtype=torch.int8, device=bench.device)
    b = a.clone().t()
    ms = bench.timed("product int8", lambda: torch._int_mm(a, b))
    bench.note("rates", "product int8, TOP/s", round(2 * size**3 / ms / 1e9, 1))


def of_precision(
    bench: Any, job: jobs.Experiment, net: nn.Module, x: Tensor, precision: str
) -> None:
    """Measure every shape of layer, then a whole step with all integers and with those that gain."""

    def predict(of: nn.Module) -> NoisePredictor:
        def call(x_t: Tensor, t: Tensor) -> Tensor:
            with products(precision), autocast(bench.device, precision):
                return job.model.predict(of, x_t, t)

        return call

    # By shape: the integer form with its fastest tile.
    t = torch.tensor(TIME, device=bench.device)
    with products(precision), autocast(bench.device, precision):
        times = choose.timed(net, lambda of: job.model.predict(of, x, t))
    bench.note("integers", precision, [dataclasses.asdict(entry) for entry in times])

    # As a whole: norms, SiLU and layouts between the layers count.
    tiles = {name: entry.tile for entry in times for name in entry.names}
    able = [n for entry in times if entry.integer is not None for n in entry.names]
    chains = job.model.chains(net)
    layers = {ALL: able, CHOSEN: choose.chosen(times, 1.0)}
    names = {
        form: some for form, some in layers.items() if some
    }  # without any there is no such step
    last = x.contiguous(memory_format=torch.channels_last)
    compiled = [COMPILED] if precision == bench.precisions[-1] else []  # it takes a minute or more
    for form in (SIMULATED, LAST, *names, *compiled):
        if form in names:
            whole = integer.integerize(net, chains, names[form], tiles)
        else:
            whole = copy.deepcopy(net)
        if form == LAST:
            whole = whole.to(memory_format=torch.channels_last)
        elif form == COMPILED:
            backend = "aot_eager" if bench.small else "inductor"
            whole = torch.compile(whole, dynamic=False, backend=backend)  # type: ignore[assignment]
            predict(whole)(x, t)  # not while it is recorded

        image = x if form in (SIMULATED, COMPILED) else last
        steps = RecordedSteps(job.sampler, predict(whole), image, job.model.schedule)
        steps.record()
        steps.i.zero_()
        bench.timed(name_of(form, precision), steps.step)
        del steps, whole


def name_of(form: str, precision: str) -> str:
    """Return the name of a step among the results."""
    return f"denoise ddim LSQ+TDQ {precision}, graph, {form}"


def verdict(milliseconds: Mapping[str, Any], precisions: Sequence[str]) -> str:
    """Return in one line whether integers beat the fastest simulated step, in any precision."""
    found = {
        (form, precision): milliseconds[name_of(form, precision)]["median"]
        for form in (SIMULATED, LAST, COMPILED, ALL, CHOSEN)
        for precision in precisions
        if name_of(form, precision) in milliseconds
    }
    whole = {key: ms for key, ms in found.items() if key[0] in (ALL, CHOSEN)}
    simulated = {key: ms for key, ms in found.items() if key not in whole}
    if not simulated or not whole:
        return "not measured"

    a, b = min(simulated, key=simulated.__getitem__), min(whole, key=whole.__getitem__)
    ratio = simulated[a] / whole[b]
    line = (
        f"the fastest simulated step takes {simulated[a]:.3f} ms ({a[1]}, {a[0]}), the fastest with"
        f" integers {whole[b]:.3f} ms ({b[1]}, {b[0]}): {ratio:.2f} times as fast"
    )
    if ratio >= 1 + NOISE:
        return f"integers beat simulated quantization: {line}"
    return f"INTEGERS DO NOT BEAT SIMULATED QUANTIZATION, keep it: {line}"


def page(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of the Markdown page about integers; none if they were not measured."""
    if not results.get("integers"):
        return []
    lines = [
        f"Integers: {results['about'].get('integers', 'not measured to the end')}.",
        "",
        "Each shape of layer by itself, recorded; `simulated` at this precision.",
        "",
        "| precision | layer and input | count | simulated, ms | integer, ms | gain |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for precision, entries in results["integers"].items():
        for e in entries:
            a, b = e["simulated"], e["integer"]
            gain = "-" if a is None or b is None else f"{a / b:.2f}"
            reason = f" ({e['error']})" if e["error"] else ""
            lines.append(
                f"| {precision} | {e['shape']}{reason} | {len(e['names'])} |"
                f" {_milliseconds(a)} | {_milliseconds(b)} | {gain} |"
            )
    return [*lines, ""]


def _milliseconds(seconds: float | None) -> str:
    """Return a time for a cell; a form that failed has none."""
    return "-" if seconds is None else f"{1e3 * seconds:.4f}"
