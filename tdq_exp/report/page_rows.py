"""Rows on the page of results: the table of all of them, and the command that makes each again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from html import escape
from pathlib import Path
from typing import Any

from tdq_exp.config import assets
from tdq_exp.experiment import row as row_file
from tdq_exp.experiment.options import SamplerOptions
from tdq_exp.experiment.places import environments, machine_of
from tdq_exp.runtime.refusals import Refusals

HEADERS = (
    ("run", False),
    ("sampler", False),
    ("images", True),
    ("seeds: fit, noise", True),
    ("distance", True),
    ("relative L2 to float", True),
    ("fingerprints: fit, sample, measure", False),
    ("commit", False),
    ("machine", False),
    ("seconds: fit, sample", True),
    ("command", False),
)


DDIM = "ddim"
# What a command names where it differs from the default; conventions are the model's.
NAMED = ("eta", "spacing", "truncate")
OPTIONS = {field.name: field for field in dataclasses.fields(SamplerOptions)}
LAST = "last"  # the network that a row is of, if nothing is said
DEFAULTS = {name: OPTIONS[name].default for name in NAMED}


def read_rows(out: Path, refusals: Refusals | None = None) -> list[dict[str, Any]]:
    """Return all rows of a folder of results.

    Args:
        out: the folder.
        refusals: where damaged files are noted, and their rows left out.

    Raises:
        ValueError: for a damaged file, if it is noted nowhere.
    """
    rows = []
    for path in sorted((out / "runs").glob("*/seed*/*/metrics.json")):
        folder = path.parent.relative_to(out)
        with nullcontext() if refusals is None else refusals.of(str(folder)):
            rows += [{**row, "folder": str(folder)} for row in row_file.read_rows(path)]
    return rows


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table of rows, folded; nothing for no rows."""
    if not rows:
        return

    caption = f"All {len(rows)} rows"
    yield f"<details><summary>{caption}: fingerprints, seeds, commits, commands</summary>"
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
    yield '<table class="rows">'
    yield f"<caption>{caption}</caption><thead><tr>"
    for header, number in HEADERS:
        yield f'<th scope="col"{" class=number" if number else ""}>{header}</th>'
    yield "</tr></thead><tbody>"

    for row in rows:
        texts = _texts(row)
        name = f'<a href="{escape(row["folder"])}/metrics.json">{escape(row["name"])}</a>'
        cells = [
            f"<td{' class=number' if number else ''}>{text}</td>"
            for text, (_, number) in zip(texts, HEADERS[1:], strict=True)
        ]
        yield f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>'
    yield "</tbody></table></div></details>"


def _texts(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row's line beside its name, as HTML."""
    prints, seconds = row["fingerprints"], row["seconds"]
    paired, distance = row.get("paired"), row["metrics"].get("fid")
    return [
        escape(row["sample"]),
        escape(str(row["images"])),
        escape(f"{row['seed']}, {row['config']['sampler']['seed']}"),
        "-" if distance is None else f"{distance:.2f}",
        f"{paired['relative_l2']:.4f}" if paired else "-",
        ", ".join(
            f"<code>{escape(str(prints[part]))}</code>" for part in ("fit", "sample", "measure")
        ),
        ", ".join(f"<code>{escape(str(place['commit']))}</code>" for place in environments(row)),
        escape("; ".join(dict.fromkeys(machine_of(place) for place in environments(row)))),
        f"{seconds['fit']:.0f}, {seconds['sample']:.0f}",
        f"<code>{escape(command_of(row))}</code>",
    ]


def command_of(row: Mapping[str, Any]) -> str:
    """Return the command that makes a row again."""
    config = row["config"]
    if config["label"]:
        return "the configuration in its metrics.json: it has a name of its own"

    fit = config.get("fit", {})
    numbers = config["protocol"].get(fit.get("kind"), {})
    if any(fit.get(key, usual) != usual for key, usual in numbers.items()):
        return "the configuration in its metrics.json: its fit has other numbers than its protocol"

    sampler = config["sampler"]
    if sampler.get("label"):
        return "the configuration in its metrics.json: its set has a name of its own"
    usual = {
        **DEFAULTS,
        **config["protocol"]["sampling"],
        **config.get("model", {}).get("sampling", {}),
    }

    parts = [f"python -m tdq_exp.run +experiment={row['name']}"]
    parts += [f"seed={row['seed']}"] if row["seed"] else []
    parts += [f"sampler.seed={sampler['seed']}"] if sampler["seed"] else []
    parts += [
        f"sampler.{key}={sampler[key]}"
        for key in usual
        if sampler.get(key, usual[key]) != usual[key]
    ]
    method = sampler.get("method", {}).get("_target_", DDIM).rpartition(".")[2].lower()
    parts[1:1] = [f"sampler={method}"] if method != DDIM else []
    parts += [f"sampler.engine={sampler['engine']}"] if sampler["engine"] != "fake" else []
    return " ".join([*parts, *_beside(config)])


def _beside(config: Mapping[str, Any]) -> list[str]:
    """Return the overrides of what a row measured and was made of, where they are unusual."""
    fit, measured = config.get("fit", {}), config.get("eval", {})
    of_features = assets.configs() / "eval" / f"{measured.get('label')}.yaml"
    protocol = assets.read_yaml(of_features) if of_features.is_file() else {}

    values = {
        "data.limit": (config.get("data", {}).get("limit"), None),
        "eval.reference_images": (
            measured.get("reference_images"),
            protocol.get("reference_images"),
        ),
        "fit.report": (fit.get("report", LAST), LAST),
        "model.ema": (config.get("model", {}).get("ema", True), True),
    }
    return [
        f"{key}={'null' if value is None else str(value).lower()}"
        for key, (value, usual) in values.items()
        if value != usual
    ]
