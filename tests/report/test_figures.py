"""Figures and the page of results: drawn from numbers alone, to the same bytes, and fit to be read."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from tdq_exp.analysis import samples
from tdq_exp.commands import figure as figure_command
from tdq_exp.commands import figure_data
from tdq_exp.commands import report as report_command
from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.report import (
    charts,
    drawings,
    figure_manifest,
    figure_numbers,
    page_figures,
    page_markdown,
    page_rows,
    paired_rank,
)
from tdq_exp.runtime import figures, files
from tdq_exp.runtime.refusals import Refusals

T = [0, 500, 999]
SLOW = ("activations", "layers", "ranges")  # drawn once: all share one way to be written


LSQ_LINES = {"LSQ W4A4": "lsq", "LSQ + TDQ W4A4": "lsq_tdq"}
LINES = {"encoding": {"TDQ (4 layers) W4A4": "lsq_tdq", "TDQ (raw t) W4A4": "lsq_tdq_raw_t"}}


def record_of(name: str) -> dict:
    """Return numbers of a figure, small and made up."""
    kind = figure_manifest.read_figure(name).kind
    column = {"model": "digits", "missing": ["NIPQ W4A4"]}
    about = {"images": 2, "steps": 3, "seed": 0, "commit": "abc", "machine": "a <machine>"}
    runs = {}
    for label, run_name in LINES.get(name, LSQ_LINES).items():
        run = {"run": f"digits_w4a4_{run_name}_release", "fit": "f" * 16}
        if kind == "errors":
            run |= {"truncation": [0.1, 0.01, 0.2], "rounding": [0.01] * 3, "quantizers": 2}
        elif kind == "ranges":
            values = {"low": [-1, -2, -3], "q01": [-0.5] * 3, "q99": [0.5] * 3, "high": [1, 2, 3]}
            run["quantizers"] = {
                "conv_in.input": {**values, "grid_low": [-2] * 3, "grid_high": [2] * 3, "bits": 4}
            }
        elif kind == "layers":
            names = ("z.input", "a.input")
            run |= {"sqnr": {n: [10.0, 20.0, 30.0] for n in names}, "together": 0.1}
            run |= {"errors": dict.fromkeys(names, 0.01), "shares": dict.fromkeys(names, 0.5)}
        elif kind == "grids":
            run |= {"steps": 50, "size": 4, "png": samples.strip(np.zeros((3, 4, 4, 1), np.uint8))}
        runs[label] = run

    if kind == "activations":
        tensors = {name: {"deviation": 0.6, "range": 0.1, "change": 0.2} for name in ("z", "a")}
        shares = {"deviation > 0.5": 1.0, "deviation > 0.7": 0.0}
        boxes = {"t": T, "tensors": {name: [[-3, -2, -1, 0, 1, 2, 3]] * 3 for name in tensors}}
        column |= {
            "tensors": tensors,
            "boxes": boxes,
            "held": dict.fromkeys(("nothing", "t", "x_t"), shares),
        }
    elif kind == "steps":
        column |= {
            "label": "distance",
            "lines": {"float": {}, "LSQ W4A4": {"10": {"distance": 3.0}, "100": {"distance": 1.0}}},
        }
    elif kind == "length":
        point = {"distance": 3.0, "half_width": 0.5, "validation": [[1, 0.5], [2, 0.25]]}
        column |= {
            "label": "distance",
            "lines": {"float": {"0": {**point, "validation": []}}, "LSQ W4A4": {"2": point}},
        }
    else:
        column |= {"t": T, "runs": runs}
    return {"figure": name, "scale": "digits", "columns": {"ddim": column}, "about": about}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return a folder of results with a table, the claims, every figure, a fit and a row."""
    out = tmp_path_factory.mktemp("results")
    (out / "tables").mkdir()
    (out / "tables" / "table1-digits.md").write_text(
        "# Table 1, scale digits\n\n| method | bits | distance |\n|---|---|---:|\n"
        "| LSQ <1> | 4/4 | missing |\n| a \\| b | 3/3 | 1.50 |\n\n- A note of `code`.\n"
        "- Of 3 cells 2 missing; 0 stale (\u2020: x).\n"
    )
    (out / "tables" / "claims-digits.md").write_text(
        "# Claims\n\n| claim | verdict |\n|---|---|\n| order | holds |\n"
    )
    chart = Figure(figsize=(1, 1))
    chart.subplots()
    figures.save_figure(chart, out / "figures" / "table1-digits.svg")
    for name in figure_manifest.names():
        figure_numbers.write(figure_numbers.numbers_file(name, "digits", out), record_of(name))

    sampling = {"images": 10, "steps": 50, "batch": 5}
    protocol = {"scale": "digits", "sampling": sampling, "ptq": {"steps": 20}}
    config = {
        "protocol": protocol, "label": "", "fit": {"kind": "qat"}, "model": {"label": "digits"},
        "sampler": {**sampling, "steps": 10, "seed": 1, "engine": "fake"},
        "method": {"label": "lsq"}, "tdq": {"label": ""},
    }  # fmt: skip
    row = {
        "name": "digits_w4a4_lsq", "sample": "ddim10_n10_seed1", "images": 10, "seed": 0, "config": config,
        "metrics": {"fid": 1.234}, "fingerprints": {"fit": "f", "sample": "s", "measure": "m"},
        "environment": {"commit": "c", "machine": "a machine"}, "seconds": {"fit": 1.0, "sample": 2.0},
        "features": {"name": "digits"}, "paired": {"relative_l2": 0.5, "psnr": 20.0},
    }  # fmt: skip
    run = out / "runs" / "digits_w4a4_lsq" / "seed0"
    (run / row["sample"]).mkdir(parents=True)
    (run / row["sample"] / "metrics.json").write_text(json.dumps({"rows": [row]}))
    fit = {"name": row["name"], "config": config, "facts": {"validation": [[1, 0.5], [2, 0.25]]}}
    (run / "fit.json").write_text(json.dumps(fit))
    return out


def test_every_figure_has_a_manifest_that_chooses_lines():
    assert {"figure2", "figure3", "figure8", "figure9", "grids", "layers"} <= set(
        figure_manifest.names()
    )
    for name in figure_manifest.names():
        figure = figure_manifest.read_figure(name)
        lines = figure.lines_of().lines
        assert len(lines) == len(figure.methods) * len(figure.bits)
    assert figure_manifest.read_figure("3") == figure_manifest.read_figure("figure3")


@pytest.mark.parametrize("name", figure_manifest.names())
def test_a_figure_asks_for_one_seed_of_each_line(name, tmp_path):
    cells = figure_manifest.cells_of_figure(figure_manifest.read_figure(name), "small", tmp_path)
    shown = [(cell.run, cell.config["sampler"]["steps"]) for cell in cells]
    assert len(set(shown)) == len(shown)
    assert {(cell.config["seed"], cell.config["sampler"]["seed"]) for cell in cells} == {(0, 0)}


def test_a_wrong_manifest_says_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such figure"):
        figure_manifest.read_figure("4")

    monkeypatch.setattr(figure_manifest, "_folder", lambda: tmp_path)
    for text, message in (
        ("kind: x", "kind: x"),
        ("kind: grids\nmethods: [LSQ+TDQ]", "LSQ\\+TDQ: no line"),
    ):
        (tmp_path / "bad.yaml").write_text(f"title: t\ntable: table1\n{text}\n")
        with pytest.raises(ValueError, match=message):
            figure_manifest.read_figure("bad").lines_of()


def test_figure_8_asks_for_every_number_of_steps(tmp_path):
    figure = figure_manifest.read_figure("figure8")
    assert figure.sampling_steps == (100, 50, 20, 10)
    short = dataclasses.replace(figure, sampling_steps=(50, 10), methods=("LSQ",), bits=("4/4",))
    cells = figure_manifest.cells_of_figure(short, "digits", tmp_path)
    assert [cell.config["sampler"]["steps"] for cell in cells] == [50, 50, 10, 10]

    with pytest.raises(ValueError, match="sampler.steps=30: figure8 names"):
        figure_manifest.cells_of_figure(short, "digits", tmp_path, ["sampler.steps=30"])

    record = figure_numbers.distances(short, "digits", cells)
    assert list(record["columns"]["ddim"]["lines"]) == ["float", "LSQ W4A4"]
    assert len(record["columns"]["ddim"]["missing"]) == 4


def test_the_figure_over_updates_asks_for_longer_fits_beside_the_protocols(tmp_path):
    figure = figure_manifest.read_figure("length")
    short = dataclasses.replace(figure, methods=("LSQ",), updates={"digits": [600]})
    cells = figure_manifest.cells_of_figure(short, "digits", tmp_path)
    assert [cell.run for cell in cells] == [
        "digits_fp",
        "digits_w4a4_lsq_release",
        "digits_w4a4_lsq_release_u600",
    ]
    assert [figure_numbers._updates(cell) for cell in cells] == [0, 300, 600]

    # What the row and the fit say is what is drawn.
    row = {
        "name": "n", "images": 5, "seed": 0, "metrics": {"fid": 2.0}, "half_sampling": {"fid": 0.25},
        "fingerprints": {"measure": "m"}, "environment": {"commit": "c"}, "features": {"name": "f"},
    }  # fmt: skip
    row |= {"config": cells[2].config, **cells[2].contents}
    longest = dataclasses.replace(cells[2], row=row, images=5, folder=tmp_path)
    (tmp_path / "fit.json").write_text(json.dumps({"facts": {"validation": [[600, 0.5]]}}))
    record = figure_numbers.distances(short, "digits", [*cells[:2], longest])
    (column,) = record["columns"].values()
    assert column["missing"] == ["float, 0 updates", "LSQ W4A4, 300 updates"]
    point = column["lines"]["LSQ W4A4"]["600"]
    assert point["half_width"] == 0.5 and point["validation"] == [[600, 0.5]]


@pytest.mark.parametrize(
    "first, found", [("sampler.steps=3", True), ("fit.updates=2", False), ("tdq=temporal", False)]
)
def test_a_figure_takes_the_fit_and_the_sampler_that_its_line_asks_for(
    first, found, tmp_path, monkeypatch, capsys
):
    """A fit's record holds the sampler of the first command, whatever it was."""
    grids = dataclasses.replace(figure_manifest.read_figure("grids"), methods=("LSQ",))
    _, cell = figure_manifest.cells_of_figure(grids, "digits", tmp_path)
    choices = [option for option in cell.overrides if not option.startswith(first.split("=")[0])]
    recorded = jobs.build(compose([*choices, first]), source=False)
    monkeypatch.setattr(figure_data, "load", lambda folder: (recorded, torch.nn.Identity()))
    files.write_json(cell.folder / "fit.json", {"fingerprint": "f"})
    (cell.folder / "baked.safetensors").touch()

    options = SimpleNamespace(nets=tmp_path / "nets", run=False)
    network = figure_data._network(cell, options, None)
    assert (network is not None) == found
    assert ("stale" in capsys.readouterr().out) != found
    if network is not None:
        assert network.job.sampling.steps == network.job.sampler.steps == 50


@pytest.mark.parametrize(
    "group, changed, said",
    [
        ("sampler", {"eta": 1.0, "spacing": "quad"}, "sampler.eta=1.0 sampler.spacing=quad"),
        (
            "sampler",
            {"method": {"_target_": "tdq_exp.models.Ddpm"}},
            "digits_w4a4_lsq sampler=ddpm",
        ),
        ("fit", {"kind": "ptq", "steps": 21}, "other numbers than its protocol"),
        ("fit", {"report": "best_of_5"}, " fit.report=best_of_5"),
        ("data", {"limit": 32}, " data.limit=32"),
        ("eval", {"reference_images": 16}, " eval.reference_images=16"),
        ("model", {"ema": False}, " model.ema=false"),
        ("sampler", {"label": "few"}, "its set has a name of its own"),
    ],
)
def test_the_command_of_a_row_says_all_that_is_unusual(group, changed, said, results):
    (row,) = page_rows.read_rows(results)
    config = {**row["config"], group: {**row["config"].get(group, {}), **changed}}
    assert said in page_rows.command_of({**row, "config": config})
    assert said not in page_rows.command_of(row)


def test_a_row_of_other_metrics_has_no_distance_on_the_page(results):
    (row,) = page_rows.read_rows(results)
    text = "".join(page_rows.lines([{**row, "metrics": {"isc_mean": 2.0}}]))
    assert "<td class=number>0, 1</td><td class=number>-</td>" in text


@pytest.mark.parametrize("name", figure_manifest.names())
def test_the_same_numbers_give_the_same_picture(name, results, tmp_path):
    figure = figure_manifest.read_figure(name)
    file = figure_numbers.numbers_file(name, "digits", results)
    record = json.loads(file.read_text())
    assert record == record_of(name)
    assert json.dumps(record) == json.dumps(record_of(name))  # in their own order, too

    picture = drawings.draw(figure, record, tmp_path / "a.png")
    assert np.asarray(Image.open(picture).convert("L")).std() > 5  # there is something on it
    if figure.kind not in SLOW:
        again = drawings.draw(figure, record, tmp_path / "b.png")
        assert again.read_bytes() == picture.read_bytes()
        assert len({drawings.svg(figure, record, "name") for _ in range(2)}) == 1


def test_numbers_of_other_runs_than_the_manifest_asks_for_are_refused(tmp_path, capsys):
    record = record_of("figure3")
    record["columns"]["ddim"]["runs"]["LSQ W4A4"]["run"] = "digits_w4a4_lsq"
    figure_numbers.write(figure_numbers.numbers_file("figure3", "digits", tmp_path), record)

    assert figure_command.main(["3", "--scale", "digits", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "ddim, LSQ W4A4 is of digits_w4a4_lsq, asked for is digits_w4a4_lsq_release" in said
    assert "--measure" in said and not (tmp_path / "figures" / "figure3-digits.png").exists()

    # The page has the other figures, and says so in the place of this one.
    refusals = Refusals()
    page = "".join(page_figures.lines(tmp_path, "digits", refusals))
    (line,) = refusals.lines
    assert "figure3 at scale digits" in line and "asked for is digits_w4a4_lsq_release" in line
    assert "its numbers are not those asked for" in page and "<svg" not in page


def test_of_all_figures_those_that_can_be_drawn_are_drawn(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(figure_command.drawings, "draw", lambda *told: drawn.append(told[-1].name))
    for name, run in (("figure3", "digits_w4a4_lsq"), ("figure9", None), ("layers", "other")):
        record = record_of(name)
        if run:
            record["columns"]["ddim"]["runs"]["LSQ W4A4"]["run"] = run
        figure_numbers.write(figure_numbers.numbers_file(name, "digits", tmp_path), record)

    assert figure_command.main(["all", "--scale", "digits", "--out", str(tmp_path)]) == 2
    assert drawn == ["figure9-digits.png"]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: figure3: ") and second.startswith("error: layers: ")
    assert "asked for is digits_w4a4_lsq_release" in first


def test_numbers_that_are_not_there_are_asked_for(tmp_path, capsys):
    assert figure_command.main(["3", "--scale", "digits", "--out", str(tmp_path)]) == 2
    assert "--run" in capsys.readouterr().err


def test_a_figure_is_drawn_without_a_network(results, capsys):
    assert figure_command.main(["3", "--scale", "digits", "--out", str(results)]) == 0
    assert (results / "figures" / "figure3-digits.png").exists()
    assert "missing NIPQ W4A4" in capsys.readouterr().out


class Page(HTMLParser):
    """The elements of a page, and whether every one that is opened is closed."""

    VOID = {"meta", "img", "link", "br", "path", "use", "rect", "image"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def text(results):
    assert report_command.main(["--out", str(results)]) == 0
    return (results / "report.html").read_text()


def test_the_page_is_whole_and_needs_nothing_else(results, text):
    parsed = Page(text)
    assert parsed.open == []

    loaded = [a.get("src", "") for a in parsed.all("img")] + [
        a.get("href", "") for a in parsed.all("link")
    ]
    loaded += [a.get("xlink:href", "") for tag in ("image", "use") for a in parsed.all(tag)]
    assert loaded and all(target.startswith(("data:", "#")) for target in loaded)
    assert not parsed.all("script") and "url(http" not in text and "@import" not in text
    assert "/tmp" not in text.replace(str(results), "")


def test_the_page_can_be_read_without_seeing_it(text):
    parsed = Page(text)
    identifiers = [a["id"] for _, a in parsed.elements if "id" in a]
    assert [name for name in identifiers if identifiers.count(name) > 1] == []
    targets = [a["href"][1:] for a in parsed.all("a") if a["href"].startswith("#")]
    assert targets and set(targets) <= set(identifiers)

    assert parsed.all("html") == [{"lang": "en"}] and len(parsed.all("h1")) == 1
    assert all(image.get("alt") for image in parsed.all("img"))
    assert all(a.get("role") == "img" and a.get("aria-label") for a in parsed.all("svg"))
    assert all(cell.get("scope") in ("row", "col") for cell in parsed.all("th"))
    assert len(parsed.all("caption")) == len(parsed.all("table"))
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text

    # Headings leave out no level.
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_the_page_says_what_is_missing_and_how_a_number_was_made(text):
    assert "Missing: digits NIPQ W4A4" in text and 'class="number missing">missing<' in text
    assert (
        'class="holds">holds<' in text and "LSQ &lt;1&gt;" in text and "a &lt;machine&gt;" in text
    )
    assert (
        "python -m tdq_exp.run +experiment=digits_w4a4_lsq sampler.seed=1 sampler.steps=10<" in text
    )
    assert "1.23" in text and "make figure3 SCALE=digits" in text


def test_a_damaged_record_keeps_nothing_else_from_the_page(results, tmp_path, monkeypatch, capsys):
    (file,) = results.glob("runs/*/seed*/*/metrics.json")
    whole, damaged = file.parents[1], tmp_path / "runs" / "damaged" / "seed0"
    for folder in (damaged, tmp_path / "runs" / "whole" / "seed0"):
        shutil.copytree(whole, folder)
    for broken in (damaged / file.parent.name / file.name, damaged / "fit.json"):
        broken.write_text(broken.read_text()[:-20])

    refusals = Refusals()
    assert len(page_rows.read_rows(tmp_path, refusals)) == 1
    curves = page_figures.training_curves(tmp_path, "digits", refusals)
    assert curves == page_figures.training_curves(results, "digits", Refusals()) != {}
    assert len(refusals.lines) == 2
    assert all(line.startswith("runs/damaged/seed0") for line in refusals.lines), refusals.lines
    with pytest.raises(ValueError, match="damaged"):
        page_rows.read_rows(tmp_path)

    # The page is written all the same, and the command says what it lacks.
    def html(out, scales, noted):
        noted.add("figure3", "asked for is another run")
        return "page"

    monkeypatch.setattr(report_command.page, "html", html)
    assert report_command.main(["--out", str(tmp_path)]) == 2
    assert (tmp_path / "report.html").read_text() == "page"
    assert capsys.readouterr().err == "error: figure3: asked for is another run\n"


def test_nothing_to_show_is_refused(tmp_path, capsys):
    assert report_command.main(["--out", str(tmp_path)]) == 2
    assert "holds no tables" in capsys.readouterr().err


def test_our_markdown_becomes_html():
    text = "two\nlines with [x](y.md)\n\n- first\n- protocol\n- \u2248: a tie\n"
    assert list(page_markdown.html_lines(text, "caption")) == [
        '<p>two lines with <a href="y.md">x</a></p>',
        '<ul class="notes">', "<li>first</li>", "<li>\u2248: a tie</li>", "</ul>",
        "<details><summary>How these numbers were made</summary>",
        '<ul class="notes">', "<li>protocol</li>", "</ul>", "</details>",
    ]  # fmt: skip
    assert page_markdown.cells_of(r"| a \| b | - |") == ["a | b", "-"]


def test_the_page_begins_with_the_verdicts_and_counts_the_cells(text):
    top = text[: text.index('id="digits"')]
    assert ">At a glance<" in top and 'class="holds">holds<' in top
    assert "1 of 3 cells of its tables have a row" in top


def test_a_chart_of_a_table_takes_the_colours_of_the_page(text):
    chart = re.search(r'<svg[^>]*aria-label="Table 1.*?</svg>', text, re.DOTALL)[0]
    assert "currentColor" in chart and "#000000" not in chart and "#ffffff" not in chart


def row_with(distance, relative_l2, steps=50):
    """Return a row of both distances."""
    config = {
        "model": {"label": "digits"}, "method": {"label": "lsq"}, "tdq": {"label": "tdq"},
        "sampler": {"steps": steps},
    }  # fmt: skip
    return {
        "name": "run", "seed": 0, "sample": "s", "features": {"name": "digits"}, "config": config,
        "metrics": {"fid": distance}, "paired": {"relative_l2": relative_l2, "psnr": -relative_l2},
    }  # fmt: skip


def test_ranks_of_both_distances_are_compared_within_one_protocol():
    numbers = [1.0, 4.0, 2.0, 2.0, 9.0, 3.0]
    rows = [row_with(x, x**3) for x in numbers] + [row_with(x, -x, steps=10) for x in numbers[:4]]
    rows.append({**row_with(1, 1), "paired": None})
    few, many = paired_rank.groups_of(rows)

    assert (many.steps, len(many.points)) == (50, 6) and [p.distance for p in many.points][:2] == [
        1,
        2,
    ]
    assert many.by_l2 == pytest.approx(1.0) == many.by_psnr
    assert few.by_l2 is None and paired_rank.summary([few])[0][1:] == [
        "4",
        "can't tell",
        "-",
        "can't tell",
    ]

    # Fewer images give larger distances, and other references other ones: no ranks go across them.
    fewer = [{**row_with(x + 50, -x), "images": 10} for x in numbers]
    two = paired_rank.groups_of([*({**row, "images": 90} for row in rows[:6]), *fewer])
    assert [group.by_l2 for group in two] == pytest.approx([-1.0, 1.0])
    assert [group.name.partition("steps")[2] for group in two] == [", images 10", ", images 90"]
    other = [{**row, "reference": {"content": "other"}} for row in rows[:6]]
    assert [len(group.points) for group in paired_rank.groups_of(rows[:6] + other)] == [6, 6]

    a = np.random.default_rng(0).integers(0, 5, (2, 40)).tolist()
    assert paired_rank.rank_correlation(*a) == pytest.approx(stats.spearmanr(*a).statistic)
    low, high = paired_rank.bootstrap(*a)
    assert low < paired_rank.rank_correlation(*a) < high
    assert "## digits, digits features, 50 steps" in "\n".join(paired_rank.markdown([few, many]))


@pytest.mark.parametrize("timed", [False, True])
def test_step_sizes_are_drawn_with_their_zero_points(timed, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save_both", lambda figure, path: drawn.append(figure))
    length = 80 if timed else 1
    tables = {
        f"layer{i}_quantizer": (torch.linspace(1 + i, 2, length), torch.full((length,), float(i)))
        for i in range(3)
    }
    figures.intervals_over_time(tables, tmp_path / "x.png", "title")

    (figure,) = drawn
    labels = " ".join(axis.get_xlabel() + axis.get_ylabel() for axis in figure.axes)
    assert "step size" in labels and "zero point" in labels
    if timed:
        legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert any(t.startswith("thin") for t in legend) and any(
            t.startswith("thick") for t in legend
        )
    else:
        assert [bar.get_width() for bar in figure.axes[0].patches] == [1.0, 2.0, 3.0]
        assert "time step" not in labels


def test_a_damaged_picture_is_not_whole(tmp_path):
    figure = Figure(figsize=(1, 1))
    for name in ("chart.svg", "chart.png"):
        file = tmp_path / name
        figures.save_figure(figure, file)
        assert figures.is_whole(file)

        content = file.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        for damaged in (flipped, content[:middle], b"", b"{}"):
            file.write_bytes(damaged)
            assert not figures.is_whole(file)

        file.unlink()
        os.mkfifo(file)
        assert not figures.is_whole(file)


def test_of_many_runs_the_curves_of_table_1_are_drawn():
    """A panel of forty curves has a legend and no room for them."""
    runs = [f"m_w4a4_{name}" for name in ("lsq_release", "pact_tdq_release", "lsq", "lsq_edge8")]
    runs += ["m_w3a3_lsq_release seed 1", "m_w3a3_lsq_release", "m_w3a3_lsq_tdq_release", "m_fp"]
    drawn = charts.headline(runs)
    assert drawn == [
        "m_w4a4_lsq_release", "m_w3a3_lsq_release", "m_w3a3_lsq_tdq_release", "m_fp",
    ]  # fmt: skip
    assert charts.headline(["m_w4a4_lsq", "m_fp"]) == ["m_w4a4_lsq", "m_fp"]

    svg = charts.training_svg({run: [[1, 0.5], [2, 0.4]] for run in drawn}, "curves")
    assert svg.count("lsq_release") == 1, "one legend for all panels"
