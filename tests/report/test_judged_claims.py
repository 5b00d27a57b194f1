"""Claims: the verdict of a rule on distances that are written down here."""

import dataclasses
import json
from pathlib import Path

import pytest

from tdq_exp.config import assets
from tdq_exp.report import cells as report_cells
from tdq_exp.report import judged_claims, spread
from tdq_exp.report.manifest import read_manifest
from tdq_exp.report.second import fixed
from tdq_exp.runtime import files


def comparison(ours, theirs, float_model=(10.0, 11.0), column="ddim"):
    """Distances -> a comparison of lines with a row for each; the float model's spread is 1."""

    def cells(distances):
        base = report_cells.Cell(column, None, "run", (), {}, Path("f"), "s", 100)
        rows = [{"images": 100, "metrics": {"fid": fid}} for fid in distances]
        return [dataclasses.replace(base, row=row) for row in rows]

    return judged_claims.Comparison(
        column, "w4a4", ("a", "b"), cells(ours), cells(theirs), cells(float_model)
    )


@pytest.mark.parametrize(
    "rule, ours, theirs, verdict",
    [
        ("smaller", [12], [13.5], "holds"),
        ("smaller", [12], [12.5], "can't tell"),
        ("smaller", [13.5], [12], "does not hold"),
        ("smaller", [12, 14], [14], "can't tell"),  # seeds 2 apart, means 1
        ("smaller", [12], [], "missing"),
        ("no_larger", [12.9], [12], "holds"),
        ("no_larger", [13.1], [12], "does not hold"),
        ("no_larger", [9], [12], "holds"),
        ("no_larger", [3.9], [3.5], "can't tell"),  # a spread of more than a quarter
        ("no_larger", [1.5], [3.5], "holds"),
    ],
)
def test_a_rule_looks_beyond_the_spread(rule, ours, theirs, verdict):
    assert judged_claims._verdict(rule, comparison(ours, theirs)) == verdict


def test_a_line_with_one_training_seed_varies_as_the_columns_others_do():
    """12 and 13.5 differ by more than the float model's seeds; not if a seed may change a tenth."""
    alone = comparison([12], [13.5])
    trained = [
        dataclasses.replace(cell, config={"method": {"quantized": True}}) for cell in alone.theirs
    ]
    told = dataclasses.replace(alone, theirs=trained, over_seeds=0.1)
    assert judged_claims._verdict("smaller", told) == "holds"
    assert (
        judged_claims._verdict("smaller", dataclasses.replace(told, over_seeds=0.12))
        == "can't tell"
    )

    # A float model's seeds are those of its sampling.
    float_too = dataclasses.replace(alone, over_seeds=0.12)
    assert judged_claims._verdict("smaller", float_too) == "holds"


def test_short_rows_tell_no_spread():
    """Fewer images vary more: 12 and 13.5 differ, whatever short rows of other lines say."""
    told = comparison([12], [13.5], [10.0, 10.1])
    short = [
        dataclasses.replace(cell, row={"images": 10, "metrics": {"fid": fid}})
        for cell, fid in zip(told.float_model, (30.0, 60.0), strict=True)
    ]
    halves = [
        dataclasses.replace(cell, row={**cell.row, "half_sampling": {"fid": 0.1}})
        for cell in told.ours
    ]
    other = dataclasses.replace(told, ours=halves, float_model=short)
    assert other.difference == pytest.approx((-1.5, 0.4))

    trained = [dataclasses.replace(c, config={"method": {"quantized": True}}) for c in short]
    assert spread.over_training_seeds([trained]) == 0.0


def test_without_any_spread_nothing_is_told():
    assert judged_claims._verdict("smaller", comparison([1], [100], [10.0])) == "can't tell"


def test_gains_are_relative_and_so_are_their_spreads():
    first, second = comparison([10], [20]), comparison([90], [100], column="ldm")
    assert first.gain == (0.5, 0.05) and second.gain == (0.1, 0.01)
    assert judged_claims._less_gain(first, second) == "holds"
    assert judged_claims._less_gain(second, first) == "does not hold"
    assert judged_claims._less_gain(first, comparison([11], [20])) == "can't tell"
    assert judged_claims._less_gain(first, comparison([], [20])) == "missing"


def test_a_claim_fails_with_one_comparison_and_holds_with_all():
    (claim, *_) = judged_claims.read_claims()
    judged = [
        judged_claims.Judged(claim, [], verdicts).verdict
        for verdicts in (
            ["holds"] * 2,
            ["holds", "can't tell"],
            ["holds", "missing"],
            ["holds", "does not hold"],
            [],
        )
    ]
    assert judged == ["holds", "can't tell", "can't tell", "does not hold", "can't tell"]


def test_every_claim_asks_for_lines_of_the_tables():
    """What a claim compares is run by a table, unless it samples with other steps."""
    asked = {
        json.dumps(manifest.choices("small", column, line), sort_keys=True)
        for number in range(1, 11)
        for manifest in [read_manifest(f"table{number}")]
        for column in manifest.at("small")
        for line in manifest.lines
    }
    models = read_manifest("table1").columns
    for claim in judged_claims.read_claims():
        for column in claim.columns:
            for at in claim.at:
                for line in (claim.ours, *claim.theirs):
                    if line.get("method") == "fp":
                        continue
                    choices = {**models[column].scales["small"], **claim.shared, **at, **line}
                    choices = {k: v for k, v in choices.items() if k not in ("label", "overrides")}
                    assert json.dumps(choices, sort_keys=True) in asked, (claim.name, choices)


def test_a_gain_in_a_model_that_the_scale_lacks_is_not_told(tmp_path):
    claim = next(claim for claim in judged_claims.read_claims() if claim.rule == "less_gain")
    (judged,) = judged_claims.judge([claim], "digits", tmp_path)
    assert judged.verdicts == [] and judged.verdict == "can't tell"
    assert "| latents |" in judged_claims.markdown([judged], "digits", tmp_path)


def test_each_pair_of_columns_has_its_own_verdict_and_spreads_the_unit_of_gains(monkeypatch):
    for name in ("_side", "_where"):  # they look at whole rows
        monkeypatch.setattr(judged_claims, name, lambda *told: "")
    claim = next(claim for claim in judged_claims.read_claims() if claim.rule == "less_gain")
    pixels = [comparison([10], [20]), comparison([90], [100])]
    latents = [comparison([90], [100], column="ldm"), comparison([10], [20], column="ldm")]
    both = [*pixels, *latents]
    verdicts = judged_claims._verdicts(claim, both)
    assert verdicts == ["holds", "does not hold"]

    lines = judged_claims._comparison_lines(judged_claims.Judged(claim, both, verdicts), Path("."))
    told = [[text.strip() for text in line.strip("|").split("|")][4:7] for line in lines[2:]]
    assert told == [
        ["+50.0 %", "5.0 %", "holds"],
        ["+10.0 %", "1.0 %", "does not hold"],
        ["+10.0 %", "1.0 %", "holds"],
        ["+50.0 %", "5.0 %", "does not hold"],
    ]


@pytest.mark.parametrize(
    ("number", "sign", "text"),
    [(-0.004, "", "0.00"), (-0.004, "+", "+0.00"), (-0.006, "+", "-0.01"), (0.006, "+", "+0.01")],
)
def test_zero_is_not_negative(number, sign, text):
    assert fixed(number, 2, sign) == text


def test_an_unknown_rule_is_refused(tmp_path, monkeypatch):
    text = (assets.configs() / "claims.yaml").read_text().replace("no_larger", "nearly")
    (tmp_path / "claims.yaml").write_text(text)
    monkeypatch.setattr(assets, "configs", lambda: tmp_path)
    with pytest.raises(ValueError, match="no-loss: rule='nearly'"):
        judged_claims.read_claims()


def test_the_page_says_what_holds_and_where_the_rows_lie(tmp_path):
    claim = next(claim for claim in judged_claims.read_claims() if claim.name == "s1000")
    (judged,) = judged_claims.judge([claim], "digits", tmp_path)
    (one,) = judged.comparisons
    assert judged.verdict == "can't tell"

    for cells, fid in ((one.ours, 2.0), (one.theirs, 3.0), (one.float_model, 1.0)):
        for number, cell in enumerate(cells[:2]):
            row = {
                "name": "run", "fingerprints": {}, "features": {"name": "digits"}, "config": cell.config, "images": 1000, "report": "last",
                "metrics": {"fid": fid + number / 10}, "weights": cell.contents["weights"],
            }  # fmt: skip
            path = cell.folder / cell.sample / "metrics.json"
            files.write_json(path, {"rows": [files.sealed(row)]})

    judged = judged_claims.judge([claim], "digits", tmp_path)
    page = judged_claims.markdown(judged, "digits", tmp_path)
    assert "## s1000: holds" in page and "| TDQ 2.05 (2 seeds) | S1000 3.05 (2 seeds) |" in page
    assert "| -1.00 | 0.1 | holds |" in page
    assert "`runs/digits_w4a4_lsq_s1000_release/seed1/ddim50_n1000`" in page

    # A row of other weights stands there, and its verdict says what it is of.
    assert "stale" not in page
    (one,) = judged[0].comparisons
    stale = [dataclasses.replace(cell, contents={"weights": "others"}) for cell in one.ours]
    of_stale = dataclasses.replace(one, ours=stale)
    page = judged_claims.markdown(
        [dataclasses.replace(judged[0], comparisons=[of_stale])], "digits", tmp_path
    )
    assert "| s1000 | holds | 1 holds, 1 of stale rows |" in page

    # Distances to other images, or of other features, are no comparison.
    path = one.ours[0].folder / one.ours[0].sample / "metrics.json"
    row = files.read_json(path)["rows"][0]
    files.write_json(path, {"rows": [files.sealed({**row, "reference": {"content": "other"}})]})
    with pytest.raises(ValueError, match="claim s1000: rows of two protocols.*reference.content"):
        judged_claims.judge([claim], "digits", tmp_path)
