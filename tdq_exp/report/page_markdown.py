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
SIGNS = re.compile("[≈†‡]")
LONG = 40  # letters beyond which a cell is wide enough for a few words


def html_lines(markdown: str, caption: str) -> Iterator[str]:
    """Yield the lines of a page below its heading: tables, lists and paragraphs.

    Args:
        markdown: the page.
        caption: of its tables.
    """
    for block in blocks(markdown):
        if block[0].startswith("|"):
            yield from table_lines(block, caption)
        elif block[0].startswith("- "):
            yield from note_lines([line.removeprefix("- ") for line in block])
        else:
            yield f"<p>{inline(' '.join(block))}</p>"


def note_lines(notes: Sequence[str]) -> Iterator[str]:
    """Yield the notes of a table: those that explain it, then its protocol, folded.

    The first one is the caption; those with a sign say what the sign means.
    """
    shown = [note for number, note in enumerate(notes) if not number or SIGNS.search(note)]
    folded = [note for note in notes if note not in shown]

    yield from _list(shown)
    if folded:
        yield "<details><summary>How these numbers were made</summary>"
        yield from _list(folded)
        yield "</details>"


def _list(notes: Sequence[str]) -> Iterator[str]:
    yield '<ul class="notes">'
    yield from (f"<li>{inline(note)}</li>" for note in notes)
    yield "</ul>"


def blocks(markdown: str) -> Iterator[list[str]]:
    """Yield lines that belong together: a heading, a table, a list or a paragraph."""
    for part in re.split(r"\n\s*\n", markdown.strip()):
        lines = part.split("\n")
        while lines and lines[0].startswith("#"):
            yield [lines.pop(0)]
        if any(lines):
            yield lines


def table_lines(lines: Sequence[str], caption: str) -> Iterator[str]:
    """Yield an HTML table of a Markdown table.

    Lines of equal bits are set apart from those of others.

    Args:
        lines: headers, rule, rows.
        caption: for those who don't see what stands above it.
    """
    headers, rule, *rows = (cells_of(line) for line in lines)
    numbers = [cell.endswith(":") for cell in rule]
    group = next((i for i, header in enumerate(headers) if header.startswith("bits")), None)

    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
    yield f"<caption>{inline(caption)}</caption>"
    yield "<thead><tr>"
    yield from (
        f'<th scope="col"{_class(["number"] * number)}>{inline(header)}</th>'
        for header, number in zip(headers, numbers, strict=True)
    )
    yield "</tr></thead>"

    yield "<tbody>"
    before = None
    for row in rows:
        first, *rest = row
        cells = [_cell(cell, number) for cell, number in zip(rest, numbers[1:], strict=True)]
        of_group = None if group is None else row[group]
        new = _class(["group"] * (before not in (None, of_group)))
        before = of_group

        head = _class(["long"] * (len(first) > LONG))
        yield f'<tr{new}><th scope="row"{head}>{inline(first)}</th>{"".join(cells)}</tr>'
    yield "</tbody></table></div>"


def scroll_region(label: str, content: str) -> str:
    """Return content that scrolls sideways by itself, by keyboard too."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"{content}</div>"
    )


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
    classes = ["number"] * number
    classes += ["missing"] * (text in MISSING or text.endswith(": missing"))
    classes += [VERDICTS[text]] if text in VERDICTS else []
    classes += ["long"] * (len(text) > LONG)
    return f"<td{_class(classes)}>{inline(text)}</td>"


def _class(names: Sequence[str]) -> str:
    return f' class="{" ".join(names)}"' if names else ""
