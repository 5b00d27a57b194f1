"""Tables: what the manifest names exists, numbers are what the rows say, and rows that do not compare are refused."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tdq_exp.commands import claims as claims_command
from tdq_exp.commands import figure as figure_command
from tdq_exp.commands import render as render_command
from tdq_exp.commands import table as table_command
from tdq_exp.commands import table_runs
from tdq_exp.config import assets
from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import cost as costs
from tdq_exp.report import cells as report_cells
from tdq_exp.report import columns, protocol
from tdq_exp.report import manifest as manifests
from tdq_exp.report import text_tables as rendering
from tdq_exp.report.costs import read_costs
from tdq_exp.runtime import command, files, launch, tensor_files

ROOT = Path(__file__).parent.parent
BITS = ("8/8", "4/8", "8/4", "4/4", "3/3")
METHODS = ("PACT", "LSQ", "NIPQ", "LSQ + TDQ")
PUBLISHED = {  # (CIFAR-10, Churches)
    "table1": {
        ("LSQ", "4/4"): (7.30, 5.06), ("NIPQ", "4/4"): (30.73, 7.22), ("LSQ + TDQ", "4/4"): (4.48, 4.64),
        ("LSQ + TDQ", "3/3"): (6.48, 6.57),
    },
    "table2": {("PTQ4DM", "8/5"): (22.43, 7.06), ("PTQ4DM + TDQ", "8/5"): (5.71, 4.85)},
}  # fmt: skip


@pytest.fixture(scope="module")
def manifest():
    return manifests.read_manifest("table1")


@pytest.fixture(scope="module")
def short_manifest(manifest):
    """The float model, LSQ and LSQ + TDQ at four bits: enough for arithmetic, and quick to compose."""
    lines = [
        dataclasses.replace(line, seeds={})
        for line in manifest.lines
        if line.bits == "4/4" and line.label.startswith("LSQ")
    ]
    return dataclasses.replace(manifest, lines=tuple(lines))


@pytest.fixture(scope="module")
def asked(short_manifest):
    return report_cells.cells_of(short_manifest, "digits", Path("results"))


@pytest.fixture
def cells(asked, tmp_path):
    """The cells of the short manifest in a folder of their own."""
    return [
        dataclasses.replace(cell, folder=tmp_path / "runs" / cell.run / "seed0") for cell in asked
    ]


def row_of(cell: report_cells.Cell, fid: float, **changes) -> dict:
    row = {
        "config": copy.deepcopy(cell.config),
        "name": cell.run,
        "seed": 0,
        "sample": cell.sample,
        "report": "last",
        "images": cell.config["sampler"]["images"],
        "features": {"name": "digits", "weights": "a44b6f403d4e3f88"},
        "reference": {
            "content": "3082757e490b63aa",
            "images": 1437,
            "protocol": "centre crop, bicubic to 8x8x1",
        },
        "weights": cell.contents.get("weights") or "7476fec3b9973589",
        "metrics": {"fid": fid, "isc_mean": 8.0, "kid_mean": fid / 100},
        "held_out": {"fid": 1.5, "isc_mean": 9.25, "kid_mean": 0.01, "images": 360},
        "environment": {"commit": "0123456789ab", "machine": "Linux, 2 cores"},
    }
    for key, value in changes.items():
        put(row, key.replace("__", "."), value)
    return row


def put(row: dict, field: str, value: object) -> None:
    *parents, last = field.split(".")
    for key in parents:
        row = row[key]
    row[last] = value


def save(cell: report_cells.Cell, row: dict, sample: str | None = None) -> None:
    path = cell.folder / (sample or cell.sample) / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"rows": [files.sealed(row)]})


def fill(cells) -> None:
    """Float 10, 12 and 11; LSQ 20; LSQ + TDQ 10.5."""
    for cell, fid in zip(cells, (10.0, 12.0, 11.0, 20.0, 10.5), strict=True):
        save(cell, row_of(cell, fid))


def render(manifest, cells) -> str:
    return rendering.markdown(
        columns.text_table(manifest, "digits", [report_cells.find(cell) for cell in cells])
    )


def line_of(text: str, method: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {method}")]
    return [part.strip() for part in line.strip("|").split("|")]


def test_every_cell_of_the_paper_is_in_the_manifest(manifest):
    assert [(line.label, line.bits) for line in manifest.lines] == [
        (m, b) for b in BITS for m in METHODS
    ]
    assert manifest.float_model.sampler_seeds == (0, 1, 2)
    assert models(manifest, "paper") == {"ddim": "ddim_cifar10", "ldm": "ldm_churches"}
    assert models(manifest, "small") == {"ddim": "ddim_small", "ldm": "ldm_small"}
    assert models(manifest, "digits") == {"ddim": "digits"}


def models(manifest, scale) -> dict[str, str]:
    return {name: manifest.columns[name].scales[scale]["model"] for name in manifest.at(scale)}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_numbers_are_the_known_ones_and_have_a_source(name):
    manifest = manifests.read_manifest(name)
    found = {
        (line.label, line.bits): (line.fid["ddim"], line.fid["ldm"])
        for line in manifest.lines
        if line.fid
    }
    assert found == PUBLISHED[name]
    assert all(line.source for line in manifest.lines if line.fid)
    assert not manifest.float_model.fid


@pytest.fixture
def write_table1(tmp_path, monkeypatch):
    """Write another table1.yaml, into a folder of configs that has the groups which it names."""
    for group in ("bits", "method", "tdq", "plan", "model", "experiment", "table"):
        (tmp_path / group).mkdir()

    def write(text: str) -> None:
        (tmp_path / "table" / "table1.yaml").write_text(text)
        monkeypatch.setattr(assets, "configs", lambda: tmp_path)

    return write


def test_a_published_number_without_a_source_is_refused(write_table1):
    text = (assets.configs() / "table" / "table1.yaml").read_text()
    write_table1(text.replace("ldm: 7.22}\n    source: *quoted", "ldm: 7.22}"))
    with pytest.raises(ValueError, match="NIPQ 4/4: `fid` and `source` go together"):
        manifests.read_manifest("table1")


def test_a_number_of_a_column_that_is_not_there_is_refused(manifest):
    line = dataclasses.replace(manifest.lines[0], fid={"churches": 1.0}, source="somewhere")
    with pytest.raises(ValueError, match="PACT 8/8: `fid` names no column: churches"):
        dataclasses.replace(manifest, lines=(line,))


@pytest.mark.parametrize(
    "scale, column",
    [("paper", "ddim"), ("paper", "ldm"), ("small", "ddim"), ("small", "ldm"), ("digits", "ddim")],
)
def test_a_cell_is_what_its_line_says(manifest, scale, column):
    # Lines of one method differ in their bits alone, so composing one pair for each method covers all of their parts.
    for line in [manifest.float_model, *(line for line in manifest.lines if line.bits == "3/3")]:
        choices = manifest.choices(scale, column, line)
        cfg = compose([f"{group}={option}" for group, option in choices.items()])
        assert cfg.protocol.scale == scale and choices["model"] == models(manifest, scale)[column]
        quantized = line is not manifest.float_model
        assert cfg.method.label == (
            {"LSQ + TDQ": "lsq"}.get(line.label, line.label.lower()) if quantized else "fp"
        )
        assert (cfg.tdq.label == "tdq") == ("TDQ" in line.label)
        assert not quantized or (cfg.bits.weight, cfg.bits.act) == (3, 3)


def test_a_column_adds_its_choices_to_quantized_lines_and_a_line_wins():
    manifest = manifests.read_manifest("table2")
    line = manifest.lines[0]
    assert manifest.choices("small", "ldm", line)["plan"] == "float_attention"
    assert manifest.choices("small", "ldm", manifest.float_model) == {
        "model": "ldm_small",
        "method": "fp",
    }
    edges = dataclasses.replace(line, choices={**line.choices, "plan": "edge8"})
    assert manifest.choices("small", "ldm", edges)["plan"] == "edge8"


@pytest.mark.parametrize(
    "line, message",
    [
        ("{label: a, bitz: w4a4, method: lsq}", "bitz: is neither a key of a line"),
        ("{label: a, experiment: digits_fp}", "experiment: is neither"),
        ("{bits: w4a4, method: lsq}", "label"),
    ],
)
def test_a_wrong_line_of_a_manifest_is_refused(line, message, write_table1):
    text = (assets.configs() / "table" / "table1.yaml").read_text()
    write_table1(f"{text}  - {line}\n")
    with pytest.raises(ValueError, match=message):
        manifests.read_manifest("table1")


COMMITTED = [
    *((name, scale) for name in ("table1", "table2") for scale in ("digits", "small")),
    ("table7", "digits"),
]


@pytest.mark.parametrize("name, scale", COMMITTED)
def test_committed_tables_are_rendered_again_to_the_byte(name, scale):
    results = Path(__file__).resolve().parents[1] / "results"
    manifest = manifests.read_manifest(name)
    cells = [report_cells.find(cell) for cell in report_cells.cells_of(manifest, scale, results)]
    costs = read_costs(results / manifest.measured if manifest.measured else None)
    table = columns.text_table(manifest, scale, cells, costs=costs)
    for suffix, text in ((".md", rendering.markdown(table)), (".tex", rendering.latex(table))):
        assert (results / "tables" / f"{name}-{scale}{suffix}").read_text() == text


def test_every_line_asks_for_the_bits_that_it_shows(manifest):
    cells = report_cells.cells_of(
        dataclasses.replace(manifest, lines=manifest.lines[::4]), "digits", Path("results")
    )
    bits = [cell.config["bits"] for cell in cells[3:]]
    assert [f"{b['weight']}/{b['act']}" for b in bits] == list(BITS)
    assert [cell.config["sampler"]["seed"] for cell in cells[:3]] == [0, 1, 2]


@pytest.mark.parametrize("scale", ["paper", "small", "digits"])
def test_table_2_asks_for_post_training_quantization_at_one_number_of_steps(scale):
    manifest = manifests.read_manifest("table2")
    short = dataclasses.replace(manifest, lines=(*manifest.lines[:3], *manifest.lines[-3:]))
    cells = report_cells.cells_of(short, scale, Path("results"))
    steps = {cell.config["sampler"]["steps"] for cell in cells}
    assert steps == {100 if scale == "paper" else 50}
    for cell in (cell for cell in cells if cell.line != manifest.float_model):
        weight, act = cell.line.bits.split("/")
        assert (cell.config["bits"]["weight"], cell.config["bits"]["act"]) == (
            int(weight),
            int(act),
        )
        assert cell.config["fit"]["kind"] == "ptq"


def test_rows_are_found_where_a_run_writes_them(short_manifest, tmp_path):
    only = dataclasses.replace(short_manifest, lines=short_manifest.lines[:1])
    cells = report_cells.cells_of(only, "digits", tmp_path / "a b")
    assert cells[-1].folder == tmp_path / "a b" / "runs" / "digits_w4a4_lsq_release" / "seed0"
    assert [cell.sample for cell in cells] == [
        f"ddim50_n1000{seed}" for seed in ("", "_seed1", "_seed2", "")
    ]
    save(cells[-1], row_of(cells[-1], 20.0))
    assert [report_cells.find(cell).done for cell in cells] == [False, False, False, True]


def test_the_same_rows_give_the_same_bytes(short_manifest, cells, tmp_path):
    fill(cells)
    written = []
    for folder in ("first", "second"):
        table = columns.text_table(
            short_manifest, "digits", [report_cells.find(cell) for cell in cells]
        )
        written.append(
            [p.read_bytes() for p in rendering.write(table, tmp_path / folder / "table1-digits")]
        )
    assert written[0] == written[1]
    assert not list(tmp_path.rglob("*.part"))


def test_numbers_spread_and_gaps(short_manifest, cells):
    fill(cells)
    text = render(short_manifest, cells)
    mean = "float, mean (min..max) of 3 sampling seeds"
    assert line_of(text, mean) == [
        mean,
        "32/32",
        "11.00 (10.00..12.00)",
        "8.00 (8.00..8.00)",
        "0.1100 (0.1000..0.1200)",
        "-",
        "-",
    ]
    assert line_of(text, "real images")[0] == "real images, held out (360 images)"
    assert line_of(text, "real images")[2:] == ["1.50", "9.25", "0.0100", "-", "-"]
    assert line_of(text, "LSQ |") == ["LSQ", "4/4", "20.00", "8.00", "0.2000", "+9.00", "7.30"]
    tdq = ["LSQ + TDQ", "4/4", "10.50", "8.00", "0.1050", "-0.50", "4.48"]
    assert line_of(text, "LSQ + TDQ") == tdq
    assert "Frechet distance (digits features)" in text and "FID |" not in text
    assert "published (CIFAR-10 32x32, Inception)" in text
    for fact in (
        "1000",
        "Ddim, steps 50",
        "a44b6f403d4e3f88",
        "3082757e490b63aa",
        "1437",
        str(cells[0].contents["weights"]),
    ):
        assert fact in text
    assert "0123456789ab" in text and "Linux, 2 cores" in text and "0 missing; 0 stale" in text


def test_only_inception_is_called_fid_and_is(short_manifest, cells):
    for cell in cells:
        save(cell, row_of(cell, 5.0, features__name="inception_v3_compat"))
    header = render(short_manifest, cells).splitlines()[2]
    assert header.startswith("| method | bits W/A | FID | IS | KID | gap to float |")


def test_nothing_to_render_is_a_table_of_missing_cells(short_manifest, cells):
    text = render(short_manifest, cells)
    assert line_of(text, "LSQ |") == ["LSQ", "4/4", "missing", "missing", "missing", "-", "7.30"]
    assert line_of(text, "float")[2] == line_of(text, "real images")[2] == "missing"
    assert "5 missing" in text and "No rows yet." in text


def test_a_missing_seed_of_the_float_model_shows(short_manifest, cells):
    fill(cells)
    (cells[1].folder / cells[1].sample / "metrics.json").unlink()
    text = render(short_manifest, cells)
    assert (
        line_of(text, "float, mean (min..max) of 2 sampling seeds out of 3")[2]
        == "10.50 (10.00..11.00)"
    )
    assert line_of(text, "LSQ + TDQ")[5] == "+0.00"


def test_a_line_within_the_spread_of_the_best_is_a_tie(short_manifest, cells):
    """The float model's seeds differ by 2: LSQ at 12.4 ties with LSQ + TDQ at 10.5, at 12.6 not."""
    fill(cells)
    for fid, mark in ((12.4, "12.40≈"), (12.6, "12.60")):
        save(cells[3], row_of(cells[3], fid))
        text = render(short_manifest, cells)
        assert line_of(text, "LSQ |")[2] == mark and ("a tie with the best" in text) == (
            "≈" in mark
        )
        assert line_of(text, "LSQ + TDQ")[2] == "10.50"

    # Half-sampling widens it: four deviations of 0.6.
    save(cells[3], row_of(cells[3], 12.6) | {"half_sampling": {"fid": 0.6, "draws": 20}})
    text = render(short_manifest, cells)
    assert line_of(text, "LSQ |")[2] == "12.60 ± 1.20≈"
    assert "two standard deviations of the distance over halves" in text


def test_a_short_row_hides_no_tie_of_the_others(short_manifest, cells):
    """It can be the best of its bits, and compares with nothing: the others tie among themselves."""
    names = {"short": 12.0, "best": 20.0, "tie": 21.5, "worse": 22.5}
    lines = {name: dataclasses.replace(cells[3].line, label=name) for name in names}
    table = dataclasses.replace(short_manifest, lines=tuple(lines.values()))

    found = [
        dataclasses.replace(cell, row=row_of(cell, fid))
        for cell, fid in zip(cells, (10.0, 12.0, 11.0), strict=False)
    ]
    for name, line in lines.items():
        row = row_of(cells[3], names[name], **({"images": 200} if name == "short" else {}))
        found.append(dataclasses.replace(cells[3], line=line, row=row))

    text = rendering.markdown(columns.text_table(table, "digits", found))
    marked = {name: line_of(text, name)[2] for name in names}
    assert marked == {"short": "12.00‡", "best": "20.00", "tie": "21.50≈", "worse": "22.50"}


def test_a_line_with_one_training_seed_varies_as_those_with_several(manifest, tmp_path):
    """LSQ + TDQ at 10 to 11 is known to vary by a tenth of its mean: LSQ at 11.5 ties, at 12 not."""
    lines = [
        dataclasses.replace(line, seeds=seeds)
        for label, seeds in (("LSQ", {}), ("LSQ + TDQ", {"digits": (0, 1)}))
        for line in manifest.lines
        if (line.bits, line.label) == ("4/4", label)
    ]
    several = dataclasses.replace(manifest, lines=tuple(lines))
    cells = [
        dataclasses.replace(cell, folder=tmp_path / "runs" / cell.run / f"seed{number}")
        for number, cell in enumerate(report_cells.cells_of(several, "digits", Path("results")))
    ]
    for cell, fid in zip(cells, (5.0, 5.1, 5.2, 11.6, 10.0, 11.0), strict=True):
        save(cell, row_of(cell, fid))

    for fid, mark in ((11.6, "11.60≈"), (12.0, "12.00")):
        save(cells[3], row_of(cells[3], fid))
        text = render(several, cells)
        assert line_of(text, "LSQ |")[2] == mark
    save(cells[3], row_of(cells[3], 11.6))
    assert "widest line with several: 9.5 %" in render(several, cells)


def test_the_footer_says_how_long_the_rows_took_and_counts_a_fit_once(short_manifest, cells):
    fill(cells)
    for cell, fit in zip(cells, ("a", "a", "a", "b", "c"), strict=True):
        row = row_of(cell, 10.0) | {
            "fingerprints": {"fit": fit},
            "seconds": {"fit": 3600.0, "sample": 1800.0, "measure": 360.0},
        }
        save(cell, row)
    said = "Time of the rows above: 6.0 hours; fits 3.0, sampling 2.5, measuring 0.5."
    assert said in render(short_manifest, cells)


def test_precision_and_recall_of_a_row_are_a_second_metric(short_manifest, cells):
    fill(cells)
    text = render(short_manifest, cells)
    assert "precision /" not in text and "without precision and recall: 5." in text
    stated = {"precision_recall": {"precision": 0.5, "recall": 0.25}}
    save(cells[3], row_of(cells[3], 20.0) | stated)
    text = render(short_manifest, cells)
    assert line_of(text, "LSQ |")[5] == "0.50 / 0.25" and line_of(text, "LSQ + TDQ")[5] == "-"


def test_each_seed_of_training_is_a_cell(short_manifest, tmp_path):
    line = dataclasses.replace(short_manifest.lines[0], seeds={"digits": (0, 1, 2)})
    several = dataclasses.replace(short_manifest, lines=(line,))
    cells = report_cells.cells_of(several, "digits", tmp_path)[3:]
    assert [cell.folder.name for cell in cells] == ["seed0", "seed1", "seed2"]
    assert [cell.name.rpartition(" ")[2] for cell in cells[1:]] == ["seed=1", "seed=2"]
    assert "seed=2" in cells[2].overrides and cells[2].config["seed"] == 2
    for cell, fid in zip(cells[:2], (20.0, 22.0), strict=True):
        save(cell, row_of(cell, fid))
    text = render(several, report_cells.cells_of(several, "digits", tmp_path))
    label = "LSQ, mean (min..max) of 2 training seeds out of 3"
    assert line_of(text, label)[2] == "21.00 (20.00..22.00)"


@pytest.fixture
def both(short_manifest, tmp_path):
    """The cells of both columns at small scale, with rows: DDIM's at 10 and 20, LDM's at 30 and 50."""
    cells = [
        dataclasses.replace(cell, folder=tmp_path / "runs" / cell.run / "seed0")
        for cell in report_cells.cells_of(short_manifest, "small", tmp_path)
    ]
    for cell in cells:
        quantized, latent = cell.line != short_manifest.float_model, cell.column == "ldm"
        row = row_of(cell, (50.0 if quantized else 30.0) if latent else 20.0 if quantized else 10.0)
        if latent:
            row |= {
                "autoencoder": cell.contents["autoencoder"],
                "reconstructed": {"fid": 12.5, "images": 360},
            }
            row["metrics"], row["held_out"] = (
                {"fid": row["metrics"]["fid"]},
                {"fid": 1.25, "images": 360},
            )
        save(cell, row)
    return cells


def small(manifest, cells) -> str:
    return rendering.markdown(
        columns.text_table(manifest, "small", [report_cells.find(cell) for cell in cells])
    )


def test_a_table_has_a_column_for_each_model(short_manifest, both):
    text = small(short_manifest, both)
    names = [name.split(" (")[0] for name in line_of(text, "method")]
    assert names == [
        "method", "bits W/A", "ddim_small: Frechet distance", "ddim_small: inception-style score",
        "ddim_small: kernel distance", "ddim_small: gap to float", "published",
        "ldm_small: Frechet distance", "ldm_small: gap to float", "published",
    ]  # fmt: skip
    assert line_of(text, "LSQ |")[2:] == [
        "20.00",
        "8.00",
        "0.2000",
        "+10.00",
        "7.30",
        "50.00",
        "+20.00",
        "5.06",
    ]
    assert line_of(text, "real images")[2:] == [
        "1.50",
        "9.25",
        "0.0100",
        "-",
        "-",
        "1.25",
        "-",
        "-",
    ]
    assert line_of(text, "the same, reconstructed (360 images)")[2:] == [
        "-",
        "-",
        "-",
        "-",
        "-",
        "12.50",
        "-",
        "-",
    ]
    assert (
        f"ldm_small: Float weights: {both[-1].contents['weights']}, autoencoder {both[-1].contents['autoencoder']}."
        in text
    )
    assert "0 missing; 0 stale" in text


def test_rows_of_another_autoencoder_are_stale_and_do_not_mix(short_manifest, both):
    other = [cell for cell in both if cell.column == "ldm"]
    for cell in other:
        row = json.loads((cell.folder / cell.sample / "metrics.json").read_text())["rows"][0]
        save(cell, row | {"autoencoder": "7476fec3b9973589"})
    assert "30.00†" in small(short_manifest, both).replace(" (30.00..30.00)", "")
    assert (
        f"float autoencoder: 7476fec3b9973589 -> {other[0].contents['autoencoder']}"
        in report_cells.find(other[0]).changes
    )
    row = json.loads((other[-1].folder / other[-1].sample / "metrics.json").read_text())["rows"][0]
    save(other[-1], row | {"autoencoder": other[0].contents["autoencoder"]})
    with pytest.raises(ValueError, match="autoencoder is 7476fec3b9973589 in ldm_small_fp and"):
        small(short_manifest, both)


def test_one_column_is_run_alone_and_has_the_overrides_alone(
    short_manifest, tmp_path, commands, free_plan
):
    options = [
        "table1",
        "--scale",
        "small",
        "--run",
        "--column",
        "ldm",
        "--out",
        str(tmp_path),
        "sampler.batch=50",
    ]
    assert table_command.main(options) == 0
    assert {command[3] for command in commands} == {"model=ldm_small"}
    cells = report_cells.cells_of(short_manifest, "small", tmp_path, ["sampler.batch=50"], "ldm")
    assert {(cell.column, cell.config["sampler"]["batch"]) for cell in cells} == {
        ("ddim", 100),
        ("ldm", 50),
    }
    with pytest.raises(ValueError, match="--column ldm: table1 at scale digits has ddim"):
        report_cells.cells_of(short_manifest, "digits", tmp_path, column="ldm")


def test_a_stale_row_is_marked_and_says_why(short_manifest, cells):
    fill(cells)
    save(cells[3], row_of(cells[3], 20.0, config__fit__lr=1.0))
    text = render(short_manifest, cells)
    assert line_of(text, "LSQ |")[2] == "20.00†" and "1 stale" in text
    assert report_cells.find(cells[3]).changes == [f"fit.lr: 1.0 -> {cells[3].config['fit']['lr']}"]


def test_a_row_of_another_float_net_is_stale(short_manifest, cells):
    for cell in cells:
        save(cell, row_of(cell, 20.0, weights="7476fec3b9973589"))
    text = render(short_manifest, cells)
    assert "20.00†" in text and f"{len(cells)} stale" in text
    assert report_cells.find(cells[3]).changes == [
        f"float weights: 7476fec3b9973589 -> {cells[3].contents['weights']}"
    ]


def test_paths_labels_and_unused_groups_make_no_row_stale(short_manifest, cells):
    fill(cells)
    elsewhere = {
        "config__model__weights": "/elsewhere/net.safetensors",
        "config__tdq__label": "renamed",
    }
    save(cells[3], row_of(cells[3], 20.0, **elsewhere, config__fit__stop_after=3))
    save(cells[0], row_of(cells[0], 10.0, config__fit__lr=1.0))  # the float model is not trained
    assert "†" not in render(short_manifest, cells).split("\n\n")[1]


def test_a_short_row_is_marked_and_has_no_gap(short_manifest, cells):
    fill(cells)
    (cells[3].folder / cells[3].sample / "metrics.json").unlink()
    for images, fid in ((200, 40.0), (500, 30.0)):
        changes = {"images": images, "config__sampler__images": images}
        sample = f"ddim50_n{images}"
        save(cells[3], row_of(cells[3], fid, sample=sample, **changes), sample)
    changes = {"images": 900, "config__sampler__images": 900, "config__sampler__method__steps": 10}
    sample = "ddim10_n900"  # another sampler is no stand-in
    save(cells[3], row_of(cells[3], 1.0, sample=sample, **changes), sample)
    text = render(short_manifest, cells)
    assert line_of(text, "LSQ |")[2:6] == ["30.00‡", "8.00‡", "0.3000‡", "-"]
    assert "1 short" in text and not report_cells.find(cells[3]).done


@pytest.mark.parametrize("field", [field for field in protocol.PROTOCOL if field != "report"])
def test_rows_of_two_protocols_are_refused(short_manifest, cells, field):
    fill(cells)
    row = row_of(cells[4], 10.5)
    was = protocol.select(row, field)
    put(row, field, now := 5000 if isinstance(was, int) and not isinstance(was, bool) else "other")
    save(cells[4], row)
    with pytest.raises(ValueError) as error:
        render(short_manifest, cells)
    message = str(error.value)
    assert (
        f"{field} is {was} in digits_fp and {now} in digits_w4a4_lsq_tdq_release" in message
        and "\n" not in message
    )


def test_best_of_five_and_last_are_refused_among_the_quantized(short_manifest, cells):
    fill(cells)
    for cell in cells[3:]:
        save(cell, row_of(cell, 10.5, report="best_of_5"))
    render(short_manifest, cells)  # the float model has no choice of checkpoints
    save(cells[3], row_of(cells[3], 10.5))
    with pytest.raises(
        ValueError, match="report is last in digits_w4a4_lsq_release and best_of_5 in"
    ):
        render(short_manifest, cells)


def test_a_short_row_of_other_features_is_refused(short_manifest, cells):
    fill(cells)
    save(
        cells[3],
        row_of(cells[3], 9.0, images=10, config__sampler__images=10, features__weights="other"),
    )
    with pytest.raises(ValueError, match=r"features\.weights"):
        render(short_manifest, cells)


def test_latex_escapes_and_marks():
    notes = [r"50% of a_b & #1 {x} ~ ^ \ $ < > |"]
    table = rendering.TextTable(
        "T", [("a_b", ""), ("b", "c & d"), ("c", "")], [[["10 %", "-", "1.00†‡"]]], notes
    )
    text = rendering.latex(table)
    assert r"a\_b & b & c \\" in text and r" & (c \& d) &  \\" in text
    assert r"10 \% & - & 1.00\textsuperscript{\dag}\textsuperscript{\ddag} \\" in text
    assert (
        r"50\% of a\_b \& \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$"
        in text
    )
    assert [text.count(rf"\{rule}rule") for rule in ("top", "mid", "bottom")] == [1, 1, 1]
    assert "†" not in text and "‡" not in text


@pytest.fixture
def free_plan(monkeypatch):
    """The cost of a cell, without a measured forward pass; counts how often it was asked for."""
    estimates = []
    monkeypatch.setattr(
        costs,
        "estimate",
        lambda job: estimates.append(job.name) or costs.Cost(7200.0, 3600.0, 10**9, 1000),
    )
    return estimates


@pytest.fixture
def commands(monkeypatch, short_manifest):
    """What would be started, with no GPU and the short manifest; LSQ without TDQ fails."""
    started = []

    def call(command):
        started.append(command)
        return 3 if {"model=digits", "method=lsq", "tdq=none"} <= set(command) else 0

    monkeypatch.setattr(table_runs, "call", call)
    monkeypatch.setattr(launch, "gpus", lambda: 0)
    monkeypatch.setattr(manifests, "read_manifest", lambda name: short_manifest)
    return started


def test_run_starts_what_is_missing_and_goes_on_after_a_failure(
    short_manifest, tmp_path, commands, free_plan, capsys, tiny_weights
):
    net = f"model.weights={tiny_weights}"
    cells = report_cells.cells_of(short_manifest, "digits", tmp_path, [net])
    save(cells[0], row_of(cells[0], 10.0))
    save(
        cells[2], row_of(cells[2], 10.0, config__eval__batch=3)
    )  # stale: a run would refuse its name
    options = ["table1", "--scale", "digits", "--run", "--out", str(tmp_path), net]
    assert table_command.main(options) == 1
    out, start = f"out={tmp_path}", ["-m", "tdq_exp.run", "model=digits"]
    assert [command[1:] for command in commands] == [
        [*start, "method=fp", "sampler.seed=1", out, "tracker=none", net],
        [*start, "plan=release", "bits=w4a4", "method=lsq", "tdq=none", out, "tracker=none", net],
        [
            *start,
            "plan=release",
            "bits=w4a4",
            "method=lsq",
            "tdq=temporal",
            out,
            "tracker=none",
            net,
        ],
    ]
    said = capsys.readouterr().out
    assert "1 of 3 cells failed: digits_w4a4_lsq_release" in said
    assert "stale, not run again: digits_fp sampler.seed=2" in said
    assert "9.0 h" in said and "3.00 GB" in said and said.index("9.0 h") < said.index("cell 1 of 3")
    assert len(free_plan) == 3, "cells of one shape and form are estimated once"
    assert "one measured forward pass of each network (1)" in said
    assert (tmp_path / "tables" / "table1-digits.md").exists() and (
        tmp_path / "tables" / "table1-digits.tex"
    ).exists()


def test_a_plan_counts_the_fit_of_several_sets_once(
    short_manifest, tmp_path, monkeypatch, capsys, tiny_weights
):
    net = f"model.weights={tiny_weights}"
    sets = [[net, f"sampler.steps={steps}"] for steps in (50, 20)]
    cells = [report_cells.cells_of(short_manifest, "digits", tmp_path, own)[3] for own in sets]
    cost = costs.Cost(7200.0, 3600.0, 10**9, 1000, fit_disk_bytes=10**8)
    monkeypatch.setattr(costs, "estimate", lambda job: cost)
    table_runs.show_plan(cells)
    said = capsys.readouterr().out
    assert "4.0 h" in said and "1.90 GB" in said, said


def test_without_run_nothing_is_started(tmp_path, commands):
    assert table_command.main(["table1", "--scale", "digits", "--out", str(tmp_path)]) == 0
    assert not commands and (tmp_path / "tables" / "table1-digits.md").exists()


@pytest.fixture
def single(short_manifest, monkeypatch):
    """A manifest of one cell, for what does not depend on their number."""
    one = dataclasses.replace(short_manifest.float_model, sampler_seeds=(0,))
    monkeypatch.setattr(
        manifests,
        "read_manifest",
        lambda name: dataclasses.replace(short_manifest, float_model=one, lines=()),
    )


def test_the_papers_scale_needs_a_gpu_or_go(tmp_path, commands, free_plan, single, capsys):
    options = ["table1", "--scale", "paper", "--run", "--out", str(tmp_path)]
    assert table_command.main(options) == 2
    assert (
        "ldm_fp: model.weights has no value" in (said := capsys.readouterr().err)
        and "--column" in said
    )
    options += ["--column", "ddim"]
    assert table_command.main(options) == 2
    said = capsys.readouterr()
    assert "SCALE=small" in said.err and said.err.count("\n") == 1 and "50000" in said.out
    assert not commands and not (tmp_path / "tables").exists()
    assert table_command.main([*options, "--go"]) == 0
    assert [command[-1] for command in commands] == ["go=true"]


def test_interruption_says_how_to_go_on(
    tmp_path, commands, free_plan, single, monkeypatch, capsys, tiny_weights
):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(table_runs, "call", interrupted)
    options = [
        "table1",
        "--scale",
        "digits",
        "--run",
        "--out",
        str(tmp_path),
        f"model.weights={tiny_weights}",
    ]
    assert table_command.main(options) == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, hint",
    [
        ("out=x", "--out"),
        ("+experiment=digits_fp", "names"),
        ("nokey=1", "nokey"),
        ("bits=w8a8", "chooses bits for LSQ 4/4"),
        ("bits.act=5", "chooses bits for its lines"),
        ("calibration.path=x.pt", "names its calibration sets"),
    ],
)
def test_overrides_that_do_not_fit_are_one_line(tmp_path, commands, capsys, override, hint):
    assert (
        table_command.main(["table1", override, "--scale", "digits", "--out", str(tmp_path)]) == 2
    )
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1


def test_a_value_in_which_lines_differ_is_not_overridden(short_manifest, tmp_path):
    """Else one run would stand under the labels of several lines."""
    plain, rescaled = (
        dataclasses.replace(short_manifest.lines[0], label=label, overrides=overrides)
        for label, overrides in (
            ("LSQ", ("sampler.steps=${protocol.ptq.steps}",)),
            ("LSQ (rescaled)", ("fit.correction=rescale",)),
        )
    )
    table = dataclasses.replace(short_manifest, lines=(plain, rescaled))
    with pytest.raises(ValueError, match=r"chooses fit.correction for LSQ \(rescaled\) 4/4"):
        report_cells.cells_of(table, "digits", tmp_path, ["fit.correction=none"])

    # Both sample with as many steps, whoever says so.
    cells = report_cells.cells_of(table, "digits", tmp_path, ["sampler.steps=20"])
    assert {cell.config["sampler"]["steps"] for cell in cells} == {20}


@pytest.mark.parametrize(
    "override, tables, hint",
    [
        ("--column=ldm", ["table1", "table3"], ""),
        ("--column=nosuch", [], "--column nosuch"),
        ("bits=w8a8", [], "chooses bits"),
    ],
)
def test_all_tables_are_those_that_can_be_made(
    short_manifest, tmp_path, monkeypatch, capsys, override, tables, hint
):
    """What one of them refuses is refused before the first is made."""
    ddim = {"ddim": short_manifest.columns["ddim"]}
    bare = dataclasses.replace(short_manifest, lines=())
    found = {
        "table1": bare,
        "table2": dataclasses.replace(bare, columns=ddim),
        "table3": short_manifest,
    }
    monkeypatch.setattr(manifests, "read_manifest", found.__getitem__)
    monkeypatch.setattr(table_command, "names", lambda scale: list(found))
    made = []
    monkeypatch.setattr(table_command, "make", lambda options: made.append(options.table) or 0)
    words = ["all", override, "--scale", "small", "--out", str(tmp_path), "--run"]
    code = table_command.main(words)
    assert (made, code) == (tables, 0 if tables else 2)
    assert hint in capsys.readouterr().err


def test_tables_come_by_number_and_where_the_scale_has_them():
    small = table_command.names("small")
    assert small == [f"table{number}" for number in range(1, len(small) + 1)] and len(small) >= 10
    assert table_command.names("digits") == small[:9]
    assert table_command.names("no scale") == small  # the first of them refuses it


@pytest.fixture
def three_tables(short_manifest, tmp_path, monkeypatch):
    """Three tables over a folder of results, the second of which is refused."""
    bare = dataclasses.replace(short_manifest, lines=())
    found = {f"table{n}": dataclasses.replace(bare, name=f"table{n}") for n in (1, 2, 3)}
    monkeypatch.setattr(manifests, "read_manifest", found.__getitem__)
    monkeypatch.setattr(table_command, "names", lambda scale: list(found))
    text_table = columns.text_table

    def refusing(manifest, *rest):
        if manifest.name == "table2":
            raise ValueError("rows of two protocols in one column: images is 1 in a\nand 2 in b")
        return text_table(manifest, *rest)

    monkeypatch.setattr(columns, "text_table", refusing)
    for cell in report_cells.cells_of(bare, "digits", tmp_path):
        save(cell, row_of(cell, 9.0))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "table2-digits.md").write_text("as it was")
    return tmp_path


def refused(out, err: str) -> None:
    """The other two are there, the second is as it was, and one line says why."""
    tables = {path.name: path.read_text() for path in (out / "tables").glob("table*")}
    assert {name.partition("-")[0] for name in tables} == {"table1", "table2", "table3"}
    assert tables.pop("table2-digits.md") == "as it was"
    assert len(tables) == 4 and all(
        "LSUN" in t or "FID" in t or "distance" in t for t in tables.values()
    )
    assert err == (
        "error: table2: rows of two protocols in one column: images is 1 in a and 2 in b\n"
    )


def test_a_table_without_a_row_is_not_written(short_manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(manifests, "read_manifest", lambda name: short_manifest)
    monkeypatch.setattr(table_command, "names", lambda scale: ["table1"])
    assert table_command.main(["all", "--scale", "digits", "--out", str(tmp_path)]) == 0
    assert "table1 has no row at scale digits yet" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())

    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "table1-digits.md").touch()
    assert table_command.main(["all", "--scale", "digits", "--out", str(tmp_path)]) == 0
    assert "of rows that are gone" in " ".join(capsys.readouterr().out.split())


def test_a_table_that_is_refused_keeps_no_other_from_being_made(three_tables, capsys):
    assert table_command.main(["all", "--scale", "digits", "--out", str(three_tables)]) == 2
    refused(three_tables, capsys.readouterr().err)


def test_everything_that_can_be_drawn_is_drawn_and_each_refusal_is_named(
    three_tables, monkeypatch, capsys
):
    drawn = []
    monkeypatch.setattr(figure_command.figure_manifest, "names", lambda: [])
    monkeypatch.setattr(claims_command, "show", lambda *told: drawn.append(told))
    assert render_command.main(["--scale", "digits", "--out", str(three_tables)]) == 2
    refused(three_tables, capsys.readouterr().err)
    assert drawn == [("digits", three_tables)]

    def damaged(*told):
        raise ValueError("claim s1000: rows of two protocols")

    monkeypatch.setattr(claims_command, "show", damaged)
    monkeypatch.setattr(table_command, "names", lambda scale: ["table1"])
    assert render_command.main(["--scale", "digits", "--out", str(three_tables)]) == 2
    assert capsys.readouterr().err == "error: claims: claim s1000: rows of two protocols\n"

    monkeypatch.setattr(claims_command, "show", lambda *told: None)
    assert render_command.main(["--scale", "digits", "--out", str(three_tables)]) == 0
    assert render_command.main(["--scale", "digits", "--out", str(three_tables / "no")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("codes, ended", [((2, 0, 0, 0), 2), ((0, 143), 143), ((1, 2, 0, 0), 2)])
def test_make_paper_does_all_that_it_can_unless_a_signal_ends_it(codes, ended, tmp_path):
    """Its commands, by a stand-in for Python that notes them and leaves with these codes."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    (tmp_path / "installed").touch()
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    python.write_text(
        f"""#!/bin/sh
echo "$3" >> {tmp_path}/called
exit $(sed -n "$(wc -l < {tmp_path}/called)p" {tmp_path}/codes)
"""
    )
    python.chmod(0o755)

    command = ["make", "-s", "-o", f"{tmp_path}/installed", "paper", f"VENV={tmp_path}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    called = (tmp_path / "called").read_text().split()
    assert called == ["table", "figure", "claims", "report"][: len(codes)]
    assert made.returncode == 2 and f"Error {ended}" in made.stderr  # make's own code is 2


@pytest.mark.parametrize("column", [None, "ddim"])
def test_the_footer_says_to_which_column_overrides_were_given(column, tmp_path, monkeypatch):
    noted = []
    monkeypatch.setattr(columns, "column_notes", lambda cells, prefix: [])
    monkeypatch.setattr(rendering, "write", lambda table, path: noted.extend(table.notes) or [])
    (tmp_path / "runs").mkdir()
    options = ["table10", "--scale", "small", "--out", str(tmp_path), "sampler.images=9"]
    table_command.main(options + ([] if column is None else ["--column", column]))

    where = "" if column is None else " in the column ddim alone"
    assert f"Asked for with sampler.images=9{where}." in noted


def test_overrides_show_in_the_footer_unless_they_are_paths(short_manifest, tmp_path):
    overrides = [
        "sampler.images=100",
        "data.cache=/a/b",
        "launcher.threads=1",
        "fit.report=best_of_5",
    ]
    assert report_cells.in_footer(overrides) == ["sampler.images=100", "fit.report=best_of_5"]
    cells = report_cells.cells_of(short_manifest, "digits", tmp_path, overrides)
    assert (
        "fit.report=best_of_5" not in cells[0].overrides
        and "fit.report=best_of_5" in cells[3].overrides
    )
    for cell in cells:
        save(cell, row_of(cell, 9.0, report=cell.config["fit"]["report"]))
    found = [report_cells.find(cell) for cell in cells]
    assert all(cell.done and cell.short for cell in found), "the experiment alone asks for more"
    text = rendering.markdown(
        columns.text_table(short_manifest, "digits", found, report_cells.in_footer(overrides))
    )
    assert "Asked for with sampler.images=100 fit.report=best_of_5." in text


def test_a_row_of_another_net_than_the_file_that_is_asked_for_is_stale(
    short_manifest, tmp_path, tiny_weights
):
    shipped = report_cells.cells_of(short_manifest, "digits", tmp_path)
    for cell in shipped:
        save(cell, row_of(cell, 9.0, weights=cell.contents["weights"]))
    assert not report_cells.find(shipped[0]).changes

    other = [f"model.weights={tiny_weights}"]
    (cell, *_) = report_cells.cells_of(short_manifest, "digits", tmp_path, other)
    (change,) = report_cells.find(cell).changes
    assert change.startswith(f"float weights: {shipped[0].contents['weights']} -> ")


def test_a_users_own_networks_are_loaded_to_be_compared(short_manifest, tmp_path, digits_elsewhere):
    """A checkpoint and a diffusers folder hold the shipped tensors, features are of another file."""
    weights, features = digits_elsewhere
    shipped = report_cells.cells_of(short_manifest, "digits", tmp_path)
    known = shipped[0].contents["weights"]
    asked = {"name": "digits", "weights": features_hash(shipped[0])}
    for cell in shipped:
        save(cell, row_of(cell, 9.0, weights=known, features=asked))

    def changes(*overrides):
        (cell, *_) = report_cells.cells_of(short_manifest, "digits", tmp_path, overrides)
        return report_cells.find(cell).changes

    assert changes(f"model.weights={weights[0]}") == []
    (change,) = changes(f"model.weights={weights[1]}")
    assert change.startswith(f"float weights: {known} -> ")
    (change,) = changes(f"eval.features.weights={features}")
    assert change.startswith(f"feature network: {asked['weights']} -> ")

    # The file is read again when it changes.
    weights[0].write_bytes(weights[1].read_bytes())
    assert len(changes(f"model.weights={weights[0]}")) == 1
    for key, value in (
        ("model.weights", "no/where.pt"),
        ("eval.features.weights", "no.safetensors"),
    ):
        with pytest.raises((ValueError, OSError), match=f"{value}.*no"):
            changes(f"{key}={value}")


def test_a_row_of_other_images_than_a_user_names_is_stale(short_manifest, tmp_path):
    """The run has the same name: images of two folders differ in nothing else."""
    folders = [tmp_path / name for name in ("a", "b")]
    for shade, folder in enumerate(folders):
        folder.mkdir()
        for number in range(4):
            Image.new("L", (8, 8), 40 * number + 10 * shade).save(folder / f"{number}.png")

    def cells_with(folder):
        own = ["data=image_folder", f"data.source.path={folder}", f"data.cache={tmp_path / 'c'}"]
        own.append("data.source.channels=1")
        return report_cells.cells_of(short_manifest, "digits", tmp_path / "out", own)

    cells = cells_with(folders[0])
    contents = [cells_with(folder)[0].contents["reference.content"] for folder in folders]
    for cell in cells:
        nets = {"weights": cell.contents["weights"], "reference": {"content": contents[0]}}
        save(cell, row_of(cell, 9.0, **nets))
    assert all(not report_cells.find(cell).changes for cell in cells)

    for cell in cells_with(folders[1]):
        (change,) = report_cells.find(cell).changes
        assert change == f"real images: {contents[0]} -> {contents[1]}"
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        cells_with(tmp_path / "nowhere")


def features_hash(cell):
    return jobs.features_of(cell.config).weights_hash


@pytest.fixture
def digits_elsewhere(tmp_path):
    """The shipped digits' tensors and others as plain checkpoints, and another file of features."""
    shipped = tensor_files.read_tensors(assets.weights("shipped:digits")).tensors
    files_of = [tmp_path / "same.ckpt", tmp_path / "other.ckpt"]
    torch.save(shipped, files_of[0])
    torch.save({name: value + 0.01 for name, value in shipped.items()}, files_of[1])

    of_features = assets.weights("shipped:digits_features")
    found = tensor_files.read_tensors(of_features)
    changed = {name: value + 0.01 for name, value in found.tensors.items()}
    tensor_files.write_tensors(tmp_path / "features.safetensors", changed, found.metadata)
    return files_of, tmp_path / "features.safetensors"


def test_a_command_gives_its_exit_code():
    assert command.call([sys.executable, "-c", "raise SystemExit(7)"]) == 7
