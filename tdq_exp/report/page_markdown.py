"""Our own Markdown pages as HTML: headings, tables, lists and paragraphs, nothing else.

Only what `render` and the pages of measurements write is understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

CELL = re.compile(r"(?<!\\)\|")
MISSING = ("missing", "-", "")
VERDICTS = {"holds": "holds", "does not hold": "fails"}


def html_lines(markdown: str, level: int) -> Iterator[str]:
    """Yield the lines of a page.

    Args:
        markdown: the page. A table is captioned by the heading above it.
        level: of the heading that `#` becomes: 3 is `<h3>`.
    """
    title = ""
    for block in blocks(markdown):
        first = block[0]
        if first.startswith("#"):
            marks, _, title = first.partition(" ")
            depth = min(level + len(marks) - 1, 6)
            yield f"<h{depth}>{inline(title)}</h{depth}>"
        elif first.startswith("|"):
            yield from table_lines(block, title)
        elif first.startswith("- "):
            yield '<ul class="notes">'
            yield from (f"<li>{inline(line.removeprefix('- '))}</li>" for line in block)
            yield "</ul>"
        else:
            yield f"<p>{inline(' '.join(block))}</p>"


def blocks(markdown: str) -> Iterator[list[str]]:
    """Yield lines that belong together: a heading, a table, a list or a paragraph."""
    for part in re.split(r"\n\s*\n", markdown.strip()):
        lines = part.split("\n")
        while lines and lines[0].startswith("#"):
            yield [lines.pop(0)]
        if lines:
            yield lines


def table_lines(lines: Sequence[str], caption: str) -> Iterator[str]:
    """Yield an HTML table of a Markdown table.

    Args:
        lines: headers, rule, rows.
        caption: above it.
    """
    headers, rule, *rows = (cells_of(line) for line in lines)
    numbers = [cell.endswith(":") for cell in rule]

    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
    yield f"<caption>{inline(caption)}</caption>"
    yield "<thead><tr>"
    yield from (
        f'<th scope="col"{_class(number)}>{inline(header)}</th>'
        for header, number in zip(headers, numbers, strict=True)
    )
    yield "</tr></thead>"

    yield "<tbody>"
    for row in rows:
        first, *rest = row
        cells = [_cell(cell, number) for cell, number in zip(rest, numbers[1:], strict=True)]
        yield f'<tr><th scope="row">{inline(first)}</th>{"".join(cells)}</tr>'
    yield "</tbody></table></div>"


def cells_of(line: str) -> list[str]:
    """Return the texts of a line of a Markdown table."""
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace(r"\|", "|") for cell in CELL.split(inner)]


def inline(text: str) -> str:
    """Return a text as HTML, with `code`, **bold** and [links](target)."""
    text = escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', text)


def _cell(text: str, number: bool) -> str:
    classes = ["number"] if number else []
    classes += ["missing"] if text in MISSING else []
    classes += [VERDICTS[text]] if text in VERDICTS else []
    attribute = f' class="{" ".join(classes)}"' if classes else ""
    return f"<td{attribute}>{inline(text)}</td>"


def _class(number: bool) -> str:
    return ' class="number"' if number else ""
