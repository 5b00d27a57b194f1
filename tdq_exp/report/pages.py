"""The page of a measurement: every figure as JSON, and what a reader wants of them as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdq_exp.runtime import environment, files


def about(**settings: Any) -> dict[str, Any]:
    """Return what a measurement depends on: its settings, the commit, the machine and versions."""
    return {**settings, **environment.environment()}


def report(stem: Path, measured: Mapping[str, Any], about: Mapping[str, Any], lines: Sequence[str]) -> list[Path]:
    """Write `<stem>.json` and `<stem>.md`, and print the page.

    Args:
        stem: path of the files without their ending; its folder is made.
        measured: every figure, by name.
        about: see `about`; a key of its own in the JSON file.
        lines: of the Markdown page.

    Returns:
        Both files.
    """
    figures, page = (stem.with_name(stem.name + suffix) for suffix in (".json", ".md"))
    files.write_json(figures, {**measured, "about": about})
    files.write_text(page, "\n".join(lines) + "\n")

    print("\n".join(lines))
    return [figures, page]
