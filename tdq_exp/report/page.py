"""`results/report.html`: everything that was measured, as one page that needs nothing else.

The page is made of files of the results folder: pages of tables and claims, numbers of figures,
records of runs. No network, no model and no date enters it, so the same files give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tdq_exp.report import page_figures, page_markdown, page_rows, paired_rank
from tdq_exp.report.page_style import STYLE
from tdq_exp.report.text_tables import markdown_lines
from tdq_exp.runtime.refusals import Refusals

SCALES = {
    "paper": "CIFAR-10 32x32 and LSUN-Churches 256x256",
    "small": "CIFAR-10 at 16x16, and through latents of 4x8x8",
    "digits": "8x8 digits",
}

PARTS = {
    "claims": "The paper's claims",
    "tables": "Tables",
    "figures": "Figures",
    "training": "Training",
    "numbers": "How each number was made",
}

COUNTED = re.compile(r"Of (\d+) cells (\d+) missing")


def html(out: Path, scales: Sequence[str], refusals: Refusals) -> str:
    """Return the page.

    Args:
        out: folder of results.
        scales: what it is about, in their order; those without any content are left out.
        refusals: where rows and figures are noted that it can't show. It says so in their places.

    Raises:
        ValueError: if there is nothing to show.
    """
    rows = page_rows.read_rows(out, refusals)
    sections = {scale: list(_section(out, scale, rows, refusals)) for scale in scales}
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
            '<body id="top">',
            '<a class="skip" href="#main">Skip to the results</a>',
            *_head(list(filled)),
            '<main id="main">',
            *_glance(out, list(filled)),
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

    yield '<nav aria-label="Contents">'
    for scale in scales:
        links = (f'<a href="#{scale}-{part}">{part}</a>' for part in PARTS)
        yield f"<ul><li><strong>{scale}</strong></li>"
        yield from (f"<li>{link}</li>" for link in links)
        yield "</ul>"
    yield "</nav></header>"


# --- All scales at a glance


def _glance(out: Path, scales: Sequence[str]) -> Iterator[str]:
    """Yield the verdicts of all scales side by side, and how many cells have rows."""
    verdicts = {scale: _verdicts(out, scale) for scale in scales}
    claims = dict.fromkeys(claim for of_scale in verdicts.values() for claim in of_scale)
    counts = {scale: _cells(out, scale) for scale in scales}
    if not claims and not any(total for _, total in counts.values()):
        return

    yield '<section aria-labelledby="glance"><h2 id="glance">At a glance</h2>'
    if claims:
        rows = [[claim, *(verdicts[scale].get(claim, "-") for scale in scales)] for claim in claims]
        table = markdown_lines(["claim of the paper", *scales], rows, left=len(scales) + 1)
        yield from page_markdown.table_lines(table, "Verdicts on the paper's claims")
    for scale, (done, total) in counts.items():
        if total:
            yield f"<p>Scale {scale}: {done} of {total} cells of its tables have a row.</p>"
    yield "</section>"


def _verdicts(out: Path, scale: str) -> dict[str, str]:
    """Return claim -> verdict, from the page of claims."""
    file = out / "tables" / f"claims-{scale}.md"
    if not file.exists():
        return {}

    tables = (b for b in page_markdown.blocks(file.read_text()) if b[0].startswith("|"))
    headers, _, *lines = (page_markdown.cells_of(line) for line in next(tables, ["||", "||"]))
    if "verdict" not in headers:
        return {}
    verdict = headers.index("verdict")
    text = headers.index("what it says") if "what it says" in headers else 0
    return {line[text]: line[verdict] for line in lines}


def _cells(out: Path, scale: str) -> tuple[int, int]:
    """Return how many cells of a scale's tables have a row, and how many there are."""
    pages = (path.read_text() for path in (out / "tables").glob(f"table*-{scale}.md"))
    counted = [COUNTED.search(page) for page in pages]
    numbers = [(int(found[1]), int(found[2])) for found in counted if found]
    total = sum(cells for cells, _ in numbers)
    return total - sum(missing for _, missing in numbers), total


# --- One scale


def _section(
    out: Path, scale: str, rows: Sequence[Mapping[str, Any]], refusals: Refusals
) -> Iterator[str]:
    """Yield what there is of one scale; nothing if there is nothing."""
    of_scale = [row for row in rows if row["config"]["protocol"]["scale"] == scale]
    figures = page_figures.any_numbers(out, scale)
    groups = paired_rank.groups_of(of_scale)

    parts = {
        "claims": list(_claims(out, scale)),
        "tables": list(_tables(out, scale)),
        "figures": [
            *(page_figures.lines(out, scale, refusals) if figures else ()),
            *page_figures.paired_lines(groups, scale),
        ],
        "training": list(page_figures.training_lines(out, scale, refusals)),
        "numbers": list(page_rows.lines(of_scale)),
    }
    if not any(parts.values()):
        return

    yield f'<section aria-labelledby="{scale}">'
    yield f'<h2 id="{scale}">Scale {scale}: {SCALES[scale]}</h2>'
    yield from _links(scale, parts, page_figures.links(scale) if figures else [])
    for part, lines in parts.items():
        yield f'<h3 id="{scale}-{part}">{PARTS[part]}</h3>'
        yield from lines or ["<p>Nothing yet.</p>"]
        yield '<p class="up"><a href="#top">Contents</a></p>'
    yield "</section>"


def _links(
    scale: str, parts: Mapping[str, Sequence[str]], figures: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """Yield links to the tables and figures of a scale."""
    tables = re.findall(rf'id="({scale}-table(\d+))"', "".join(parts["tables"]))
    links = [*((name, f"Table {number}") for name, number in tables), *figures]
    if links:
        yield f'<nav aria-label="Tables and figures of scale {scale}"><ul>'
        yield from (f'<li><a href="#{name}">{title}</a></li>' for name, title in links)
        yield "</ul></nav>"


def _claims(out: Path, scale: str) -> Iterator[str]:
    """Yield the verdicts, then every claim's comparisons, folded."""
    file = out / "tables" / f"claims-{scale}.md"
    if file.exists():
        summary, *details = re.split(r"^(?=## )", file.read_text(), flags=re.MULTILINE)
        yield from page_markdown.html_lines(summary.partition("\n")[2], "The paper's claims")
        for text in details:
            title, _, body = text.removeprefix("## ").partition("\n")
            yield f"<details><summary>{page_markdown.inline(title)}</summary>"
            yield from page_markdown.html_lines(body, title)
            yield "</details>"
        yield f"<p>Again: <code>make claims SCALE={scale}</code></p>"


def _tables(out: Path, scale: str) -> Iterator[str]:
    """Yield the tables, each with its chart, what its signs say, and its protocol, folded."""
    found = (out / "tables").glob(f"table*-{scale}.md")
    for path in sorted(found, key=lambda path: (len(path.name), path.name)):
        name = path.stem.removesuffix(f"-{scale}")
        title, _, body = path.read_text().removeprefix("# ").partition("\n")
        yield f'<h4 id="{scale}-{name}">{page_markdown.inline(title)}</h4>'
        yield from page_markdown.html_lines(body, title)
        yield from page_figures.table_chart(out, path.stem, title)
        yield f"<p>Again: <code>make {name} SCALE={scale}</code></p>"
