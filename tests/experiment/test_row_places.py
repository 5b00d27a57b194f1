"""Where a row was made, for readers."""

from tdq_exp.experiment.places import environments, machine_of
from tdq_exp.report import page_rows

HERE = {"machine": "Linux, 2 cores", "commit": "a"}
THERE = {"machine": "Linux, 16 cores", "accelerator": "NVIDIA H200", "commit": "b"}


def test_a_row_names_every_machine_once():
    assert environments({"environment": HERE}) == [HERE]
    row = {"environment": HERE, "fitted_on": THERE, "sampled_on": [THERE, HERE]}
    assert environments(row) == [HERE, THERE]
    assert [machine_of(place) for place in environments(row)] == [
        "Linux, 2 cores",
        "Linux, 16 cores, NVIDIA H200",
    ]


def test_what_a_strangers_row_says_is_text_on_the_page():
    evil = "<script>alert(1)</script>"
    row = {
        "folder": evil, "name": evil, "sample": evil, "images": evil, "seed": evil,
        "metrics": {"fid": 1.0}, "fingerprints": dict.fromkeys(("fit", "sample", "measure"), evil),
        "environment": {"machine": evil, "commit": evil}, "seconds": {"fit": 1, "sample": 1},
        "config": {
            "label": "", "sampler": {"seed": evil, "images": evil, "steps": 1, "batch": 1, "engine": evil},
            "protocol": {"sampling": {"images": 1, "steps": 1, "batch": 1}},
        },
    }  # fmt: skip
    assert "<script" not in "".join(page_rows.lines([row]))
