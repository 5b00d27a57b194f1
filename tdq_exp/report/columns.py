"""What the columns of a table say: the cells of each model, with their rows, as texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tdq_exp.report.cells import SAMPLER, Cell, Line, Manifest, check_protocol, select
from tdq_exp.report.render import SHORT, STALE, Table


def tabulate(manifest: Manifest, scale: str, cells: Sequence[Cell], overrides: Sequence[str] = ()) -> Table:
    """Fills a table from the cells' rows.

    Args:
        manifest: the table.
        scale: for the title.
        cells: of every line and column, with their rows.
        overrides: what the cells were asked for with, for the footer.

    Raises:
        ValueError: if the rows of a column are of more than one protocol.
    """
    models = manifest.models(scale)
    columns = [_Filled(manifest, name, model, cells, len(models) > 1) for name, model in models.items()]
    headers = [("method", ""), ("bits W/A", ""), *(header for column in columns for header in column.headers)]
    groups = [[_line_texts(manifest.float_model, columns), *_real_texts(columns)]]
    for line in manifest.lines:
        if len(groups) == 1 or groups[-1][0][1] != line.bits:
            groups.append([])
        groups[-1].append(_line_texts(line, columns))
    return Table(f"{manifest.title}, scale {scale}", headers, groups, _notes(manifest, columns, overrides))


def over_bits(manifest: Manifest, cells: Sequence[Cell]) -> tuple[dict[str, dict[int, float]], float | None]:
    """(method -> bits of activations -> distance, the float model's), of a column's lines of one width of the weights.

    Stale and short rows are left out: a picture has no marks.
    """
    found: dict[str, dict[int, float]] = {}

    def mean(line: Line) -> float | None:
        values = _values([c for c in cells if c.line == line and not c.changes and not c.short], "fid")
        return sum(values) / len(values) if values else None

    for line in manifest.lines:
        weight, act = (int(b) for b in line.bits.split("/"))
        value = mean(line)
        if weight == manifest.plot_weight_bits and value is not None:
            found.setdefault(line.method, {})[act] = value
    return found, mean(manifest.float_model)


def distance_name(cells: Sequence[Cell]) -> str:
    """`FID`, or the distance with the name of its features."""
    name = _features(cells)
    return "FID" if name.startswith("inception") else f"Frechet distance ({name} features)"


def _features(cells: Sequence[Cell]) -> str:
    return next((str(c.row["features"]["name"]) for c in cells if c.row), str(cells[0].config["eval"]["label"]))


def _used(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that a line shows: short ones only if there are no others."""
    found = [cell for cell in cells if cell.row]
    return [cell for cell in found if not cell.short] or found


def _values(cells: Sequence[Cell], metric: str) -> list[float]:
    values = [cell.row["metrics"].get(metric) for cell in _used(cells) if cell.row]
    return [] if None in values else values


class _Filled:
    """A column with its cells: what it says in each line."""

    def __init__(self, manifest: Manifest, name: str, model: str, cells: Sequence[Cell], several: bool) -> None:
        self.name, self.model, self.prefix = name, model, f"{model}: " if several else ""
        self.cells = [cell for cell in cells if cell.column == name]
        check_protocol(self.cells)
        self.reference = self.of(manifest.float_model)
        self.scores = "isc" in self.cells[0].config["eval"]["metrics"]
        features = _features(self.cells)
        inception = features.startswith("inception")
        detail = "" if inception else f"{features} features"
        score = [(self.prefix + ("IS" if inception else "inception-style score"), detail)] if self.scores else []
        self.headers = [
            (self.prefix + ("FID" if inception else "Frechet distance"), detail), *score,
            (f"{self.prefix}gap to float", ""), ("published", manifest.columns[name].published),
        ]  # fmt: skip

    def of(self, line: Line) -> list[Cell]:
        return [cell for cell in self.cells if cell.line == line]

    def seeds(self, line: Line) -> str:
        """What a line's label says of this column's sampling seeds."""
        cells, used = self.of(line), _used(self.of(line))
        if len(cells) == 1 or not used:
            return ""
        said = "1 sampling seed" if len(used) == 1 else f"{len(used)} sampling seeds"
        return said + (f" out of {len(cells)}" if len(used) < len(cells) else "")

    def numbers(self, line: Line) -> list[str]:
        """Distance, score, gap, published number."""
        cells, used = self.of(line), _used(self.of(line))
        marks = (STALE if any(c.changes for c in used) else "") + (SHORT if any(c.short for c in used) else "")

        def shown(metric: str) -> str:
            values = _values(cells, metric)
            if not values:
                return "-" if used else "missing"
            spread = f" ({min(values):.2f}..{max(values):.2f})" if len(values) > 1 else ""
            return f"{sum(values) / len(values):.2f}{spread}{marks}"

        ours, theirs = _values(cells, "fid"), _values(self.reference, "fid")
        gap = "-"
        if cells != self.reference and ours and theirs and not any(c.short for c in (*used, *_used(self.reference))):
            gap = f"{sum(ours) / len(ours) - sum(theirs) / len(theirs):+.2f}"
        published = line.fid.get(self.name)
        score = [shown("isc_mean")] if self.scores else []
        return [shown("fid"), *score, gap, "-" if published is None else f"{published:.2f}"]

    def real(self, kind: str) -> dict[str, Any] | None:
        """The metrics of real images of a kind, from the float model's row."""
        return next((cell.row.get(kind) for cell in _used(self.reference) if cell.row), None)

    def real_numbers(self, kind: str) -> list[str]:
        """As `numbers`, of real images."""
        found, keys = self.real(kind), ("fid", "isc_mean") if self.scores else ("fid",)
        if found is None:
            return ["missing" if kind == "held_out" else "-" for _ in keys] + ["-", "-"]
        return ["-" if found.get(key) is None else f"{found[key]:.2f}" for key in keys] + ["-", "-"]


def _line_texts(line: Line, columns: Sequence[_Filled]) -> list[str]:
    seeds = [said for column in columns if (said := column.seeds(line))]
    label = line.method + (f", mean (min..max) of {' and '.join(dict.fromkeys(seeds))}" if seeds else "")
    return [label, line.bits, *(text for column in columns for text in column.numbers(line))]


def _real_texts(columns: Sequence[_Filled]) -> list[list[str]]:
    """Held-out real images in the place of generated ones: what a perfect model would get, and what an autoencoder leaves."""
    lines = []
    for kind, label in (("held_out", "real images, held out"), ("reconstructed", "the same, reconstructed")):
        counts = sorted({found["images"] for column in columns if (found := column.real(kind))})
        if counts or kind == "held_out":
            said = f" ({' or '.join(map(str, counts))} images)" if counts else ""
            lines.append([label + said, "-", *(text for column in columns for text in column.real_numbers(kind))])
    return lines


def _notes(manifest: Manifest, columns: Sequence[_Filled], overrides: Sequence[str]) -> list[str]:
    notes = [column.prefix + note for column in columns for note in _column_notes(column)]
    cells = [cell for column in columns for cell in column.cells]
    found = [cell for cell in cells if cell.row]
    stale = sum(bool(c.changes) for c in found)
    notes.append(
        f"Of {len(cells)} cells {len(cells) - len(found)} missing; {stale} stale ({STALE}: made with another configuration than the"
        f" experiment's); {sum(c.short for c in found)} short ({SHORT}: fewer images than the experiment asks for, no gap)."
    )
    if found:
        notes.append("Gaps are to the float model's mean in our own column.")
    if overrides:
        notes.append(f"Asked for with {' '.join(overrides)}.")
    sources = sorted({line.source for line in (manifest.float_model, *manifest.lines) if line.source})
    if sources:
        notes.append(f"Published: {'; '.join(sources)}.")
    return notes


def _column_notes(column: _Filled) -> list[str]:
    found = [cell for cell in column.cells if cell.row]
    if not found:
        return ["no rows yet."] if column.prefix else ["No rows yet."]

    def listed(key: str, among: Sequence[Cell] = found) -> str:
        values = {select(cell.row, key) for cell in among if cell.row}
        return ", ".join(sorted("unknown" if v is None else str(v) for v in values)) or "-"

    quantized = [cell for cell in found if cell.config["method"]["quantized"]]
    sampler = listed("config.sampler.method._target_").rsplit(".", 1)[-1]
    settings = ", ".join(f"{key} {listed(f'config.sampler.{key}')}" for key in SAMPLER)
    autoencoder = listed("autoencoder")
    return [
        f"Images per cell: {listed('images')}. Sampler: {sampler}, {settings}.",
        f"Features: {listed('features.name')}, weights {listed('features.weights')}."
        f" Reference: {listed('reference.images')} training images, content {listed('reference.content')},"
        f" {listed('reference.protocol')}.",
        f"Float weights: {listed('weights')}{'' if autoencoder == 'unknown' else f', autoencoder {autoencoder}'}."
        f" Checkpoint of the quantized lines: {listed('report', quantized)}."
        f" Seeds of their training: {listed('seed', quantized)}.",
        f"Commits: {listed('environment.commit')}. Machines: {listed('environment.machine')}.",
    ]
