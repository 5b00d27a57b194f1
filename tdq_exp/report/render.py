"""Tables as text: Markdown and LaTeX. The same table gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tdq_exp.runtime import files

STALE, SHORT = "†", "‡"


@dataclass(frozen=True)
class Table:
    """A table as text, before it is Markdown or LaTeX.

    Args:
        title: above it.
        headers: of each column, the name and what it says in brackets.
        groups: lines that belong together; each has a text per column.
        notes: the footer, a sentence or two each.
    """

    title: str
    headers: list[tuple[str, str]]
    groups: list[list[list[str]]]
    notes: list[str]


def markdown_lines(headers: Sequence[str], rows: Iterable[Iterable[str]], left: int = 1) -> list[str]:
    """Headers and rows as the lines of a Markdown table; all columns but the first `left` are numbers."""

    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |"

    return [line(headers), "|---" * left + "|" + "---:|" * (len(headers) - left), *map(line, rows)]


def markdown(table: Table) -> str:
    """The table as Markdown, ready for a file."""
    headers = [f"{name} ({detail})" if detail else name for name, detail in table.headers]
    lines = markdown_lines(headers, (texts for group in table.groups for texts in group), left=2)
    return "\n".join([f"# {table.title}", "", *lines, "", *(f"- {note}" for note in table.notes)]) + "\n"


def latex(table: Table) -> str:
    """The table as a booktabs tabular with its footer below."""

    def line(texts: Iterable[str]) -> str:
        return " & ".join(escaped(text) for text in texts) + r" \\"

    lines = [
        f"% {table.title}; needs \\usepackage{{booktabs}}",
        rf"\begin{{tabular}}{{ll{'r' * (len(table.headers) - 2)}}}",
        r"\toprule",
        line(name for name, _ in table.headers),
        line(f"({detail})" if detail else "" for _, detail in table.headers),
    ]
    for group in table.groups:
        lines += [r"\midrule", *(line(texts) for texts in group)]
    lines += [r"\bottomrule", r"\end{tabular}", r"\par\smallskip{\footnotesize\raggedright"]
    return "\n".join([*lines, *(rf"{escaped(note)}\par" for note in table.notes), "}"]) + "\n"


def escaped(text: str) -> str:
    """Plain text as LaTeX."""
    special = {c: rf"\{c}" for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "|": r"\textbar{}", STALE: r"\textsuperscript{\dag}", SHORT: r"\textsuperscript{\ddag}",
    }  # fmt: skip
    return "".join(special.get(character, character) for character in text)


def write(table: Table, stem: Path) -> list[Path]:
    """Writes `<stem>.md` and `<stem>.tex`, each whole or not at all."""
    paths = []
    for suffix, text in ((".md", markdown(table)), (".tex", latex(table))):
        path = stem.with_name(stem.name + suffix)
        files.write_text(path, text)
        paths.append(path)
    return paths
