"""What runs cost, as columns of a table: read from the figures that a script measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdq_exp.runtime import files

COST_HEADERS = (
    ("bit operations", "10^9"),
    ("size", "MB"),
    ("simulated step", "ms"),
    ("integer step", "ms"),
)


@dataclass(frozen=True)
class Costs:
    """The costs of runs, and where they were measured.

    Args:
        runs: name -> `bit_operations`, `bytes`, `simulated_ms`, and `integer_ms` if it was timed.
        note: for the footer.
    """

    runs: Mapping[str, Mapping[str, Any]]
    note: str

    def texts(self, run: str) -> list[str]:
        """Return the numbers of a run as `COST_HEADERS` name them; `missing` if not measured."""
        cost = self.runs.get(run)
        if cost is None:
            return ["missing"] * len(COST_HEADERS)

        integer = cost.get("integer_ms")
        return [
            f"{cost['bit_operations'] / 1e9:.2f}",
            f"{cost['bytes'] / 1e6:.3f}",
            f"{cost['simulated_ms']:.3f}",
            "-" if integer is None else f"{integer:.3f}",
        ]


def read_costs(file: Path | None) -> Costs | None:
    """Return the costs of a measurement; without runs if there is no file, None if none is asked.

    Raises:
        ValueError: if the file is damaged.
    """
    if file is None:
        return None

    measured = files.read_json(file)
    if measured is None:
        return Costs({}, f"Costs are not measured yet ({file.name}).")

    about = measured["about"]
    note = (
        f"Costs: one thread, batches of {about['batch']}, medians of {about['rounds']} steps in"
        f" turn; {about['machine']}, commit {about['commit']}. Float steps are not quantized."
    )
    return Costs(measured["runs"], note)
