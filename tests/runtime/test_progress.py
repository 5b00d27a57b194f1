"""What is printed is what was said, whatever signs it holds."""

from __future__ import annotations

import pytest
from rich.console import Console

from tdq_exp.runtime import progress

BRACKETS = "runs[old]/[bold]x[/bold] [fid,isc] a:key:b"


def test_brackets_are_no_markup(capsys):
    progress.console.print(BRACKETS)
    progress.print_table(BRACKETS, [BRACKETS, "b"], [[BRACKETS, 1.0]])
    with progress.track(BRACKETS, 1) as advance:
        advance(BRACKETS)
    assert capsys.readouterr().out.count(BRACKETS) == 6


def test_nor_beside_a_bar(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w") as file:
        terminal = Console(file=file, force_terminal=True, width=200, markup=False, emoji=False)
        monkeypatch.setattr(progress, "console", terminal)
        with progress.track(BRACKETS, 1) as advance:
            advance("[red]")
    shown = (tmp_path / "out").read_text()
    assert BRACKETS in shown and "[red]" in shown


@pytest.mark.parametrize("value, text", [(None, "-"), (1234.567, "1235"), (2, "2"), ("[a]", "[a]")])
def test_a_cell_is_a_short_text(value, text):
    assert progress._cell(value) == text
