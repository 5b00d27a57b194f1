"""`results/report.html`: everything that was measured, as one page that needs nothing else.

The page is made of files of the results folder: pages of tables and claims, numbers of figures,
records of runs. No network, no model and no date enters it, so the same files give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tdq_exp.report import charts, drawings, figure_manifest, figure_numbers, page_markdown
from tdq_exp.report.figure_manifest import FigureManifest
from tdq_exp.report.page_style import STYLE
from tdq_exp.runtime import files

SCALES = {
    "paper": "CIFAR-10 32x32 and LSUN-Churches 256x256",
    "small": "CIFAR-10 at 16x16, and through latents of 4x8x8",
    "digits": "8x8 digits",
}

CAPTIONS = {
    "activations": "Above: quantiles of a few layers' inputs over t (box 25 to 75 %, whiskers 5 to"
    " 95 %, dots minimum and maximum). Below: the correlation |r| of t with the standard deviation"
    " of every layer's input, and the share of layers beyond 0.5 and 0.7. With t held, all layers"
    " are told the same time step while x_t changes; with x_t held, the other way round.",
    "errors": "Squared error of the activation quantizers, relative to the power of what they"
    " quantize: truncation is that of values beyond the grid, rounding that of all others.",
    "steps": "Each network sampled with fewer and fewer steps.",
    "ranges": "What an activation takes at every t, and what the grid of its quantizer covers,"
    " s (n - z) to s (p - z), which shows the zero point as well. The layers whose range changes"
    " most.",
    "layers": "Left of each pair: noise of every layer's output when its input is quantized, in"
    " decibels (more is better). Right: the error of x_0 when that quantizer alone is on.",
}


def html(out: Path, scales: Sequence[str]) -> str:
    """Return the page.

    Args:
        out: folder of results.
        scales: what it is about, in their order; those without any content are left out.

    Raises:
        ValueError: if there is nothing to show.
    """
    rows = read_rows(out)
    sections = {scale: list(_section(out, scale, rows)) for scale in scales}
    filled = {scale: lines for scale, lines in sections.items() if lines}
    if not filled:
        raise ValueError(f"{out}: holds no tables, figures or rows of {', '.join(scales)}")

    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<title>tdq_exp: results</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            '<a class="skip" href="#main">Skip to the results</a>',
            *_head(list(filled)),
            '<main id="main">',
            *(line for lines in filled.values() for line in lines),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _head(scales: Sequence[str]) -> Iterator[str]:
    yield "<header><h1>tdq_exp: results</h1>"
    yield (
        "<p>Temporal Dynamic Quantization for diffusion models (So et al., NeurIPS 2023, arXiv"
        " 2306.02316), reproduced at scales that a laptop can run. A distance is a Fr&eacute;chet"
        " distance of the features that its column names: it is not FID, and compares within one"
        " table only. Smaller is better. Cells that were not run say so.</p>"
    )
    yield "<p>Made by <code>make report</code> from the files of this folder.</p>"

    yield '<nav aria-label="Contents"><ul>'
    for scale in scales:
        for part in ("claims", "tables", "figures", "training", "numbers"):
            yield f'<li><a href="#{scale}-{part}">{scale}: {part}</a></li>'
    yield "</ul></nav></header>"


def _section(out: Path, scale: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what there is of one scale; nothing if there is nothing."""
    of_scale = [row for row in rows if row["config"]["protocol"]["scale"] == scale]
    parts = {
        "claims": list(_pages(out, f"claims*-{scale}.md")),
        "tables": list(_pages(out, f"table*-{scale}.md")),
        "figures": list(_figures(out, scale)),
        "training": list(_training(out, scale)),
        "numbers": list(_numbers(out, of_scale)),
    }
    if not any(parts.values()):
        return

    titles = {
        "claims": "The paper's claims",
        "tables": "Tables",
        "figures": "Figures",
        "training": "Training",
        "numbers": "How each number was made",
    }
    yield f'<section aria-labelledby="{scale}">'
    yield f'<h2 id="{scale}">Scale {scale}: {SCALES[scale]}</h2>'
    for part, lines in parts.items():
        yield f'<h3 id="{scale}-{part}">{titles[part]}</h3>'
        yield from lines or ["<p>Nothing yet.</p>"]
    yield "</section>"


# --- Tables and claims


def _pages(out: Path, pattern: str) -> Iterator[str]:
    """Yield pages that other commands wrote into the folder of tables."""
    for path in sorted((out / "tables").glob(pattern)):
        yield from page_markdown.html_lines(path.read_text(), level=4)

        table = path.stem.split("-")[0]
        if table.startswith("table"):
            scale = path.stem.split("-", 1)[1]
            yield f"<p>Again: <code>make {table} SCALE={scale}</code></p>"


# --- Figures


def _figures(out: Path, scale: str) -> Iterator[str]:
    """Yield every figure that has numbers."""
    for name in figure_manifest.names():
        file = figure_numbers.numbers_file(name, scale, out)
        record = files.read_json(file)
        if record is None:
            continue

        figure = figure_manifest.read_figure(name)
        asked = figure_manifest.cells_of_figure(figure, scale, out)
        figure_numbers.require_asked(file, record, asked)
        yield from _figure(figure, record)


def _figure(figure: FigureManifest, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield one figure with its caption."""
    scale = record["scale"]
    yield f"<figure><h4>{escape(figure.title)}</h4>"
    if figure.kind == "grids":
        yield from _strips(record)
    else:
        label = f"{figure.title}: {_models(record)}"
        narrow = " narrow" if figure.kind in ("errors", "steps") else ""
        yield (
            f'<div class="scroll{narrow}" tabindex="0" role="region"'
            f' aria-label="{escape(figure.title)}, drawing">'
        )
        yield accessible(drawings.svg(figure, record, f"{figure.name}-{scale}"), label)
        yield "</div>"

    yield f"<figcaption>{escape(CAPTIONS.get(figure.kind, ''))} {_made(figure, record)}"
    yield "</figcaption></figure>"


def accessible(svg: str, label: str) -> str:
    """Return an SVG element with a label, and without the identifiers that figures share."""
    svg = re.sub(r'(<(?:g|image)\b[^>]*?) id="[^"]*"', r"\1", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _models(record: Mapping[str, Any]) -> str:
    """Return which networks a figure shows, in words, for those who can't see it."""
    texts = []
    for column in record["columns"].values():
        shown = column.get("runs") or column.get("lines") or {"float network": None}
        missing = f"; missing: {', '.join(column['missing'])}" if column["missing"] else ""
        texts.append(f"{column['model']}: {', '.join(shown)}{missing}")
    return ". ".join(texts)


def _made(figure: FigureManifest, record: Mapping[str, Any]) -> str:
    """Return how a figure's numbers were made, as HTML."""
    texts = []
    about = record.get("about")
    if about:
        texts.append(
            f"{about['images']} images, {about['steps'] or 'the sampler&#39;s'} steps, seed"
            f" {about['seed']}, commit {about['commit']}, {escape(about['machine'])}."
        )

    runs = [
        f"{escape(label)} ({run['run']}, fit {run['fit']})"
        for column in record["columns"].values()
        for label, run in (column.get("runs") or {}).items()
    ]
    if runs:
        texts.append(f"Networks: {'; '.join(runs)}.")

    missing = [
        f"{column['model']} {escape(label)}"
        for column in record["columns"].values()
        for label in column["missing"]
    ]
    if missing:
        texts.append(f"Missing: {'; '.join(missing)}.")

    name, scale = figure.name, record["scale"]
    texts.append(f'Numbers: <a href="figures/{name}-{scale}.json">{name}-{scale}.json</a>.')
    texts.append(f"Again: <code>make {name} SCALE={scale}</code>")
    return " ".join(texts)


def _strips(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield images of several networks from the same noise, below each other."""
    yield (
        '<div class="scroll" tabindex="0" role="region" aria-label="Images from the same noise,'
        ' a line for each network">'
    )
    for column in record["columns"].values():
        for label, run in column["runs"].items():
            title = f"{column['model']}: {label}"
            yield (
                f'<div class="strip"><span>{escape(title)}</span>'
                f'<img alt="{escape(title)}: images of the same noise as the other lines"'
                f' src="data:image/png;base64,{run["png"]}"></div>'
            )
        for label in column["missing"]:
            title = f"{column['model']}: {label}: missing"
            yield f'<div class="strip"><span>{escape(title)}</span></div>'
    yield "</div>"


# --- Training


def _training(out: Path, scale: str) -> Iterator[str]:
    """Yield a picture of the validation losses of each model's trained runs."""
    for model, curves in sorted(training_curves(out, scale).items()):
        title = f"{model}: validation loss over updates"
        svg = charts.training_svg(curves, title, f"training-{model}")
        yield f"<figure><h4>{escape(title)}</h4>"
        yield (
            '<div class="scroll" tabindex="0" role="region"'
            f' aria-label="{escape(title)}, drawing">{accessible(svg, title)}</div>'
        )
        yield (
            "<figcaption>Loss of the noise prediction on held-out images, of the averaged"
            " weights: a panel for each pair of bits (W, A).</figcaption></figure>"
        )


def training_curves(out: Path, scale: str) -> dict[str, dict[str, list[list[float]]]]:
    """Return model -> run -> [[update, loss], ...] of all runs that were trained."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for path in sorted((out / "runs").glob("*/seed*/fit.json")):
        record = files.read_json(path) or {}
        config = record.get("config", {})
        validation = record.get("facts", {}).get("validation")
        if not validation or config["protocol"]["scale"] != scale:
            continue

        model, name = config["model"]["label"], record["name"]
        seed = path.parent.name.removeprefix("seed")
        name += "" if seed == "0" else f" seed {seed}"
        curves.setdefault(model, {})[name] = validation
    return curves


# --- Numbers


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Return all rows of a folder of results."""
    rows = []
    for path in sorted((out / "runs").glob("*/seed*/*/metrics.json")):
        content = files.read_json(path) or {"rows": []}
        folder = path.parent.relative_to(out)
        rows += [{**row, "folder": str(folder)} for row in content["rows"]]
    return rows


HEADERS = (
    ("run", False),
    ("sampler", False),
    ("images", True),
    ("seeds: fit, noise", True),
    ("distance", True),
    ("fingerprints: fit, sample, measure", False),
    ("commit", False),
    ("machine", False),
    ("seconds: fit, sample", True),
    ("command", False),
)


def _numbers(out: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table of all rows, folded."""
    if not rows:
        return

    caption = f"All {len(rows)} rows"
    yield f"<details><summary>{caption}: fingerprints, seeds, commits, commands</summary>"
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
    yield f"<caption>{caption}</caption><thead><tr>"
    for header, number in HEADERS:
        yield f'<th scope="col"{" class=number" if number else ""}>{header}</th>'
    yield "</tr></thead><tbody>"

    for row in rows:
        texts = _row_texts(row)
        name = f'<a href="{escape(row["folder"])}/metrics.json">{escape(row["name"])}</a>'
        cells = [
            f"<td{' class=number' if number else ''}>{text}</td>"
            for text, (_, number) in zip(texts, HEADERS[1:], strict=True)
        ]
        yield f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>'
    yield "</tbody></table></div></details>"


def _row_texts(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row's line beside its name, as HTML."""
    prints, seconds = row["fingerprints"], row["seconds"]
    return [
        escape(row["sample"]),
        str(row["images"]),
        f"{row['seed']}, {row['config']['sampler']['seed']}",
        f"{row['metrics']['fid']:.2f}",
        ", ".join(f"<code>{prints[part]}</code>" for part in ("fit", "sample", "measure")),
        f"<code>{row['environment']['commit']}</code>",
        escape(row["environment"]["machine"]),
        f"{seconds['fit']:.0f}, {seconds['sample']:.0f}",
        f"<code>{escape(command_of(row))}</code>",
    ]


def command_of(row: Mapping[str, Any]) -> str:
    """Return the command that makes a row again."""
    config = row["config"]
    if config["label"]:
        return "the configuration in its metrics.json: it has a name of its own"

    sampler, usual = config["sampler"], config["protocol"]["sampling"]

    parts = [f"python -m tdq_exp.run +experiment={row['name']}"]
    parts += [f"seed={row['seed']}"] if row["seed"] else []
    parts += [f"sampler.seed={sampler['seed']}"] if sampler["seed"] else []
    parts += [
        f"sampler.{key}={sampler[key]}"
        for key in ("images", "steps", "batch")
        if sampler[key] != usual[key]
    ]
    parts += [f"sampler.engine={sampler['engine']}"] if sampler["engine"] != "fake" else []
    return " ".join(parts)
