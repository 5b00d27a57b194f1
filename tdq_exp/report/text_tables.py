"""Tables of texts as Markdown and LaTeX. The same table gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tdq_exp.runtime import files

STALE, SHORT, TIE, EITHER_SIDE = "†", "‡", "≈", "±"

LATEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    STALE: r"\textsuperscript{\dag}",
    SHORT: r"\textsuperscript{\ddag}",
    TIE: r"\ensuremath{\approx}",
    EITHER_SIDE: r"\ensuremath{\pm}",
}


@dataclass(frozen=True)
class TextTable:
    """A table as text, before it is Markdown or LaTeX.

    Args:
        title: above it.
        headers: of each column, the name and what it says in brackets.
        groups: lines that belong together; each line has a text per column.
        notes: the footer, a sentence or two each.
    """

    title: str
    headers: list[tuple[str, str]]
    groups: list[list[list[str]]]
    notes: list[str]

    @property
    def lines(self) -> list[list[str]]:
        """The lines of all groups."""
        return [line for group in self.groups for line in group]


def markdown_lines(
    headers: Sequence[str], rows: Iterable[Iterable[str]], left: int = 1
) -> list[str]:
    """Return headers and rows as the lines of a Markdown table.

    Args:
        headers: of the columns.
        rows: a text per column.
        left: how many columns are texts; the others are numbers.
    """
    rule = "|---" * left + "|" + "---:|" * (len(headers) - left)
    return [_markdown_line(headers), rule, *map(_markdown_line, rows)]


def markdown(table: TextTable) -> str:
    """Return the table as Markdown, ready for a file."""
    headers = [f"{name} ({detail})" if detail else name for name, detail in table.headers]
    body = markdown_lines(headers, table.lines, left=2)
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([f"# {table.title}", "", *body, "", *notes]) + "\n"


def latex(table: TextTable) -> str:
    """Return the table as a booktabs tabular with its footer below."""
    lines = [
        f"% {table.title}; needs \\usepackage{{booktabs}}",
        rf"\begin{{tabular}}{{ll{'r' * (len(table.headers) - 2)}}}",
        r"\toprule",
        _latex_line(name for name, _ in table.headers),
        _latex_line(f"({detail})" if detail else "" for _, detail in table.headers),
    ]

    for group in table.groups:
        lines += [r"\midrule", *(_latex_line(texts) for texts in group)]

    lines += [r"\bottomrule", r"\end{tabular}", r"\par\smallskip{\footnotesize\raggedright"]
    lines += [rf"{escaped(note)}\par" for note in table.notes]
    return "\n".join([*lines, "}"]) + "\n"


def escaped(text: str) -> str:
    """Return plain text as LaTeX."""
    return "".join(LATEX.get(character, character) for character in text)


def write(table: TextTable, stem: Path) -> list[Path]:
    """Write `<stem>.md` and `<stem>.tex`, each whole or not at all, and return their paths."""
    paths = []
    for suffix, text in ((".md", markdown(table)), (".tex", latex(table))):
        path = stem.with_name(stem.name + suffix)
        files.write_text(path, text)
        paths.append(path)
    return paths


def _markdown_line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |"


def _latex_line(texts: Iterable[str]) -> str:
    return " & ".join(escaped(text) for text in texts) + r" \\"
