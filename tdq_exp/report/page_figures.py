"""Figures on the page of results: those of the paper, grids of images, charts of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tdq_exp.report import charts, drawings, figure_manifest, figure_numbers, page_markdown
from tdq_exp.report.figure_manifest import FigureManifest
from tdq_exp.report.page_markdown import scroll_region
from tdq_exp.report.paired_rank import HEADERS, Group, summary
from tdq_exp.report.text_tables import markdown_lines
from tdq_exp.runtime import files
from tdq_exp.runtime.refusals import Refusals

WIDEST = 1180  # pixels that a chart may ask for: beyond, it would scroll on a desktop as well

CAPTIONS = {
    "activations": "Above: quantiles of a few layers' inputs over t (box 25 to 75 %, whiskers 5 to"
    " 95 %, dots minimum and maximum). Below: the correlation |r| of t with the standard deviation"
    " of every layer's input, and the share of layers beyond 0.5 and 0.7. With t held, all layers"
    " are told the same time step while x_t changes; with x_t held, the other way round.",
    "errors": "Squared error of the activation quantizers, relative to the power of what they"
    " quantize: truncation is that of values beyond the grid, rounding that of all others.",
    "steps": "Each network, of training seed 0, sampled with fewer and fewer steps. The claim"
    " fewer-steps says which differences are larger than the spread.",
    "length": "Left: distance after trainings of different length, from one seed, with two"
    " deviations of half-sampling to either side; each length has a schedule of its own. Right:"
    " loss of held-out images during these trainings.",
    "ranges": "What an activation takes at every t, and what the grid of its quantizer covers,"
    " s (n - z) to s (p - z), which shows the zero point as well. The layers whose range changes"
    " most.",
    "layers": "Left of each pair: noise of every layer's output when its input is quantized, in"
    " decibels (more is better). Right: the error of x_0 when that quantizer alone is on.",
    "grids": "A column is one noise: what differs down a column is the network alone.",
}


def lines(out: Path, scale: str, refusals: Refusals) -> Iterator[str]:
    """Yield every figure that has numbers, and a line for each that has none, or other ones."""
    for name in figure_manifest.names():
        figure = figure_manifest.read_figure(name)
        drawn: list[str] | None = None
        with refusals.of(f"{name} at scale {scale}"):
            drawn = _drawn(figure, out, scale)

        if not drawn:
            state = "not drawn yet" if drawn == [] else "its numbers are not those asked for"
            yield (
                f'<p class="missing" id="{scale}-{name}">{escape(figure.title)}: {state};'
                f" <code>make {name} SCALE={scale}</code></p>"
            )
        yield from drawn or ()


def _drawn(figure: FigureManifest, out: Path, scale: str) -> list[str]:
    """Return a figure; nothing if it has no numbers.

    Raises:
        ValueError: if its numbers are damaged, or of other runs than it asks for.
    """
    file = figure_numbers.numbers_file(figure.name, scale, out)
    record = files.read_json(file)
    if record is None:
        return []

    asked = figure_manifest.cells_of_figure(figure, scale, out)
    figure_numbers.require_asked(file, record, asked)
    return list(_figure(figure, record))


def any_numbers(out: Path, scale: str) -> bool:
    """Return whether a figure of a scale has numbers."""
    return any(
        figure_numbers.numbers_file(name, scale, out).exists() for name in figure_manifest.names()
    )


def links(scale: str) -> list[tuple[str, str]]:
    """Return (identifier, short title) of every figure."""
    titles = {name: figure_manifest.read_figure(name).title for name in figure_manifest.names()}
    return [(f"{scale}-{name}", title.split(",")[0]) for name, title in titles.items()]


def _figure(figure: FigureManifest, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield one figure with its caption."""
    scale = record["scale"]
    yield f'<figure><h4 id="{scale}-{figure.name}">{escape(figure.title)}</h4>'
    if figure.kind == "grids":
        yield from _strips(record)
    else:
        label = f"{figure.title}: {_models(record)}"
        svg = accessible(drawings.svg(figure, record, f"{figure.name}-{scale}"), label)
        yield scroll_region(f"{figure.title}, drawing", svg)

    yield f"<figcaption>{escape(CAPTIONS.get(figure.kind, ''))} {_made(figure, record)}"
    yield from _networks(record)
    yield "</figcaption></figure>"


def accessible(svg: str, label: str) -> str:
    """Return an SVG element with a label, without the identifiers that figures share.

    It grows with the page and shrinks no further than its letters can be read.
    """
    svg = re.sub(r'(<(?:g|image)\b[^>]*?) id="[^"]*"', r"\1", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)

    points = float((re.search(r'<svg[^>]*? width="([\d.]+)pt"', svg) or ["", "500"])[1])
    least, most = min(1.25 * points, WIDEST), 1.5 * points
    style = f"min-width:{least:.0f}px;max-width:{most:.0f}px"
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" style="{style}" ', 1)


def _models(record: Mapping[str, Any]) -> str:
    """Return which networks a figure shows, in words, for those who can't see it."""
    texts = []
    for column in record["columns"].values():
        shown = column.get("runs") or column.get("lines") or {"float network": None}
        missing = f"; missing: {'; '.join(column['missing'])}" if column["missing"] else ""
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

    missing = [
        f"{column['model']} {escape(label)}"
        for column in record["columns"].values()
        for label in column["missing"]
    ]
    if missing:
        texts.append(f"Missing: {'; '.join(missing)}.")

    name, scale = figure.name, record["scale"]
    texts.append(f'Numbers: <a href="numbers/{name}-{scale}.json">{name}-{scale}.json</a>.')
    texts.append(f"Again: <code>make {name} SCALE={scale}</code>")
    return " ".join(texts)


def _networks(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the networks that a figure was measured on, folded."""
    runs = [
        f"<li>{escape(column['model'])}, {escape(label)}: <code>{run['run']}</code>, fit"
        f" <code>{run['fit']}</code></li>"
        for column in record["columns"].values()
        for label, run in (column.get("runs") or {}).items()
    ]
    if runs:
        yield f"<details><summary>Networks</summary><ul>{''.join(runs)}</ul></details>"


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


# --- Charts of tables and rows


def table_chart(out: Path, stem: str, title: str) -> Iterator[str]:
    """Yield the chart that was drawn beside a table, if there is one.

    Args:
        out: folder of results.
        stem: `table2-small`.
        title: of the table.
    """
    file = out / "figures" / f"{stem}.svg"
    if not file.exists():
        return

    text = file.read_text()
    svg = text[text.index("<svg") : text.rindex("</svg>") + len("</svg>")]
    svg = svg.replace("fill: #ffffff", "fill: none").replace("#000000", "currentColor")
    label = f"{title}: the distances of the table over the bits of activations"
    yield "<figure>" + scroll_region(label, accessible(svg, label)) + "</figure>"


def paired_lines(groups: Sequence[Group], scale: str) -> Iterator[str]:
    """Yield how well the paired distance ranks runs: a table and a chart of all rows."""
    if not groups:
        return

    yield f'<figure><h4 id="{scale}-paired">Paired distance beside the Frechet distance</h4>'
    table = markdown_lines(HEADERS, summary(groups))
    yield from page_markdown.table_lines(table, "Rank correlations of the two distances")

    with_rank = [group for group in groups if group.by_l2 is not None]
    if with_rank:
        title = "Frechet distance of every row over its distance to the float model's images"
        svg = charts.paired_svg(with_rank, f"paired-{scale}")
        yield scroll_region(f"{title}, drawing", accessible(svg, title))
    yield (
        "<figcaption>Spearman's rank correlation. The paired distance is that of a run's first"
        " images to those of the float model from the same noise; it takes seconds. 1: both rank"
        ' the runs alike. Every row: <a href="analysis/paired_rank.md">paired_rank.md</a>. Again:'
        " <code>python scripts/analysis/paired_rank.py</code></figcaption></figure>"
    )


# --- Training


def training_lines(out: Path, scale: str, refusals: Refusals) -> Iterator[str]:
    """Yield a picture of the validation losses of each model's trained runs."""
    for model, curves in sorted(training_curves(out, scale, refusals).items()):
        title = f"{model}: validation loss over updates"
        drawn = {run: curves[run] for run in charts.headline(curves)}
        last = ", ".join(f"{run} {curve[-1][1]:.4f}" for run, curve in drawn.items())
        svg = charts.training_svg(drawn, f"training-{model}")
        others = len(curves) - len(drawn)
        left_out = f" The methods of Table 1; {others} other runs are not drawn." if others else ""
        yield f"<figure><h4>{escape(title)}</h4>"
        yield scroll_region(f"{title}, drawing", accessible(svg, f"{title}. Last losses: {last}"))
        yield (
            "<figcaption>Loss of the noise prediction on held-out images, of the averaged"
            f" weights: a panel for each pair of bits (W, A).{left_out} Numbers:"
            " <code>facts.validation</code> of <code>runs/NAME/seed0/fit.json</code>.</figcaption>"
            "</figure>"
        )


def training_curves(
    out: Path, scale: str, refusals: Refusals
) -> dict[str, dict[str, list[list[float]]]]:
    """Return model -> run -> [[update, loss], ...] of all runs that were trained.

    Records that are damaged are left out, and noted.
    """
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for path in sorted((out / "runs").glob("*/seed*/fit.json")):
        record: Mapping[str, Any] = {}
        with refusals.of(str(path.parent.relative_to(out))):
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
