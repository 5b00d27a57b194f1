"""`gpu.md` from `gpu.json`: the bars, every time, the profile, and the GPU hours of both tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gpu_integer

from tdq_exp.runtime import files

AIMS = (
    ("LSQ training step / float, {p}", "train LSQ {p}{g}", "train float {p}{g}", 1.25),
    ("LSQ+TDQ / LSQ, training step, {p}", "train LSQ+TDQ {p}{g}", "train LSQ {p}{g}", 1.05),
    ("fused / unfused LSQ step, {p}", "train LSQ {p}{g}", "train LSQ {p}{g}, unfused", 0.6),
    (
        "baked TDQ denoising step / float, {p}, CUDA graph",
        "denoise ddim LSQ+TDQ {p}, graph", "denoise ddim float {p}, graph", 1.10,
    ),
    (
        "TDQ / static denoising step, {p}, CUDA graph",
        "denoise ddim LSQ+TDQ {p}, graph", "denoise ddim LSQ {p}, graph", 1.01,
    ),
    ("latent model: LSQ training step / float, {p}", "train ldm LSQ {p}{g}", "train ldm float {p}{g}", None),
    (
        "latent model: baked TDQ denoising step / float, {p}, CUDA graph",
        "denoise ldm LSQ+TDQ {p}, graph", "denoise ldm float {p}, graph", None,
    ),
)  # fmt: skip
PRECISIONS = ("float32", "tf32", "bfloat16")


def write(folder: Path, hours: bool) -> None:
    """Write gpu.md beside gpu.json.

    Args:
        folder: of both.
        hours: add the GPU hours of the tables? It composes every cell's configuration: half a minute.
    """
    results = files.read_json(folder / "gpu.json")
    if results is None:
        raise SystemExit(
            f"{folder / 'gpu.json'} is missing: run scripts/bench/gpu.py on a GPU first"
        )
    lines = [
        *_about(results),
        *_bars(results),
        *_loop(results),
        *gpu_integer.page(results),
        *_times(results),
        *_profiles(results),
    ]
    if hours:
        lines += _hours(results)
        write_cards(results)
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


CARDS = """\
# GPU measurements for cost estimates (`plan_only=true`): seconds per image of a training step and
# of a denoising step, and memory of training and sampling in GB. Written by
# `scripts/bench/gpu.py --report`. Memory is what torch had reserved; at commit f9d5e33 it includes
# leftovers of networks measured earlier in the same process, so it is an upper bound.
"""


def write_cards(results: Mapping[str, Any]) -> None:
    """Write configs/cards.yaml, from which plans for a GPU are made."""
    from omegaconf import OmegaConf

    from tdq_exp.config import assets
    from tdq_exp.config.compose import compose
    from tdq_exp.experiment import build
    from tdq_exp.experiment.card import multiplications

    networks = {}
    for name, model in (("ddim_cifar10", "ddim"), ("ldm_churches", "ldm")):
        job = build.build(compose([f"model={name}", "model.weights=random"]), source=False)
        prefix = "ldm " if model == "ldm" else ""
        train: dict[str, Any] = {}
        denoise: dict[str, Any] = {}
        memory: dict[str, Any] = {}
        decode = 0.0
        for precision in PRECISIONS:
            rates = _rates(results, model, precision)
            if rates is None:
                continue
            train[precision], denoise[precision], decode = rates
            memory[precision] = {
                form: results["gigabytes"][f"train {prefix}{form} {precision}"]
                for form in ("float", "LSQ", "LSQ+TDQ")
            }
        networks[name] = {
            "multiplications": multiplications(job),
            "batch": results["about"]["batch"][model],
            "train_recorded": any(
                f"train {prefix}LSQ {p}, graph" in results["milliseconds"] for p in PRECISIONS
            ),
            "decode": decode,
            "train": _short(train),
            "denoise": _short(denoise),
            "memory_gb": memory,
            "sampling": _sampling(results, model),
        }

    about = {"commit": results["about"]["commit"], "torch": results["about"]["torch"]}
    text = OmegaConf.to_yaml(OmegaConf.create({results["about"]["device"]: {**about, **networks}}))
    (assets.configs() / "cards.yaml").write_text(CARDS + text)


def _sampling(results: Mapping[str, Any], model: str) -> dict[str, Any] | None:
    """Return the memory of sampling and decoding; None if a part of it was not measured."""
    gigabytes = results["gigabytes"]
    forms = {form: f"denoise {model} {form} float32, graph" for form in ("float", "LSQ", "LSQ+TDQ")}
    decode = ["decode ldm"] if model == "ldm" else []
    if not gigabytes.keys() >= {*forms.values(), *decode}:
        return None
    return {
        "batch": _sampled_at_once(results, model),
        "memory_gb": {form: gigabytes[name] for form, name in forms.items()},
        "decode_gb": max((gigabytes[name] for name in decode), default=0.0),
    }


def _short(rates: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return rates to four digits."""
    return {p: {form: float(f"{s:.4g}") for form, s in r.items()} for p, r in rates.items()}


def _about(results: Mapping[str, Any]) -> list[str]:
    about = results["about"]
    said = (
        "A rehearsal on a CPU, at a tiny size: no number means anything. "
        if about["rehearsal"]
        else ""
    )
    first = (
        f"{said}One {about['device']}, torch {about['torch']}, commit {about['commit']}; kernels: {about['kernels']}. "
        f"`ddim_cifar10` at batch {about['batch']['ddim']}, `ldm_churches` at batch {about['batch']['ldm']}, W4A4; "
        "medians by CUDA events. `make bench-gpu`."
    )
    failed = [f"- {name}: {reason}" for name, reason in results["failed"].items()]
    if "left_out" in about:
        first += f" {about['left_out'].capitalize()}."
    return [first, "", *(["Not measured:", "", *failed, ""] if failed else [])]


def _median(results: Mapping[str, Any], name: str) -> float | None:
    found = results["milliseconds"].get(name)
    return None if found is None else float(found["median"])


def _bars(results: Mapping[str, Any]) -> list[str]:
    lines = ["| ratio | measured | aim |", "|---|---:|---:|"]
    for title, above, below, aim in AIMS:
        for precision in PRECISIONS:
            for graph in ("", ", graph") if "{g}" in above else ("",):
                a, b = (
                    _median(results, name.format(p=precision, g=graph)) for name in (above, below)
                )
                if a is not None and b is not None:
                    wanted = "" if aim is None else f"<= {aim}"
                    lines.append(f"| {title.format(p=precision)}{graph} | {a / b:.3f} | {wanted} |")
    for name, gigabytes in results["gigabytes"].items():
        if name.startswith("train ldm"):
            lines.append(
                f"| {name}: peak memory, GB | {gigabytes:.1f} | {'<= 24' if 'LSQ' in name else ''} |"
            )
    for form, below, aim in (("LSQ", "float", 1.25), ("LSQ+TDQ", "LSQ", 1.05)):
        for precision in PRECISIONS:
            a, b = (_median(results, f"fit's loop {name} {precision}") for name in (form, below))
            if a is not None and b is not None:
                line = f"fit's loop as it runs, {form} / {below}, {precision}"
                lines.append(f"| {line} | {a / b:.3f} | <= {aim} |")
    for name, share in results["busy"].items():
        lines.append(f"| GPU busy, {name} | {100 * share:.1f} % | >= 95 % |")
    return [*lines, ""]


def _loop(results: Mapping[str, Any]) -> list[str]:
    """What an update of a fit's loop spends where, in milliseconds; older results have none."""
    found = results.get("loop", {})
    if not found:
        return []
    lines = [f"| milliseconds | {' | '.join(found)} |", f"|---|{'---:|' * len(found)}"]
    for key in next(iter(found.values())):
        cells = [values[key] for values in found.values()]
        shown = [("yes" if v else "no") if isinstance(v, bool) else f"{v:.2f}" for v in cells]
        lines.append(f"| {key} | {' | '.join(shown)} |")
    return [*lines, ""]


def _times(results: Mapping[str, Any]) -> list[str]:
    memory = results["gigabytes"]
    lines = ["| step | median, ms | min | max | memory reserved, GB |", "|---|---:|---:|---:|---:|"]
    for name, v in results["milliseconds"].items():
        reserved = f"{memory[name]:.1f}" if name in memory else ""
        lines.append(
            f"| {name} | {v['median']:.3f} | {v['min']:.3f} | {v['max']:.3f} | {reserved} |"
        )
    lines += ["", "| rate | |", "|---|---:|"]
    return [*lines, *(f"| {name} | {rate} |" for name, rate in results["rates"].items()), ""]


def _profiles(results: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, entries in results["profile"].items():
        lines += [
            f"Largest entries of {name}, a step:",
            "",
            "| entry | calls | ms |",
            "|---|---:|---:|",
        ]
        lines += [f"| `{key}` | {calls} | {ms} |" for key, calls, ms in entries] + [""]
    return lines


def _hours(results: Mapping[str, Any]) -> list[str]:
    """Return the GPU hours of each table and column, for every precision of training."""
    lines = [
        "GPU hours on this card, one seed, from the rates above (fits and images; features not"
        " counted). The precision is that of training; images are sampled, and networks reconstructed"
        " without training, in float32.",
        "",
    ]
    lines += [
        "| table | model | precision of training | fits | images | hours |",
        "|---|---|---|---:|---:|---:|",
    ]
    for table in ("table1", "table2"):
        trains = table == "table1"
        for model in ("ddim", "ldm"):
            for precision in PRECISIONS if trains else PRECISIONS[:1]:
                line = _column(results, table, model, precision)
                if line is not None:
                    lines.append(line)
    return [*lines, ""]


def _column(results: Mapping[str, Any], table: str, model: str, precision: str) -> str | None:
    """Return the line of a column; None if a rate was not measured."""
    from tdq_exp.config.compose import compose
    from tdq_exp.experiment import build
    from tdq_exp.report.cells import cells_of
    from tdq_exp.report.manifest import read_manifest

    trained, sampled = (_rates(results, model, p) for p in (precision, "float32"))
    if trained is None or sampled is None:
        return None
    train, (_, denoise, decode) = trained[0], sampled

    fits = images = 0.0
    net = None
    for cell in cells_of(read_manifest(table), "paper", Path("results")):
        if cell.column != model:
            continue
        job = build.build(compose([*cell.overrides, "model.weights=random"]), source=False)
        options: Any = job.fit.options
        form = "float" if job.recipe is None else "LSQ+TDQ" if "tdq" in job.name else "LSQ"
        images += job.sampling.images * (job.sampling.steps * denoise[form] + decode)
        if job.recipe is None:
            continue  # the float model is given
        if options.kind == "qat":
            fits += options.updates * options.batch_size * train[form]
            continue
        net = net or job.model.build()
        work = job.fit.work(job.model, net, job.sampling.steps)
        fits += 0.0 if work is None else work.forward_passes * denoise["float"]

    hours = (fits / 3600, images / 3600)
    return (
        f"| {table} | {model} | {precision} | {hours[0]:.0f} | {hours[1]:.0f} | {sum(hours):.0f} |"
    )


def _sampled_at_once(results: Mapping[str, Any], model: str) -> int:
    """Return the images of a denoising step that was measured."""
    about = results["about"]
    return 100 if model == "ldm" and not about["rehearsal"] else int(about["batch"][model])


def _rates(
    results: Mapping[str, Any], model: str, precision: str
) -> tuple[dict[str, float], dict[str, float], float] | None:
    """Seconds for an image: of a training step and of a denoising step by form, and to decode it."""
    batch = results["about"]["batch"]
    prefix = "ldm " if model == "ldm" else ""
    sampled = _sampled_at_once(results, model)
    train, denoise = {}, {}
    for form in ("float", "LSQ", "LSQ+TDQ"):
        steps = [_median(results, f"train {prefix}{form} {precision}{g}") for g in ("", ", graph")]
        step = min((s for s in steps if s is not None), default=None)
        denoising = _median(results, f"denoise {model} {form} {precision}, graph")
        if step is None or denoising is None:
            return None
        train[form] = step / 1e3 / batch[model]
        denoise[form] = denoising / 1e3 / sampled
    decode = _median(results, "decode ldm") if model == "ldm" else 0.0
    return train, denoise, (decode or 0.0) / 1e3 / (2 if results["about"]["rehearsal"] else 8)
