"""Measure how a package is built: layout, sizes, density of the page.

    python scripts/analysis/house.py                 this checkout
    python scripts/analysis/house.py PATH [PATH ...] folders of other packages, side by side

Nothing is imported: all of it is read from the source. The length of a function is that from `def`
to its last line, docstring included; its parameters include `self`. The density of the page is that
of the bodies of functions of 20 lines or more: blank lines, and lines that are a comment alone,
among all lines after the docstring.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tdq_exp.report.text_tables import markdown_lines

PACKAGE = Path(__file__).resolve().parents[2] / "tdq_exp"

LONG_FUNCTION = 20  # lines from which a body's density counts
MANY_PARAMETERS = 8
WIDTH = 100  # columns

# A switch on a fit's kind, where a method of the fit would do.
KIND = re.compile(r"""\bfit(\.|"\]\[")(kind|part)\b""")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Measured:
    """What was counted in one package."""

    files: int = 0
    lines: int = 0
    top_modules: int = 0
    lengths: list[int] = field(default_factory=list)
    many_parameters: int = 0
    fmt_skips: int = 0
    wide_lines: int = 0
    body_lines: int = 0
    body_blank: int = 0
    body_comments: int = 0
    kind_lines: int = 0

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) of everything, as it is printed."""
        lengths = sorted(self.lengths) or [0]
        return [
            ("files", f"{self.files:,}"),
            ("lines", f"{self.lines:,}"),
            ("modules at the top level", f"{self.top_modules}"),
            ("functions", f"{len(self.lengths):,}"),
            ("length of a function, median", f"{statistics.median(lengths):g}"),
            ("length of a function, 95 %", f"{_percentile(lengths, 0.95)}"),
            ("length of a function, longest", f"{lengths[-1]}"),
            (f"functions of {MANY_PARAMETERS} or more parameters", f"{self.many_parameters}"),
            ("`fmt: skip`", f"{self.fmt_skips}"),
            (f"lines over {WIDTH} columns", f"{self.wide_lines:,}"),
            ("blank lines in long bodies", _share(self.body_blank, self.body_lines)),
            ("comment lines in long bodies", _share(self.body_comments, self.body_lines)),
            ("lines that ask for a fit's kind", f"{self.kind_lines}"),
        ]


def measure(package: Path) -> Measured:
    """Count a package.

    Args:
        package: its folder.

    Raises:
        ValueError: if there is no Python file in it.
    """
    paths = sorted(package.rglob("*.py"))
    if not paths:
        raise ValueError(f"{package}: holds no Python file")

    measured = Measured(files=len(paths))
    measured.top_modules = len([path for path in package.glob("*.py") if path.name[:2] != "__"])

    for path in paths:
        _count_file(path.read_text(), measured)
    return measured


def _count_file(text: str, measured: Measured) -> None:
    lines = text.splitlines()
    comments = _comment_lines(text)
    measured.lines += len(lines)
    measured.wide_lines += sum(len(line) > WIDTH for line in lines)
    measured.kind_lines += sum(KIND.search(line) is not None for line in lines)
    measured.fmt_skips += len(re.findall(r"#\s*fmt:\s*skip", text))

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function):
            measured.lengths.append(_length(node))
            measured.many_parameters += parameters(node) >= MANY_PARAMETERS
            _count_body(node, lines, comments, measured)


def _count_body(
    node: Function, lines: Sequence[str], comments: set[int], measured: Measured
) -> None:
    """Count the blank and the comment lines of a long function, its docstring left out."""
    if _length(node) < LONG_FUNCTION:
        return

    body = node.body if ast.get_docstring(node) is None else node.body[1:]
    numbers = range(body[0].lineno, _end(node) + 1) if body else range(0)
    measured.body_lines += len(numbers)
    measured.body_blank += sum(not lines[number - 1].strip() for number in numbers)
    measured.body_comments += sum(number in comments for number in numbers)


def parameters(node: Function) -> int:
    """Return the number of a function's named parameters, `self` included."""
    arguments = node.args
    return len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])


def _comment_lines(text: str) -> set[int]:
    """Return the numbers of the lines that are a comment alone."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {
        token.start[0]
        for token in tokens
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip() == ""
    }


def _length(node: Function) -> int:
    return _end(node) - node.lineno + 1


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _percentile(ordered: Sequence[int], share: float) -> int:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %" if total else "-"


def table(packages: Sequence[Path]) -> Iterator[str]:
    """Yield the lines of a Markdown table, a column for each package."""
    columns = [measure(package).rows() for package in packages]
    names = [name for name, _ in columns[0]]
    rows = [[name, *(column[number][1] for column in columns)] for number, name in enumerate(names)]
    yield from markdown_lines(["measured", *(package.name for package in packages)], rows)


def main() -> int:
    """Print the table."""
    from tdq_exp.commands import cli

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "packages", type=Path, nargs="*", help="folders of packages (default: this checkout's)"
    )
    options = parser.parse_args()
    return cli.exit_code(_print_table, [path.resolve() for path in options.packages] or [PACKAGE])


def _print_table(packages: Sequence[Path]) -> None:
    print("\n".join(table(packages)))


if __name__ == "__main__":
    sys.exit(main())
